"""The peers at their best settings: buffers made once, in place, nothing computed twice.

Each function makes what it needs and returns a call without arguments; calls that draw noise draw new noise each time.
Those that are diffusers' import it, which takes seconds: where ``has_diffusers`` is false they cannot be called.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diffkern.ops import COLUMNS
from diffkern.schedule import Schedule
from diffkern.unet import UNet

Call = Callable[[], object]


def has_diffusers() -> bool:
    try:
        return importlib.util.find_spec("diffusers") is not None
    except ValueError:  # it is None in sys.modules: somebody forbade it
        return False


def row_of(table: Tensor, step: int) -> dict[str, float]:
    return dict(zip(COLUMNS, table[step].tolist(), strict=True))


def compiled(function: Callable) -> Callable:
    """By inductor: one kernel for all elementwise work, beside torch's own randn, which is faster than inductor's."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, options={"fallback_random": True})


# --- noise ---


def torch_noise(shape: Sequence[int], dtype: torch.dtype) -> Call:
    out = torch.empty(shape, dtype=dtype)
    return out.normal_


def numpy_noise(shape: Sequence[int]) -> Call:
    """The ziggurat on its fastest generator; one thread."""
    generator, out = np.random.Generator(np.random.SFC64(0)), np.empty(shape, np.float32)
    result = torch.from_numpy(out)

    def noise() -> Tensor:
        generator.standard_normal(dtype=np.float32, out=out)
        return result

    return noise


# --- forward noising ---


def torch_q_sample(x_0: Tensor, t: Tensor, table: Tensor) -> Call:
    x_t, eps = torch.empty_like(x_0), torch.empty_like(x_0)

    def q_sample() -> Tensor:
        a, s = table[t].to(x_0.dtype).view(-1, 2, *[1] * (x_0.ndim - 1)).unbind(1)
        torch.mul(x_0, a, out=x_t)
        return x_t.addcmul_(eps.normal_(), s)

    return q_sample


def torch_compiled_q_sample(x_0: Tensor, t: Tensor, table: Tensor) -> Call:
    def q_sample(x_0: Tensor, t: Tensor, table: Tensor) -> Tensor:
        a, s = table[t].view(-1, 2, *[1] * (x_0.ndim - 1)).unbind(1)
        return (a * x_0 + s * torch.randn_like(x_0)).to(x_0.dtype)

    return functools.partial(compiled(q_sample), x_0, t, table)


def diffusers_add_noise(x_0: Tensor, t: Tensor) -> Call:
    import diffusers

    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    return lambda: scheduler.add_noise(x_0, torch.randn_like(x_0), t)


# --- the reverse step ---


def torch_reverse_step(x: Tensor, out: Tensor, row: dict[str, float]) -> Call:
    """In place on a copy of x, as the loop does it."""
    x, x0_hat, z = x.clone(), torch.empty_like(x), torch.empty_like(x)

    def step() -> Tensor:
        torch.mul(x, row["p_x"], out=x0_hat).add_(out, alpha=row["p_o"]).clamp_(-1, 1)
        x.mul_(row["k_x"]).add_(x0_hat, alpha=row["k_0"])
        return x.add_(z.normal_(), alpha=row["sigma"])

    return step


def torch_compiled_reverse_step(x: Tensor, out: Tensor, row: dict[str, float]) -> Call:
    x = x.clone()
    p_x, p_o, k_x, k_0, sigma = (row[name] for name in ("p_x", "p_o", "k_x", "k_0", "sigma"))

    def step(x: Tensor, out: Tensor) -> Tensor:
        x0_hat = (p_x * x + p_o * out).clamp(-1, 1)
        return x.copy_(k_x * x + k_0 * x0_hat + sigma * torch.randn_like(x))

    return functools.partial(compiled(step), x, out)


def diffusers_ddpm_step(x: Tensor, out: Tensor, t: int) -> Call:
    import diffusers

    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", variance_type="fixed_small", clip_sample=True
    )
    scheduler.set_timesteps(1000)
    return lambda: scheduler.step(out, t, x, return_dict=False)[0]


# --- the training loss ---


def torch_noise_loss(out: Tensor, eps: Tensor) -> Call:
    """With its noise stored; forward and backward."""

    def loss() -> Tensor:
        per_sample = (out - eps).square().flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(per_sample.sum(), out)
        return per_sample.detach(), gradient

    return loss


def torch_diffusion_loss(out: Tensor, x_0: Tensor, eps: Tensor, rows: Tensor) -> Call:
    """The squared error and the bound's term of a learned variance as they are usually written, with the noise stored
    and a row of ``ops.LOSS_COLUMNS`` for each sample; forward and backward."""
    columns = rows.view(*rows.shape, *[1] * (x_0.ndim - 1)).unbind(1)
    a, s, y_x, y_e, weight, p_x, p_o, c1, log_var_q, log_var_min, log_var_max, _ = columns

    def loss() -> tuple[Tensor, Tensor]:
        o, second_half = out.chunk(2, 1)
        mse = (o - (y_x * x_0 + y_e * eps)).square().flatten(1).mean(1) * weight.flatten()
        x0_hat = p_x * (a * x_0 + s * eps) + p_o * o.detach()
        log_var = log_var_min + (second_half + 1) / 2 * (log_var_max - log_var_min)
        ratio, away = log_var_q - log_var, c1 * (x_0 - x0_hat)
        nats = 0.5 * (-1 - ratio + ratio.exp() + away.square() * (-log_var).exp())
        both = torch.stack((mse, nats.flatten(1).mean(1) / math.log(2)), 1)
        (gradient,) = torch.autograd.grad(both.sum(), out)
        return both.detach(), gradient

    return loss


# --- the network and whole sampling ---


def diffusers_unet(unet: UNet) -> nn.Module:
    """The same network with the same weights, for 32x32 images and the options that the benchmarks use."""
    import diffusers

    c = unet.config
    levels = range(len(c["channel_mult"]))
    kinds = ["Attn{}Block2D" if level in c["attention_levels"] else "{}Block2D" for level in levels]
    twin = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        block_out_channels=tuple(c["channels"] * m for m in c["channel_mult"]),
        layers_per_block=c["blocks"],
        down_block_types=tuple(kind.format("Down") for kind in kinds),
        up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
        attention_head_dim=c["head_dim"],
        norm_num_groups=c["groups"],
        norm_eps=c["norm_eps"],
        downsample_padding=c["downsample_padding"],
        flip_sin_to_cos=c["flip_sin_to_cos"],
        freq_shift=c["freq_shift"],
    )
    twin.load_state_dict(unet.state_dict())
    return twin.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def noise_of(twin: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """diffusers' network as a function (x, t) -> its noise."""
    return lambda x, t: twin(x, t).sample


def torch_ddim(
    network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, timesteps: Sequence[int], x_T: Tensor
) -> Call:
    """The loop in plain PyTorch: eta = 0, clipped, coefficients ready, in place. network(x, t) is the noise."""
    alpha_bar = [schedule.alpha_bar[t].item() for t in timesteps] + [1.0]

    @torch.inference_mode()
    def sample() -> Tensor:
        x, x0_hat = x_T.clone(), torch.empty_like(x_T)
        for i, t in enumerate(timesteps):
            ab, prev = alpha_bar[i], alpha_bar[i + 1]
            eps = network(x, torch.full((len(x),), t, device=x.device))
            torch.mul(x, ab**-0.5, out=x0_hat).add_(eps, alpha=-((1 / ab - 1) ** 0.5)).clamp_(-1, 1)
            k_x = ((1 - prev) / (1 - ab)) ** 0.5
            x.mul_(k_x).add_(x0_hat, alpha=prev**0.5 - k_x * ab**0.5)
        return x

    return sample


def diffusers_ddim(network: nn.Module, steps: int, x_T: Tensor, monkeypatch) -> Call:
    """The pipeline as it is, but for where it starts."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", timestep_spacing="trailing", clip_sample=True
    )
    pipeline = diffusers.DDIMPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: x_T.clone())

    def sample() -> Tensor:
        images = pipeline(
            len(x_T), num_inference_steps=steps, use_clipped_model_output=True, output_type="np", return_dict=False
        )[0]
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    return sample
