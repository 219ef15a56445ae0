"""A network of vectors: a residual MLP that knows t, as the prior of unCLIP is one."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..process import checked_count
from .blocks import TimestepEmbedding, timestep_embedding
from .conditioning import check_conditions, checked_conditions, condition_embeddings, embedded

SINUSOIDS = 128  # of t


class ResidualMLP(nn.Module):
    """Predicts eps, x_0 or another of a vector x_t [N, features], given t and conditions.

    features    of a sample
    width       of the residual stream; a block is twice as wide within
    blocks      layer norm, linear, SiLU, linear, each added to what it got
    conditions  numbers and vectors, as those of :class:`UNet`

    ``config`` holds the options. Raises TypeError or ValueError for those of which none can be made.
    """

    num_classes, null_class = None, True

    def __init__(
        self,
        features: int,
        *,
        width: int = 512,
        blocks: int = 4,
        conditions: Mapping[str, Sequence[int]] | None = None,
    ):
        super().__init__()
        sizes = dict(features=features, width=width, blocks=blocks)
        shapes = checked_conditions(conditions)
        self.config: dict[str, Any] = {name: checked_count(name, size) for name, size in sizes.items()}
        self.config["conditions"] = shapes
        if any(len(shape) > 1 for shape in shapes.values()):
            raise ValueError(f"conditions: expected numbers and vectors, got {shapes}")
        self.read = nn.Linear(features, width)
        self.time_embedding = TimestepEmbedding(SINUSOIDS, width)
        self.condition_embeddings = condition_embeddings(shapes, SINUSOIDS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm, self.write = nn.LayerNorm(width), nn.Linear(width, features)

    def forward(self, x_t: Tensor, t: Tensor, labels: None = None, **conditions: Tensor) -> Tensor:
        """x_t: [N, features]; t: [N]; conditions: [N, *shape] by name. Returns [N, features]."""
        if labels is not None:
            raise ValueError("labels: expected None, this network has no classes")
        check_conditions(conditions, self.config["conditions"], len(x_t))
        dtype = self.read.weight.dtype
        emb = self.time_embedding(timestep_embedding(t, SINUSOIDS).to(dtype))
        emb = emb + embedded(self.condition_embeddings, conditions, SINUSOIDS, dtype)
        x = self.read(x_t)
        for block in self.blocks:
            x = x + block(x + emb)
        return self.write(self.norm(x))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.linear_1, self.linear_2 = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(self.norm(x))))
