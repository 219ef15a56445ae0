"""How many bits a dimension does a small Glow need for Fashion-MNIST? At 8x8 or 16x16, beside the best Gaussian.

    python -m benchmarks.flow_bits --out runs/glow --size 8 --steps 3000

The Gaussian has the mean and the full covariance of the dequantized training images: what a flow of linear layers can
reach. Both are measured on the 10,000 test images with the same noise within the levels. An interrupted run goes on
where it was, and more ``--steps`` continue it.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from diffkern import flows
from diffkern.data import Dataset, fashion_mnist
from diffkern.flows.flow import bits_of
from diffkern.likelihood.draws import dequantized
from diffkern.training import CHECKPOINT, Config, Trainer

from .training_choices import small

HALVINGS = {16: 1, 8: 2}  # of 32x32
LEVELS = 256


def images(split: str, size: int) -> Dataset:
    data = fashion_mnist(split=split)
    for _ in range(HALVINGS[size]):
        data = small(data)
    return data


def train(out: Path, data: Dataset, steps: int) -> None:
    """Take the run to ``steps`` steps."""
    config = Config(steps=steps, batch_size=64, lr=2e-3, lr_schedule="cosine", warmup=100, sample_every=0)
    file = out / CHECKPOINT
    if file.exists():
        trainer = Trainer.resume(file, data, steps=steps)
    else:
        trainer = Trainer(flows.Glow(data.shape, levels=2, steps=4, width=64), data, config)
    if trainer.run(out) is not None:  # a signal ended it
        raise SystemExit(1)


def gaussian_bits(data: Dataset, test: Tensor) -> Tensor:
    """Bits a dimension [N] of test images by the Gaussian of the training images; each image has a seed of its own."""
    x, y = (
        dequantized(images, torch.arange(len(images)), LEVELS).flatten(1) for images in (data.x_0(slice(None)), test)
    )
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    return bits_of(gaussian.log_prob(y), data.shape, LEVELS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=8, choices=HALVINGS)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data, test = (images(split, arguments.size) for split in ("train", "test"))
    train(arguments.out, data, arguments.steps)
    flow, x = flows.load(arguments.out), test.x_0(slice(None))
    found = {"Gaussian": gaussian_bits(data, x), "Glow": flow.bits(x, LEVELS, batch_size=500)}
    print(f"{arguments.steps} steps of 64 images of {arguments.size}x{arguments.size}; "
          f"{sum(p.numel() for p in flow.parameters()):,} parameters\n")  # fmt: skip
    print("| model | bits a dimension | standard error |\n| --- | ---: | ---: |")
    for name, bits in found.items():
        print(f"| {name} | {bits.mean().item():.3f} | {bits.std().item() / len(bits) ** 0.5:.3f} |")


if __name__ == "__main__":
    main()
