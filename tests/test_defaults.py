"""torch's default dtype, default device and global generator: nothing depends on them, nothing advances them."""

import ast
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from calls import public_examples, results
from networks import diffusers_twin
from torch import Tensor, nn

import diffkern
from diffkern import Model, Schedule, doctor, evaluate, load, ops, optimize, sample
from diffkern.training import Trainer, draw, new_model

SOURCES = sorted(Path(diffkern.__file__).parent.rglob("*.py"))
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


def test_every_tensor_is_made_with_a_dtype_and_a_device():
    silent = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
                said = {keyword.arg for keyword in node.keywords}
                if not (None in said or {"dtype", "device"} <= said):  # None: a dict of them
                    silent.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert not silent


def test_no_generator_is_seeded_that_is_not_put_back():
    """``torch.manual_seed`` seeds those of CUDA too, of which ``fork_rng(devices=[])`` knows nothing."""
    seeded = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.manual_seed", "torch.random.manual_seed")
    ]
    assert not seeded


def pipeline():
    from diffusers import DDPMPipeline, DDPMScheduler

    network = tiny.model(classes=None).network
    twin = diffusers_twin(network)
    twin.load_state_dict(network.state_dict())
    twin.register_to_config(sample_size=8)
    return DDPMPipeline(twin.eval(), DDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing"))


class Uses:
    """A script's uses of the package; each gives tensors. The script makes what it uses before it sets any default."""

    def __init__(self, folder: Path):
        self.model, self.path, self.data = tiny.model(), folder / "model.safetensors", tiny.dataset()
        diffkern.save(self.model, self.path)
        self.x, self.t, self.labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 17]), torch.tensor([2, -1])
        self.pipeline = pipeline()

    def schedules(self) -> list[Tensor]:
        schedules = [make(20) for make in (Schedule.linear, Schedule.scaled_linear, Schedule.sigmoid, Schedule.cosine)]
        schedules += [Schedule([0.1, 0.2, 0.5]), schedules[0].respace(5)]
        tables = ("alpha_bar", "alpha_bar_prev", "posterior_log_variance", "posterior_x0", "posterior_xt")
        return [getattr(s, table) for s in schedules for table in tables] + [s.q_table() for s in schedules]

    def samples(self) -> list[Tensor]:
        model, seen = copy.deepcopy(self.model), []  # an engine keeps what it has made of a network
        options = dict(n=2, labels=[1, "none"], guidance=2.0, steps=2, progress=False)
        images = [sample(model, engine=engine, callback=seen.append, **options) for engine in (True, False)]
        images += [sample(self.path, sampler=sampler, **options) for sampler in ("ddpm", "dpmpp_2m")]
        bare = dict(schedule=tiny.SCHEDULE, prediction="v", shape=(1, 8, 8), steps=2, progress=False)
        return [*images, sample(lambda x, t, y: 0.5 * x, 2, **bare), *(step.x0_hat for step in seen)]

    def loaded(self) -> list[Tensor]:
        return [*load(self.path).network.state_dict().values()]

    def optimized(self) -> list[Tensor]:
        with torch.no_grad():
            ours = [optimize(copy.deepcopy(self.model), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
            theirs = optimize(self.pipeline.unet)
            outputs = [engine(self.x, self.t, self.labels) for engine in ours]
            return [*outputs, theirs(self.x, 3).sample, theirs(self.x, self.t).sample]

    def from_diffusers(self) -> list[Tensor]:
        return [Model.from_diffusers(self.pipeline)(self.x, self.t)]

    def trained(self) -> list[Tensor]:
        config = tiny.config(label_dropout=0.5, network=tiny.NETWORK | dict(dropout=0.5))
        trainer = Trainer(new_model(self.data, config), self.data, config)
        losses = [trainer.step() for _ in range(2)]
        return [torch.tensor(losses, dtype=torch.float64, device="cpu"), *trainer.tensors().values()]

    def evaluated(self) -> list[Tensor]:
        net, accuracy = evaluate.load_classifier()
        images = torch.full((2, 1, 32, 32), 7, dtype=torch.uint8, device="cpu")
        losses = evaluate.eps_loss(self.model, self.data, n=4, buckets=2)
        features = evaluate.features(net, images)
        numbers = [*losses, accuracy, evaluate.frechet_distance(features, features.flip(0) + 1)]
        return [features, torch.tensor(numbers, dtype=torch.float64, device="cpu")]

    def ops(self) -> list[Tensor]:
        draws = draw(torch.tensor([3, 4], dtype=torch.int64, device="cpu").numpy(), 0, 20, 0.5)
        called = [result for e in public_examples() for result in results(getattr(ops, e.op), e.arguments)]
        noise = [ops.noise([1, 2], (5,), step=3), ops.noise(1, (5,), step=3, device="cpu")]
        return [*called, *noise, draws.t, draws.seeds]


USES = [name for name, value in vars(Uses).items() if isinstance(value, Callable) and not name.startswith("_")]


@pytest.fixture
def default():
    """Sets torch's default dtype or device; they are as before in the end."""
    before = torch.get_default_dtype()

    def set_default(value: torch.dtype | str) -> None:
        if isinstance(value, torch.dtype):
            torch.set_default_dtype(value)
        else:
            torch.set_default_device(value)

    yield set_default
    torch.set_default_dtype(before)
    torch.set_default_device(None)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For the module: torch's own products have other bits with other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uses(tmp_path_factory) -> Uses:
    return Uses(tmp_path_factory.mktemp("uses"))


@pytest.fixture(scope="module")
def usual(one_thread, uses) -> dict[str, tuple[list[Tensor], bool]]:
    """What each use gives, and whether it left torch's global generator as it was."""
    results = {}
    for use in USES:
        before = torch.random.get_rng_state()
        tensors = getattr(uses, use)()
        results[use] = tensors, torch.equal(torch.random.get_rng_state(), before)
    return results


def test_torchs_global_generator_is_left_as_it_was(usual):
    assert [use for use, (_, is_left) in usual.items() if not is_left] == []


def test_the_default_dtype_and_device_change_no_bit(uses, usual, default):
    default(torch.float64)
    default("meta")
    for use in USES:
        for got, want in zip(getattr(uses, use)(), usual[use][0], strict=True):
            assert (got.dtype, got.device) == (want.dtype, want.device), use
            assert torch.equal(got, want), use


def test_doctor_passes_whatever_the_default_dtype_and_device_are(default):
    doctor.examples.cache_clear()
    default(torch.float64)
    default("meta")
    checks = dict(doctor.checks())
    failed = [name for name, check in checks.items() if name.startswith("cpu") and not check()]
    doctor.examples.cache_clear()
    assert checks and not failed


def test_an_optimized_network_with_another_parameter_draws_nothing():
    unet = pipeline().unet
    engine, x = optimize(unet), torch.zeros(1, 1, 8, 8)
    with torch.no_grad():
        engine(x, 3)
        unet.conv_out.bias = nn.Parameter(torch.ones(1))
        before = torch.random.get_rng_state()
        assert torch.allclose(engine(x, 3).sample, unet(x, 3).sample, atol=1e-4)
    assert torch.equal(torch.random.get_rng_state(), before)
