"""Which output, which error and which distribution of t train best? Fashion-MNIST at 16x16, in one table.

    python -m benchmarks.training_choices --out runs/choices --steps 3000

Each choice trains the same U-Net from the same start on the same images with the same noise, so that only the choice
differs. An interrupted run goes on where it was, and more ``--steps`` continue all runs. The table has the mean square
error of eps and of x_0 on 2,000 test images, at the same t with the same noise, and the Frechet distance of 2,000
samples to the training images, in the features of the shipped classifier. It sees 32x32 pixels, so that samples and
real images are enlarged twice.
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from diffkern import ops, sample
from diffkern.data import Dataset, fashion_mnist
from diffkern.evaluate import features, frechet_distance, load_classifier
from diffkern.images import to_pixels
from diffkern.model import Model, load
from diffkern.prediction import head
from diffkern.training import CHECKPOINT, Config, Trainer, new_model

IMAGES = 2000
NETWORK = {"channels": 32, "channel_mult": (1, 2), "attention_levels": (1,), "groups": 8}
PREDICTIONS = ("eps", "x0", "v")
CHOICES: dict[str, dict] = {
    f"{output}, error of {error}": dict(prediction=output, objective=error)
    for output, error in itertools.product(PREDICTIONS, repeat=2)
} | {
    "v, min_snr": dict(prediction="v", objective="min_snr"),
    "v, p2": dict(prediction="v", objective="p2"),
    "v, error of v, t logit-normal": dict(prediction="v", objective="v", times="logit_normal"),
    "v, error of v, cosine": dict(prediction="v", objective="v", schedule={"kind": "cosine", "T": 1000}),
    "v, error of v, EMA .9997": dict(prediction="v", objective="v", ema=0.9997),
}


def small(data: Dataset) -> Dataset:
    """The images at half their size: means of 2x2 pixels."""
    images = F.avg_pool2d(data.images.float(), 2).round().to(torch.uint8)
    return Dataset(images, data.labels, data.classes)


def train(name: str, out: Path, data: Dataset, steps: int) -> None:
    """Take the choice's run to ``steps`` steps."""
    config = Config(
        **CHOICES[name],
        steps=steps,
        lr=4e-4,
        network=NETWORK,
        checkpoint_every=500,
        sample_every=0,
    )
    file = out / CHECKPOINT
    trainer = (
        Trainer.resume(file, data, steps=steps) if file.exists() else Trainer(new_model(data, config), data, config)
    )
    if trainer.run(out) is not None:  # a signal ended it
        raise SystemExit(1)


@torch.no_grad()
def errors(model: Model, data: Dataset) -> tuple[float, float]:
    """Mean square errors of eps and of x_0 on the first ``IMAGES`` images, at t spread evenly over 0..T-1."""
    T, eps, x0 = model.schedule.T, 0.0, 0.0
    table = model.schedule.q_table()
    alpha, sigma = model.schedule.alpha_bar.sqrt().numpy(), model.schedule.one_minus_alpha_bar.sqrt().numpy()
    p_x, p_o = (torch.from_numpy(p) for p in head(model.prediction, alpha, sigma))
    weight = torch.from_numpy((alpha / sigma) ** 2)
    for index in torch.arange(IMAGES).split(100):
        x_0, t = data.x_0(index), index * 7919 % T
        x_t = ops.q_sample(x_0, t, index, table)
        out = model(x_t, t, data.labels[index]).double()
        each = lambda values: values[t].view(-1, 1, 1, 1)  # noqa: B023, E731
        squares = (each(p_x) * x_t + each(p_o) * out - x_0).square().mean((1, 2, 3))
        x0 += squares.sum().item() / IMAGES
        eps += (weight[t] * squares).sum().item() / IMAGES
    return eps, x0


def distance(model: Model, real: Tensor) -> float:
    """Frechet distance of ``IMAGES`` samples, the classes in turn, to the features of real images."""
    drawn = sample(model, IMAGES, sampler="unipc", steps=20, progress=False)
    return frechet_distance(real, seen(to_pixels(drawn)))


def seen(pixels: Tensor) -> Tensor:
    """The classifier's features of uint8 images [K, 1, 16, 16]."""
    net, _ = load_classifier()
    return features(net, pixels.repeat_interleave(2, 2).repeat_interleave(2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--choices", nargs="*", default=list(CHOICES), choices=CHOICES, metavar="NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data, test = (small(fashion_mnist(split=split)) for split in ("train", "test"))
    folders = {name: arguments.out / name.replace(" ", "-").replace(",", "") for name in arguments.choices}
    if not arguments.table:
        for name, folder in folders.items():
            train(name, folder, data, arguments.steps)
    real = seen(data.images)
    print(f"{arguments.steps} steps of 64 images; {IMAGES} images each\n")
    print("| network's output, loss | error of eps | error of x_0 | Frechet distance |\n| --- | ---: | ---: | ---: |")
    for name, folder in folders.items():
        if not (folder / CHECKPOINT).exists():
            continue
        model = load(folder)
        eps, x0 = errors(model, test)
        print(f"| {name} | {eps:.4f} | {x0:.4f} | {distance(model, real):.2f} |", flush=True)
    print(f"| test images | | | {frechet_distance(real, seen(test.images[:IMAGES])):.2f} |")


if __name__ == "__main__":
    main()
