"""Known answers to the bit: hashes of coefficients, images and draws, model files and a checkpoint, in ``tests/data``.

``tests/test_known_answers.py`` compares the present code with them. After a change that is meant to change bits, write
the sections that it concerns again, from the repository's root::

    python tests/known_answers.py SECTION ...

A section is a key of ``tests/data/known_answers.json``. "files" also writes the model files and the checkpoint. Its
bytes differ between processors, because training rounds differently on them. No test writes anything here.

A hash is the first 16 digits of SHA-256 over types, shapes and little-endian bytes.
"""

import argparse
import hashlib
import itertools
import json
import shutil
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffkern import ops
from diffkern.data import Dataset, epoch_order
from diffkern.model import Model, save
from diffkern.samplers import ddim, ddpm, dpmpp_2m, fold_x0
from diffkern.sampling import Step, sample
from diffkern.schedule import Schedule
from diffkern.training import CHECKPOINT, Config, Trainer, draw, new_model
from diffkern.unet import UNet

DATA = Path(__file__).parent / "data"
JSON = DATA / "known_answers.json"


def digest(*arrays: Tensor | np.ndarray | list[int]) -> str:
    """Hash types, shapes and values."""
    sha = hashlib.sha256()
    for array in map(np.asarray, arrays):
        sha.update(f"{array.dtype.name} {array.shape}".encode())
        sha.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()[:16]


# --- which steps are visited ---

SPACINGS = ("trailing", "leading", "linspace", "quadratic")
LENGTHS = {1: (1,), 2: (1, 2), 33: range(1, 34), 1000: (1, 2, 7, 20, 50, 99, 250, 333, 1000)}


def timesteps() -> dict[str, dict[str, str]]:
    """Hash the steps of each spacing and T, over several numbers of steps."""
    return {
        spacing: {
            f"T = {T}": digest(*(Schedule.linear(T, 1e-3, 0.1).timesteps(N, spacing) for N in lengths))
            for T, lengths in LENGTHS.items()
        }
        for spacing in SPACINGS
    }


# --- tables of coefficients ---

SCHEDULES = {
    "linear": Schedule.linear(),
    "cosine": Schedule.cosine(),
    "sigmoid": Schedule.sigmoid(),
    "scaled_linear": Schedule.scaled_linear(),
}
SAMPLERS = {
    **{f"ddpm {variance}": partial(ddpm, variance=variance) for variance in ("fixed_small", "fixed_large", "learned")},
    **{f"ddim {eta}": partial(ddim, eta=eta) for eta in (0.0, 0.5, 1.0)},
    "dpmpp_2m": dpmpp_2m,
}
COLUMNS = ("p_x", "p_o", "k_x", "k_o", "k_0", "sigma", "log_var_min", "log_var_max")
LOGS = [COLUMNS.index("log_var_min"), COLUMNS.index("log_var_max")]
PREDICTIONS = ("eps", "x0", "v", "score")
STEPS = (1, 7, 20, 50, 250, 1000)


def coefficients(table: Tensor) -> np.ndarray:
    """The columns ``COLUMNS`` and the history's, wherever the kernel reads them: float64 [steps, 8 + J]."""
    named = [table[:, ops.COLUMNS.index(name)] for name in COLUMNS]
    return torch.cat((torch.stack(named, 1), table[:, len(ops.COLUMNS) :]), 1).numpy()


def rounded(values: np.ndarray) -> np.ndarray:
    """Round to float32, for a hash. -0 becomes 0, and so does a log variance within 2^-20 of 0.

    Such a variance is near 1. float64 holds it to 2^-53, which is not enough for the float32 of its logarithm.
    """
    values = values.astype(np.float32) + np.float32(0)
    values[:, LOGS] = np.where(np.abs(values[:, LOGS]) < 2.0**-20, 0, values[:, LOGS])
    return values


def tables(schedule: str, sampler: str, prediction: str) -> dict[str, np.ndarray]:
    """Return, by name, the coefficients [rows, 8 + J] over all of STEPS and SPACINGS, and folded."""
    s, make = SCHEDULES[schedule], SAMPLERS[sampler]
    choices = dict.fromkeys(tuple(s.timesteps(N, spacing)) for N in STEPS for spacing in SPACINGS)  # without repeats
    made = [make(s, choice, prediction) for choice in choices]
    return {
        prediction: np.concatenate([coefficients(table) for table in made]),
        f"{prediction}, folded": np.concatenate([coefficients(fold_x0(table)) for table in made]),
    }


def hashes_of_tables(schedule: str, sampler: str, prediction: str) -> dict[str, str]:
    return {name: digest(rounded(values)) for name, values in tables(schedule, sampler, prediction).items()}


def check_rounding(name: str, values: np.ndarray) -> None:
    """Raise RuntimeError if an error of 4e-13 relative (and 2^-52 in the logarithms) could change a float32 of a hash.

    Processors differ in the last bits of exp, log, expm1, log1p and sin. torch's scalar code and its AVX2 code
    (``ATEN_CPU_CAPABILITY=default`` and ``avx2``) give entries that differ by at most 2.5e-13, in dpmpp_2m with 1000
    steps, which subtracts logarithms. The entry nearest to the middle of two float32 is 5.1e-13 away from it.
    """
    float32 = rounded(values)
    beyond = np.nextafter(float32, np.where(values > float32, np.inf, -np.inf).astype(np.float32))
    middle = (float32.astype(np.float64) + beyond) / 2
    error = 4e-13 * np.abs(values)
    error[:, LOGS] += 2.0**-52
    near = (np.abs(values - middle) <= error) & (float32 != 0)  # 0 is exact, or set
    if near.any():
        raise RuntimeError(f"{name}: expected entries far from the middle of two float32, got {values[near]}")


def all_tables() -> dict[str, dict[str, dict[str, str]]]:
    hashes = {schedule: {sampler: {} for sampler in SAMPLERS} for schedule in SCHEDULES}
    for schedule, sampler, prediction in itertools.product(SCHEDULES, SAMPLERS, PREDICTIONS):
        for name, values in tables(schedule, sampler, prediction).items():
            check_rounding(f"{schedule}, {sampler}, {name}", values)
        hashes[schedule][sampler] |= hashes_of_tables(schedule, sampler, prediction)
    return hashes


def q_tables() -> dict[str, str]:
    """Hash sqrt(alpha_bar) and sqrt(1 - alpha_bar), float32, of each schedule."""
    return {name: digest(schedule.q_table()) for name, schedule in SCHEDULES.items()}


# --- images of a network that has the same bits everywhere ---


def network(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """Multiply and add element by element. Every processor rounds each operation to the same float32."""
    out = x_t * 0.5 + t.float()[:, None, None, None] * 2.0**-12
    return out if labels is None else out + labels.float()[:, None, None, None] * 2.0**-4


def network_with_variance(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    out = network(x_t, t, labels)
    return torch.cat((out, out * 0.75 - 0.125), 1)


SHAPE = (2, 3, 5)
X_T = torch.arange(5 * 30, dtype=torch.float32, device="cpu").reshape(5, *SHAPE) * 2.0**-5 - 2.25
OF_SAMPLERS = {
    "ddpm fixed_small": dict(sampler="ddpm", variance="fixed_small"),
    "ddpm fixed_large": dict(sampler="ddpm", variance="fixed_large"),
    "ddpm learned": dict(model=network_with_variance, sampler="ddpm", variance="learned"),
    "ddim 0.0": dict(sampler="ddim"),
    "ddim 0.5": dict(sampler="ddim", eta=0.5),
    "ddim 1.0": dict(sampler="ddim", eta=1.0),
    "dpmpp_2m": dict(sampler="dpmpp_2m"),
}
GUIDED = dict(labels=[0, 1, 2, -1, 9], guidance=3.5)
CASES = {
    f"{name}{', not clipped' * (not clip)}{', guided' * bool(guided)}": dict(options, steps=20, clip=clip, **guided)
    for name, options in OF_SAMPLERS.items()
    for clip in (True, False)
    for guided in (dict(), GUIDED)
}
CASES |= {
    "no option": dict(batch_size=5),
    "no option but steps": dict(sampler="ddim", steps=7),
    "n": dict(sampler="ddim", n=5, seeds=None, steps=7),
    "ddpm's own steps": dict(sampler="ddpm", batch_size=5),
    "ddim's own steps": dict(sampler="ddim"),
    "dpmpp_2m's own steps": dict(sampler="dpmpp_2m"),
    "one step": dict(steps=1),
    "given steps": dict(sampler="dpmpp_2m", steps=[999, 700, 40, 3]),
    "given variances": dict(sampler="ddpm", steps=7, variance=torch.arange(7, dtype=torch.float64, device="cpu") / 64),
    "zero terminal SNR": dict(prediction="v", schedule=Schedule([0.1, 0.2, 0.3, 0.5, 1.0])),
    "variance is dropped": dict(model=network_with_variance, sampler="ddpm", variance="fixed_small", steps=7),
    "guidance 1": dict(GUIDED, guidance=1.0, eta=0.0, steps=7),
    "guidance 0": dict(GUIDED, guidance=0.0, eta=0.0, steps=7),
    "guidance -0.5": dict(GUIDED, guidance=-0.5, eta=0.0, steps=7),
    "one label": dict(labels=3, guidance=2.0, eta=0.0, steps=7),
    **{f"x_T {d}": dict(x_T=X_T.to(d), eta=0.0, steps=7) for d in (torch.float32, torch.float64, torch.bfloat16)},
    **{f"spacing {spacing}": dict(sampler="dpmpp_2m", steps=7, spacing=spacing) for spacing in SPACINGS},
    **{f"prediction {name}": dict(sampler="ddpm", steps=7, prediction=name) for name in PREDICTIONS},
    **{f"shape {shape}": dict(sampler="ddpm", steps=7, shape=shape) for shape in ((1, 1, 1), (3, 7, 1), (4, 32, 33))},
    **{f"schedule {name}": dict(sampler="ddpm", steps=7, prediction="v", schedule=s) for name, s in SCHEDULES.items()},
}  # fmt: skip
DEFAULTS = dict(
    model=network,
    seeds=[3, 2**40 + 1, -7, 0, 2**63 - 1],
    schedule=SCHEDULES["linear"],
    prediction="eps",
    shape=SHAPE,
    batch_size=2,
    progress=False,
)


def images(case: str, **changes) -> Tensor:
    return sample(**DEFAULTS | CASES[case] | changes)


def hashes_of_images(case: str) -> dict[str, str]:
    """Hash the images, and every x_t and x0_hat that a callback sees."""
    seen: list[Step] = []
    x_0 = images(case, callback=seen.append)
    assert x_0.isfinite().all(), case
    numbers = [[step.images.start, step.images.stop, step.index, step.t] for step in seen]
    steps = digest(numbers, *(x for step in seen for x in (step.x_t, step.x0_hat)))
    return {"images": digest(x_0), "steps": steps}


# --- what training draws ---


def draws() -> dict[str, str]:
    """Hash the draws of a thousand examples, and the order of three epochs, for runs of several seeds."""
    hashes = {}
    for seed in (0, 7, -1, 2**64 - 1):
        drawn = draw(np.arange(1000), seed, 1000, 0.1)
        hashes[f"examples of seed {seed}"] = digest(drawn.seeds, drawn.t, drawn.null, drawn.flip)
        orders = [epoch_order(length, epoch, seed) for length in (1, 10, 1000) for epoch in (0, 1, 2**32 - 1)]
        hashes[f"epochs of seed {seed}"] = digest(*orders)
    return hashes


def hashes_of_batch(trainer: Trainer) -> dict[str, str]:
    """Hash each part of the trainer's next batch."""
    x_0, labels, drawn, _ = trainer.batch()
    parts = dict(
        index=trainer.index(trainer.examples + np.arange(len(x_0))),
        x_0=x_0,
        labels=labels,
        seeds=drawn.seeds,
        t=drawn.t,
        eps=ops.noise(drawn.seeds, x_0.shape[1:], step=drawn.t, stream=2),
        x_t=ops.q_sample(x_0, drawn.t, drawn.seeds, trainer.task.noising.q_table),
    )
    return {name: digest(part) for name, part in parts.items()}


# --- files ---

EPS_MODEL, V_MODEL, RUN = DATA / "eps.safetensors", DATA / "v.safetensors", DATA / CHECKPOINT
CLASSES = ("circle", "square", "star")
SMALL = dict(in_channels=1, channels=4, channel_mult=(1, 1), blocks=1, attention_levels=(1,), groups=2)
BETAS = [0.01 * (k + 1) for k in range(16)]


def dataset() -> Dataset:
    """Make ten images [1, 8, 8] of three classes."""
    pixels = torch.arange(10 * 64, dtype=torch.int64, device="cpu") * 37 % 256
    labels = torch.arange(10, dtype=torch.int64, device="cpu") % 3
    return Dataset(pixels.to(torch.uint8).reshape(10, 1, 8, 8), labels, CLASSES)


def random_unet(**options) -> UNet:
    """Make a small network without a weight of 0: its output depends on all that it gets."""
    torch.manual_seed(0)
    unet = UNet(**SMALL | options)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet.eval()


def write_models() -> None:
    eps_network = random_unet(num_classes=len(CLASSES))
    save(Model(eps_network, Schedule.linear(), "eps", (1, 8, 8), CLASSES, name="shapes"), EPS_MODEL)
    v_network = random_unet(channel_mult=(1,), attention_levels=(), learned_variance=True, scale_shift=True)
    save(Model(v_network, Schedule.cosine().respace(50), "v", (1, 5, 7)), V_MODEL, dtype=torch.bfloat16)


def write_checkpoint() -> None:
    """Train for three steps of an epoch and a fifth, with one frozen weight and one loss that is not logged yet."""
    config = Config(
        steps=3,
        batch_size=4,
        warmup=2,
        label_dropout=0.5,
        flip=True,
        seed=7,
        log_every=2,
        sample_every=0,
        network=dict(SMALL, channel_mult=(1,), attention_levels=()),
        schedule=Schedule(BETAS).config(),
    )
    model = new_model(dataset(), config, "trained")
    model.network.conv_in.weight.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model, dataset(), config).run(folder, progress=False)
        shutil.copy(Path(folder) / CHECKPOINT, RUN)


EPS_STEPS, V_STEPS = [999, 856, 713, 570, 428, 285, 142], [45, 36, 28, 20, 12, 3, 0]
ROWS = {  # by name: the model that these coefficients sample, and the options of ``sample`` that give them
    "ddim": (EPS_MODEL, dict(sampler="ddim", steps=EPS_STEPS, eta=0.5)),
    "dpmpp_2m": (EPS_MODEL, dict(sampler="dpmpp_2m", steps=EPS_STEPS)),
    "learned": (V_MODEL, dict(sampler="ddpm", steps=V_STEPS)),
}


def rows() -> dict[str, dict[str, list]]:
    """Return the float32 columns of the tables of ROWS as numbers, and the steps t that they visit."""
    linear, cosine = Schedule.linear(), Schedule.cosine().respace(50)
    made = {
        "ddim": (EPS_STEPS, ddim(linear, EPS_STEPS, "eps", 0.5)),
        "dpmpp_2m": (EPS_STEPS, dpmpp_2m(linear, EPS_STEPS, "eps")),
        "learned": (V_STEPS, ddpm(cosine, V_STEPS, "v", "learned")),
    }
    written = {}
    for name, (visited, table) in made.items():
        check_rounding(name, coefficients(table))
        columns = coefficients(table).astype(np.float32).T.tolist()
        names = (*COLUMNS, *(f"k_{j}" for j in range(1, len(columns) - len(COLUMNS) + 1)))
        written[name] = {"t": visited, **dict(zip(names, columns, strict=True))}
    return written


def hashes_of_files() -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (EPS_MODEL, V_MODEL, RUN)}


def files() -> dict[str, dict]:
    write_models()
    write_checkpoint()
    trainer = Trainer.resume(RUN, dataset())
    return {
        "sha256": hashes_of_files(),
        "counters": {"steps": trainer.steps, "examples": trainer.examples, "log": asdict(trainer.unlogged)},
        "batch": hashes_of_batch(trainer),
    }


SECTIONS = {
    "timesteps": timesteps,
    "tables": all_tables,
    "q_tables": q_tables,
    "rows": rows,
    "images": lambda: {case: hashes_of_images(case) for case in CASES},
    "draws": draws,
    "files": files,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write sections of tests/data again.")
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    DATA.mkdir(exist_ok=True)
    known = json.loads(JSON.read_text()) if JSON.exists() else {}
    known |= {name: SECTIONS[name]() for name in parser.parse_args().sections}
    JSON.write_text(json.dumps({name: known[name] for name in SECTIONS if name in known}, indent=1) + "\n")


if __name__ == "__main__":
    main()
