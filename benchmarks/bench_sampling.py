"""Whole sampling: DDIM from the same x_T with the same weights, against a plain loop and diffusers' pipeline."""

import bench_unet
import peers
import torch

from diffkern import sample
from diffkern.schedule import Schedule
from diffkern.unet import UNet

STEPS, IMAGES = 50, 16


def test_sampling(compare, monkeypatch):
    config = bench_unet.NETWORKS["small"]
    unet, schedule = bench_unet.with_random_weights(UNet(**config)), Schedule.linear()
    twin = peers.diffusers_unet(unet)
    x_T = torch.randn(IMAGES, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def ours() -> torch.Tensor:
        return sample(
            unet,
            sampler="ddim",
            steps=STEPS,
            x_T=x_T,
            n=IMAGES,
            schedule=schedule,
            prediction="eps",
            shape=(1, 32, 32),
            progress=False,
        )

    compare(
        f"sampling, DDIM {STEPS} steps, {IMAGES} x 32x32",
        ours,
        {
            "torch loop": peers.torch_ddim(peers.noise_of(twin), schedule, schedule.timesteps(STEPS, "trailing"), x_T),
            "diffusers pipeline": peers.diffusers_ddim(twin, STEPS, x_T, monkeypatch),
        },
        tolerance=2e-3,
    )
