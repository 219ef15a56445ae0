"""Derivatives of every op and of the network: forwards, of higher order, in float64, in torch.func; or an error."""

import copy
from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from calls import fullest, name_of
from networks import with_random_weights
from tolerances import UNET
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import diffkern
from diffkern import ops, reference
from diffkern.ops.example import Example, all_examples
from diffkern.ops.transforms import named
from diffkern.unet import UNet

SEEDS, T = torch.tensor([1, -2]), torch.tensor([3, 9])


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(*k_h: float) -> Tensor:
    """A table of two rows with noise, of each with its step of the schedule."""
    row = torch.tensor([0.9, -0.4, 0.7, 0.2, 0.5, 0.3, -2.0, -1.0])
    return torch.stack([torch.cat((row * scale, torch.tensor([t, *k_h]))) for scale, t in ((1.0, 7), (0.8, 3))])


TABLE = diffkern.Schedule.linear(10).q_table()
SMALL = values(2, 2, 2, 2, seed=1)


def function_of(example: Example) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a function of the tensors that the example may be differentiated by, and these tensors."""
    lists = {name: example.arguments[name] for name in example.differentiable if name in example.arguments}
    leaves = list(named(lists.items()))

    def function(*tensors: Tensor) -> Tensor:
        given = {name: [] if isinstance(value, list) else None for name, value in lists.items()}
        for (name, _), tensor in zip(leaves, tensors, strict=True):
            given[name] = [*given[name], tensor] if isinstance(lists[name], list) else tensor
        return getattr(ops, example.op)(**example.arguments | given)

    return function, [tensor for _, tensor in leaves]


def is_smooth(example: Example) -> bool:
    """Is it a float32 call of a public function that may be differentiated?"""
    tensors = named((name, example.arguments.get(name)) for name in example.differentiable)
    single = all(tensor.dtype == torch.float32 for _, tensor in tensors)
    return bool(example.differentiable) and single and isinstance(getattr(ops, example.op, None), FunctionType)


EXAMPLES = all_examples(n=2, c=4, k=3, h=2, w=2, heads=2, queries=2, keys=4, d=3)
OPS = {name_of(e): function_of(e) for e in fullest(filter(is_smooth, EXAMPLES))}  # a function of tensors; the tensors


# a U-Net of every kind of block
CONFIG = dict(channels=2, channel_mult=(1, 2), blocks=1, attention_levels=(1,), groups=1, num_classes=2)
CONFIG |= dict(in_channels=1, freq_shift=0.0, scale_shift=True, norm_eps=1e-2)
NETWORK = with_random_weights(UNet(**CONFIG)).eval().requires_grad_(False)
OPS["UNet"] = (lambda x: NETWORK(x, T, torch.tensor([1, -1])), [values(2, 1, 4, 4)])
OPS["optimized UNet"] = (lambda x: diffkern.optimize(NETWORK)(x, T, torch.tensor([1, -1])), [values(2, 1, 4, 4)])


def close(got: Tensor, expected: Tensor, tolerance: float = UNET) -> bool:
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())


# --- without torch_ops ---


@pytest.mark.parametrize("name", OPS)
def test_derivatives_forwards_are_the_slope_of_the_kernel(name):
    f, inputs = OPS[name]
    directions = [values(*x.shape, seed=8) for x in inputs]
    at = lambda step: f(*(x + step * v for x, v in zip(inputs, directions, strict=True)))  # noqa: E731
    slope = (8 * (at(5e-3) - at(-5e-3)) - (at(1e-2) - at(-1e-2))) / 6e-2  # of the fourth order
    out, tangent = jvp(f, tuple(inputs), tuple(directions))
    assert close(out, f(*inputs)) and close(tangent, slope, 2e-3)
    with forward_ad.dual_level():
        dual = f(*(forward_ad.make_dual(x, v) for x, v in zip(inputs, directions, strict=True)))
        assert close(forward_ad.unpack_dual(dual).tangent, tangent)


@pytest.mark.parametrize("name", OPS)
def test_torch_func_agrees_with_itself_forwards_backwards_and_by_sample(name):
    f, inputs = OPS[name]
    first = lambda x: f(x, *inputs[1:])  # noqa: E731
    loss, x = lambda x: first(x).square().sum(), inputs[0]
    assert close(jacfwd(first)(x), jacrev(first)(x))
    gradient = grad(loss)(x)
    assert close(vjp(first, x)[1](2 * first(x))[0], gradient)
    each = vmap(grad(loss))(torch.stack((x, 2 * x)))
    assert close(each[0], gradient) and close(each[1], grad(loss)(2 * x))


WITH_KERNELS = [name for name in OPS if hasattr(torch.ops.diffkern, f"{name.split(',')[0]}_backward")]


@pytest.mark.parametrize("name", [*WITH_KERNELS, "UNet"])
def test_gradients_of_torch_func_are_those_of_the_kernels(name):
    f, inputs = OPS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    got = grad(lambda *inputs: f(*inputs).square().sum(), argnums=tuple(range(len(inputs))))(*inputs)
    assert all(map(close, got, expected))


def test_a_hessian_is_that_of_the_closed_form():
    weights = torch.tensor([0.5, 2.0])
    got = hessian(lambda out: ops.noise_loss(out, SEEDS, T, weights).sum())(SMALL).reshape(16, 16)
    assert close(got, torch.diag(weights.repeat_interleave(8) * 2 / 8))


@pytest.mark.parametrize("optimized", [False, True])
def test_per_sample_gradients_of_the_weights_are_those_of_each_sample(optimized):
    unet = NETWORK
    module = diffkern.optimize(unet) if optimized else unet
    x, labels = values(2, 1, 4, 4), torch.tensor([1, -1])
    weights = dict(unet.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return functional_call(module, weights, (x[None], t[None], label[None])).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0, 0, 0))(weights, x, T, labels)
    learning = copy.deepcopy(unet).requires_grad_()
    for n in range(2):
        out = learning(x[n : n + 1], T[n : n + 1], labels[n : n + 1])
        expected = torch.autograd.grad(out.square().sum(), list(learning.parameters()))
        largest = max(gradient.abs().max() for gradient in expected)
        for name, gradient in zip(weights, expected, strict=True):
            assert (got[name][n] - gradient).abs().max() <= UNET * largest, name


def test_noise_may_be_asked_for_under_vmap_with_the_same_bits():
    expected = ops.q_sample(SMALL, T, SEEDS, TABLE)
    got = vmap(lambda x, t, seed: ops.q_sample(x[None], t[None], seed[None], TABLE)[0])(SMALL, T, SEEDS)
    assert torch.equal(got, expected)
    assert torch.equal(vmap(lambda x: ops.q_sample(x, T, SEEDS, TABLE))(SMALL[None])[0], expected)


@pytest.mark.parametrize("optimized", [False, True])
def test_the_network_is_traced_and_has_fake_tensors(optimized):
    net = diffkern.optimize(NETWORK) if optimized else NETWORK
    x, labels = values(2, 1, 4, 4), torch.tensor([1, -1])
    with torch.no_grad():
        expected = net(2 * x, T, labels)
        traced = torch.jit.trace(net, (x, T, labels), check_trace=False)
        assert close(traced(2 * x, T, labels), expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = net(*map(mode.from_tensor, (x, T, labels)))
    assert isinstance(fake, FakeTensor) and fake.shape == x.shape


def test_a_derivative_compiles_with_its_value():
    f = lambda x: jvp(lambda x: ops.q_sample(x, T, SEEDS, TABLE), (x,), (2 * x,))  # noqa: E731
    for got, expected in zip(torch.compile(f, fullgraph=True, backend="eager")(SMALL), f(SMALL), strict=True):
        assert torch.equal(got, expected)


# --- refused ---


def registered() -> list[str]:
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("diffkern::"))


WITHOUT_DERIVATIVES = ("diffkern::fingerprint", "diffkern::noise")  # bits of weights, and of a seed


@pytest.mark.parametrize("op", [name for name in registered() if name not in WITHOUT_DERIVATIVES])
def test_a_registered_op_refuses_a_tangent_and_names_the_argument(op):
    op = getattr(torch.ops.diffkern, op.removeprefix("diffkern::")).default
    filler = {"Tensor": torch.zeros(1), "int": 1, "float": 1.0, "bool": False, "List[Tensor]": []}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.zeros(1), torch.ones(1))
        for i, argument in enumerate(op._schema.arguments):
            if "Tensor" in str(argument.type):
                arguments = [filler.get(str(other.type)) for other in op._schema.arguments]
                arguments[i] = [dual] if str(argument.type).startswith("List") else dual
                with pytest.raises(RuntimeError, match=f"^{argument.name}: expected no tangent, for the kernel of "):
                    op(*arguments)


def test_a_tangent_that_comes_backwards_is_refused():
    x = SMALL.clone().requires_grad_()
    y = ops.conv3x3(x, values(3, 2, 3, 3))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="^grad_y: expected no tangent"):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


@pytest.mark.parametrize("transform", ["jvp", "vmap"])
def test_an_op_in_place_refuses_transforms(transform):
    for name, f in {
        "x_0": lambda x: ops.q_sample_(x, T, SEEDS, TABLE),
        "x": lambda x: ops.reverse_step_(x, SMALL, steps(), 1, SEEDS),
    }.items():
        with pytest.raises(RuntimeError, match=f"^{name}: expected a plain tensor, for .* writes in place"):
            jvp(f, (SMALL.clone(),), (SMALL,)) if transform == "jvp" else vmap(f)(SMALL[None].clone())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: ops.q_sample_(x, T, SEEDS, TABLE),
        lambda x: ops.reverse_step_(SMALL.clone(), SMALL, steps(), 1, SEEDS, x0_hat=x),
        lambda x: torch.ops.diffkern.q_sample_(x, T, SEEDS, TABLE, None),
        lambda x: torch.ops.diffkern.attention_out(x, SMALL, SMALL, SMALL, None, None),
    ],
)
def test_what_was_written_in_place_is_refused_for_a_gradient(change):
    x, factor = SMALL.clone(), torch.ones(2, requires_grad=True)
    y = x * factor
    change(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("argument", ["x", "table"])
def test_a_registered_op_without_a_gradient_refuses_to_cut_one(argument):
    tensors = dict(x=SMALL.clone(), out=SMALL, table=steps())
    tensors[argument].requires_grad_()
    arguments = (*tensors.values(), torch.tensor(1), SEEDS, None, 1.0, False, False, [], False)
    with pytest.raises(RuntimeError, match=f"^{argument}: expected no gradient through reverse_step, got a tensor"):
        torch.ops.diffkern.reverse_step(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.q_sample(SMALL, T, SEEDS[:1], TABLE), "seeds: expected shape (2,), got (1,)"),
        (lambda: ops.q_sample(SMALL, torch.tensor([0, 10]), SEEDS, TABLE), "t: expected values in [0, 10), got 10"),
        (lambda: ops.q_sample(SMALL, -1, SEEDS, TABLE), "t: expected values in [0, 10), got -1"),
        (
            lambda: ops.reverse_step(SMALL, SMALL[:1], steps(), 0, SEEDS),
            "out: expected shape (2, 2, 2, 2), got (1, 2, 2, 2)",
        ),
        (lambda: ops.reverse_step(SMALL, SMALL, steps(0.1), 0, SEEDS), "table: expected shape (2, 9), got (2, 10)"),
        (lambda: ops.noise_loss(SMALL, SEEDS, T, torch.ones(1)), "weights: expected shape (2,), got (1,)"),
        (
            lambda: ops.attention(SMALL, SMALL[:, :1], SMALL),
            "k: expected shape (2, 2, 2, 2), got (2, 1, 2, 2)",
        ),
        (
            lambda: ops.group_norm_silu(SMALL, torch.ones(2), torch.ones(2), 1, add=torch.ones(1, 2)),
            "add: expected shape (2, 2), got (1, 2)",
        ),
    ],
)  # fmt: skip
def test_torch_ops_refuses_what_would_be_broadcast(call, message):
    with diffkern.torch_ops(), pytest.raises(RuntimeError) as raised:
        call()
    assert str(raised.value) == message


# --- torch_ops ---


@pytest.mark.parametrize("name", [name for name in OPS if name != "optimized UNet"])
def test_every_derivative_is_right_in_float64_with_torch_ops(name):
    f, inputs = OPS[name]
    if name == "UNet":
        smaller = CONFIG | dict(channel_mult=(1,), attention_levels=(0,), mid_attention=False)
        unet = with_random_weights(UNet(**smaller)).double().requires_grad_(False)
        f, inputs = lambda x: unet(x, T, torch.tensor([1, -1])), [values(2, 1, 2, 2)]
    inputs = [x.double().requires_grad_() for x in inputs]
    with diffkern.torch_ops():
        assert gradcheck(f, inputs, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_the_network_has_a_derivative_by_time_in_float64():
    unet = with_random_weights(UNet(**CONFIG)).double().requires_grad_(False)
    t = torch.tensor([0.3, 7.1], dtype=torch.float64, requires_grad=True)
    with diffkern.torch_ops():
        assert gradcheck(lambda t: unet(values(2, 1, 4, 4).double(), t), (t,), check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("name", OPS)
def test_kernels_agree_with_torch_ops(name):
    f, inputs = OPS[name]
    with diffkern.torch_ops():
        expected = f(*inputs)
    assert close(f(*inputs), expected)


def test_torch_ops_has_the_bits_of_the_kernels_noise_in_float64():
    expected = ops.noise(SEEDS, (5,), step=T).double()
    with diffkern.torch_ops():
        assert torch.equal(ops.noise(SEEDS, (5,), step=T, dtype=torch.float64), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ops_in_place_run_in_torch_ops(dtype):
    x, x0_hat, h = SMALL.to(dtype), SMALL.to(dtype).clone(), SMALL.to(dtype)
    with diffkern.torch_ops():
        expected = ops.reverse_step(x, h, steps(), 1, SEEDS, return_x0=True)
        ops.reverse_step_(x := x.clone(), h, steps(), 1, SEEDS, x0_hat=x0_hat)
        ops.q_sample_(h := h.clone(), T, SEEDS, TABLE)
    assert torch.equal(x, expected[0]) and torch.equal(x0_hat, expected[1])
    assert h.dtype == dtype and close(h.float(), reference.q_sample(SMALL, T, SEEDS, TABLE))


def test_torch_ops_nests_decorates_and_ends_with_an_exception():
    refused = lambda: pytest.raises(RuntimeError, match="got float64, which diffkern.torch_ops")  # noqa: E731
    context, x = diffkern.torch_ops(), SMALL.double()
    with pytest.raises(ZeroDivisionError), context, context:
        assert ops.attention(x, x, x).dtype == torch.float64
        raise ZeroDivisionError
    with context:
        with diffkern.torch_ops():
            pass
        ops.attention(x, x, x)
    with refused():
        ops.attention(x, x, x)
    assert diffkern.torch_ops()(ops.attention)(x, x, x).dtype == torch.float64
    with refused():
        ops.attention(x, x, x)


def test_torch_ops_is_seen_by_a_compiled_function():
    compiled = torch.compile(lambda x: ops.q_sample(x, T, SEEDS, TABLE), fullgraph=True, backend="eager")
    compiled(SMALL)
    x = SMALL.double().requires_grad_()
    with diffkern.torch_ops():
        (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(gradient[:, 0, 0, 0], TABLE[T, 0].double())


def test_torchs_own_ops_refuse_what_the_kernels_refuse():
    table, seeds, x = torch.rand(3, 2), torch.tensor([1, 2]), torch.randn(2, 4, 3, 3)
    coefficients = torch.ones(2, 4)
    calls = {
        "groups: expected a divisor of the 4 channels, got 3": lambda: ops.group_norm_silu(x, *coefficients, 3),
        "t: expected int64, got float32": lambda: ops.q_sample(x, torch.tensor(1.7), seeds, table),
        r"weight: expected .*\(5, 4, 3, 3\).*, got .*\(5, 4, 1, 1\)": lambda: ops.conv3x3(x, torch.randn(5, 4, 1, 1)),
    }
    for message, call in calls.items():
        with diffkern.torch_ops(), pytest.raises(RuntimeError, match=message):
            call()
