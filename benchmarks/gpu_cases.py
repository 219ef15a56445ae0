"""The cases of ``python -m benchmarks.gpu``: each op, the network and whole sampling, beside their peers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers
from diffkern import ops, reference, sample
from diffkern.samplers import ddpm
from diffkern.schedule import Schedule
from diffkern.unet import UNet

Call = Callable[[], object]
Same = Callable[[list[Tensor], list[Tensor]], None]
T = 500
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Case:
    """``ours`` beside its peers: ``same(ours, theirs)`` raises where a result is not right."""

    title: str
    ours: Call
    peers: Mapping[str, Call]
    same: Same
    reference: Call | None = None  # which draws the same noise: the same values, up to rounding
    bytes: int = 0  # what ours must move, or compute
    flops: int = 0
    dtype: torch.dtype = F32


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def close(tolerance: float) -> Same:
    """Up to that share of the largest value."""

    def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
        for a, b in zip(ours, theirs, strict=True):
            error, scale = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
            assert error <= tolerance * max(scale, 1), f"expected an error of at most {tolerance} {scale}, got {error}"

    return same


def noisy(sigma: float) -> Same:
    """Other noise of that deviation around the same mean: the deviation of the difference says so."""

    def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
        ratio = ((ours[0].double() - theirs[0].double()).std() / (2**0.5 * sigma)).item()
        assert abs(ratio - 1) < 6 / (2 * ours[0].numel()) ** 0.5 + 0.01, f"expected a ratio of 1, got {ratio}"

    return same


# --- cases ---


class Cases:
    """All of them, on a device, at their sizes or small ones."""

    def __init__(self, device: torch.device, small: bool, compiled: bool):
        self.device, self.small, self.compiled = device, small, compiled

    def __iter__(self) -> Iterator[Case]:
        for dtype in (F32, BF16):
            yield self.unet(dtype)
        yield self.sampling()
        attention = (
            [(2, 2, 40, 32)]
            if self.small
            else [(64, 1, 256, 256), (16, 4, 1024, 64), (4, 8, 4096, 64), (16, 1, 256, 512)]
        )
        for shape in attention:
            for dtype in (BF16, F16, F32):
                yield from self.attention(shape, dtype)
        for shape in [(2, 32, 8, 8)] if self.small else [(64, 128, 32, 32), (64, 256, 8, 8), (4, 128, 256, 256)]:
            for dtype in (F32, BF16):
                yield from self.group_norm_silu(shape, dtype)
        for shape in [(2, 3, 16, 16)] if self.small else [(64, 3, 32, 32), (16, 3, 512, 512)]:
            for dtype in (F32, BF16):
                yield from self.elementwise(shape, dtype)

    def random(self, *shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def with_compiled(self, others: dict[str, Call], make: Callable[[], Call]) -> dict[str, Call]:
        return {**others, "torch.compile": make()} if self.compiled else others

    def elementwise(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
        n, title = shape[0], f"{str(dtype)[6:]} {list(shape)}"
        x, out = self.random(*shape, dtype=dtype), self.random(*shape, dtype=dtype, seed=1)
        seeds, t = torch.arange(n, device=self.device), torch.full((n,), T, device=self.device)
        z = torch.empty_like(x)
        drawn = dict(step=T, dtype=dtype, device=self.device)
        yield Case(
            f"noise {title}",
            lambda: ops.noise(seeds, shape[1:], **drawn),
            {"torch": z.normal_},
            noisy(1.0),
            lambda: reference.noise(seeds, shape[1:], **drawn),
            bytes=x.nbytes,
            dtype=dtype,
        )

        schedule = Schedule.linear()
        q_table = schedule.q_table(self.device)
        others = {"torch": peers.torch_q_sample(x, t, q_table)}
        if dtype == F32 and peers.has_diffusers():
            others["diffusers"] = peers.diffusers_add_noise(x, t)
        yield Case(
            f"q_sample {title}",
            lambda: ops.q_sample(x, t, seeds, q_table),
            self.with_compiled(others, lambda: peers.torch_compiled_q_sample(x, t, q_table)),
            noisy(q_table[T, 1].item()),
            lambda: reference.q_sample(x, t, seeds, q_table),
            bytes=2 * x.nbytes,
            dtype=dtype,
        )

        table = ddpm(schedule, range(999, -1, -1)).float()
        row = peers.row_of(table, 999 - T)
        arguments = (x, out, table.to(self.device), torch.tensor(999 - T, device=self.device), seeds)
        others = {"torch": peers.torch_reverse_step(x, out, row)}
        if dtype == F32 and peers.has_diffusers():
            others["diffusers"] = peers.diffusers_ddpm_step(x, out, T)
        yield Case(
            f"reverse_step {title}",
            lambda: ops.reverse_step(*arguments, clip=True),
            self.with_compiled(others, lambda: peers.torch_compiled_reverse_step(x, out, row)),
            noisy(row["sigma"]),
            lambda: reference.reverse_step(*arguments, clip=True),
            bytes=3 * x.nbytes,
            dtype=dtype,
        )

        out = out.clone().requires_grad_()
        eps = ops.noise(seeds, shape[1:], stream=2, **drawn)

        def with_gradient(noise_loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            loss = noise_loss(out, seeds, t)
            return loss.detach(), torch.autograd.grad(loss.sum(), out)[0]

        yield Case(
            f"noise_loss and its gradient {title}",
            lambda: with_gradient(ops.noise_loss),
            {"torch, eps stored": peers.torch_noise_loss(out, eps)},
            close(1e-5 if dtype == F32 else 2e-2),
            lambda: with_gradient(reference.noise_loss),
            bytes=3 * x.nbytes,
            dtype=dtype,
        )

    def group_norm_silu(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
        x = self.random(*shape, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        weight, bias = (self.random(shape[1], seed=seed).requires_grad_() for seed in (1, 2))
        own_weight, own_bias = (a.detach().to(dtype).requires_grad_() for a in (weight, bias))
        grad_y, groups = x.detach().flip(0), min(32, shape[1] // 4)
        title = f"{str(dtype)[6:]} {list(shape)} channels_last"
        tolerance = 2e-5 if dtype == F32 else 3e-2

        def torchs() -> Tensor:
            return F.silu(F.group_norm(x, groups, own_weight, own_bias))

        def compiled() -> Call:
            function = peers.compiled(lambda x, w, b: F.silu(F.group_norm(x, groups, w, b)))
            return torch.no_grad()(lambda: function(x, own_weight, own_bias))

        yield Case(
            f"group_norm_silu {title}",
            torch.no_grad()(lambda: ops.group_norm_silu(x, weight, bias, groups)),
            self.with_compiled({"torch": torch.no_grad()(torchs)}, compiled),
            close(tolerance),
            bytes=2 * x.nbytes,
            dtype=dtype,
        )
        yield Case(
            f"group_norm_silu and its gradient {title}",
            lambda: torch.autograd.grad(ops.group_norm_silu(x, weight, bias, groups), (x, weight, bias), grad_y)[:1],
            {"torch": lambda: torch.autograd.grad(torchs(), (x, own_weight, own_bias), grad_y)[:1]},
            close(3 * tolerance),
            bytes=5 * x.nbytes,
        )

    def attention(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
        n, heads, tokens, d = shape
        q, k, v, grad_out = (self.random(n, tokens, heads, d, dtype=dtype, seed=i).transpose(1, 2) for i in range(4))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        title, product = f"{str(dtype)[6:]} {list(shape)}", 2 * n * heads * tokens**2 * d
        tolerance = 1e-4 if dtype == F32 else 3e-2
        yield Case(
            f"attention {title}",
            torch.no_grad()(lambda: ops.attention(q, k, v)),
            {"SDPA": torch.no_grad()(lambda: F.scaled_dot_product_attention(q, k, v))},
            close(tolerance),
            flops=2 * product,
            dtype=dtype,
        )
        ours, theirs = ops.attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
        yield Case(
            f"attention backward {title}",
            lambda: torch.autograd.grad(ours, (q, k, v), grad_out, retain_graph=True),
            {"SDPA": lambda: torch.autograd.grad(theirs, (q, k, v), grad_out, retain_graph=True)},
            close(2 * tolerance),
            flops=5 * product,
            dtype=dtype,
        )

    def network(self) -> tuple[UNet, nn.Module | None]:
        """Ours, and diffusers' with the same weights if it is installed."""
        config = dict(channels=32, channel_mult=(1, 2), attention_levels=(1,), groups=8) if self.small else {}
        unet, generator = UNet(**config), torch.Generator().manual_seed(0)
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        unet = unet.eval().requires_grad_(False)
        twin = peers.diffusers_unet(unet).to(self.device) if peers.has_diffusers() else None
        return unet.to(self.device, memory_format=torch.channels_last), twin

    def unet(self, dtype: torch.dtype) -> Case:
        unet, twin = self.network()
        n = 2 if self.small else 64
        x, t = self.random(n, 3, 32, 32).to(memory_format=torch.channels_last), torch.full((n,), T, device=self.device)

        def lowered(call: Call) -> Call:
            autocast = torch.autocast(self.device.type, dtype=BF16, enabled=dtype == BF16)
            return torch.inference_mode()(autocast(call))

        others = {}
        if twin is not None:
            others = self.with_compiled(
                {"diffusers": lowered(lambda: twin(x, t).sample)}, lambda: lowered(self.compiled_unet(twin, x, t))
            )
        tolerance = close(2e-3 if dtype == F32 else 1e-1)
        return Case(f"U-Net {str(dtype)[6:]} {list(x.shape)}", lowered(lambda: unet(x, t)), others, tolerance)

    def compiled_unet(self, twin: nn.Module, x: Tensor, t: Tensor) -> Call:
        torch._dynamo.reset()
        network = torch.compile(twin)
        return lambda: network(x, t).sample

    def sampling(self) -> Case:
        unet, twin = self.network()
        n, steps = (2, 3) if self.small else (64, 20)
        schedule, x_T = Schedule.linear(), self.random(n, 3, 32, 32)

        def ours(**options: bool) -> Call:
            fixed = dict(sampler="ddim", steps=steps, x_T=x_T, batch_size=n, schedule=schedule, prediction="eps")
            return lambda: sample(unet, shape=(3, 32, 32), progress=False, **fixed, **options)

        network, whose = (unet, "our") if twin is None else (peers.noise_of(twin), "diffusers'")
        loop = peers.torch_ddim(network, schedule, schedule.timesteps(steps, "trailing"), x_T)
        on_card = self.device.type == "cuda"
        others = {"ours, eager": ours()} if on_card else {}
        others[f"torch loop, {whose} U-Net"] = loop
        return Case(
            f"sampling, DDIM {steps} steps, {n} x 32x32" + ", CUDA graph" * on_card,
            ours(cuda_graph=True) if on_card else ours(),
            others,
            close(5e-3),
        )


# --- checking ---


def check(case: Case) -> None:
    ours = [tensor.clone() for tensor in tensors(case.ours())]
    for peer in case.peers.values():  # before it has run: some go on from where they are
        case.same(ours, tensors(peer()))
    if case.reference is not None:
        close(1e-5 if case.dtype == F32 else 1e-2)(ours, tensors(case.reference()))
