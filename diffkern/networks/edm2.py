"""The magnitude-preserving U-Net of Karras et al. 2024 (EDM2, figure 21, config G), for inference.

Its training network normalizes and scales the weights at every call. Here they are stored so: convolutions as usual.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .blocks import Conv3x3
from .ncsnpp import resample

LARGEST = 256.0  # of a block's output: larger values are clipped


def mp_silu(x: Tensor) -> Tensor:
    """Equation 81."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Equation 88: a and b in the proportion 1 - t to t."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Equation 103, for equal parts: channels side by side, each side with the same weight whatever its width."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / 2)
    return torch.cat((scale / math.sqrt(n_a) * a, scale / math.sqrt(n_b) * b), dim=1)


def pixel_norm(x: Tensor, dim: int) -> Tensor:
    """Scale vectors along ``dim`` to a mean square of 1 (equation 30)."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / (1e-4 + norm / math.sqrt(x.shape[dim]))


class Block(nn.Module):
    """A residual block of the way down ("enc") or up, with attention behind it if ``heads`` is not 0."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, *, enc: bool, heads: int = 0, mode: str | None = None):
        super().__init__()
        self.enc, self.heads, self.mode = enc, heads, mode
        self.conv0 = Conv3x3(c_out if enc else c_in, c_out, 3, padding=1, bias=False)
        self.emb = nn.Linear(emb_dim, c_out, bias=False)
        self.conv1 = Conv3x3(c_out, c_out, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else None
        if heads:
            self.qkv = nn.Conv2d(c_out, 3 * c_out, 1, bias=False)
            self.proj = nn.Conv2d(c_out, c_out, 1, bias=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.mode is not None:
            x = resample(x, (1, 1), self.mode == "up")
        if self.enc:
            x = pixel_norm(x if self.skip is None else self.skip(x), dim=1)
        y = self.conv0(mp_silu(x))
        y = self.conv1(mp_silu(y * (1 + self.emb(emb))[:, :, None, None]))
        if not self.enc and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, y, 0.3)
        if self.heads:
            x = mp_sum(x, self.attend(x), 0.3)
        return x.clamp(-LARGEST, LARGEST)

    def attend(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(x).view(n, self.heads, c // self.heads, 3, h * w)
        q, k, v = pixel_norm(qkv, dim=2).permute(3, 0, 1, 4, 2)  # [N, heads, H W, d]
        out = ops.attention(q, k, v)
        return self.proj(out.transpose(2, 3).reshape(n, c, h, w))


class EDM2UNet(nn.Module):
    """Predicts F of EDM's x0_hat = c_skip x + c_out F, from c_in x and ln(sigma) / 4.

    in_channels            of the image
    channels, channel_mult width of the first level, and each level's multiple of it; a level halves H and W
    blocks                 residual blocks a level (one more on the way up)
    attention_levels       levels with self-attention
    head_dim               channels a head
    num_classes            class-conditional: labels 0..num_classes-1, and -1 or None for the null class
    noise_channels         of the Fourier features
    embedding_channels     of what conditions the blocks
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention_levels: Sequence[int] = (2, 3),
        head_dim: int = 64,
        num_classes: int | None = None,
        noise_channels: int = 192,
        embedding_channels: int = 768,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        for name in ("channel_mult", "attention_levels"):
            self.config[name] = tuple(self.config[name])
        emb_dim, widths, last = embedding_channels, [channels * m for m in channel_mult], len(channel_mult) - 1

        def block(c_in: int, c_out: int, enc: bool, attention: bool = False, mode: str | None = None) -> Block:
            return Block(c_in, c_out, emb_dim, enc=enc, heads=c_out // head_dim if attention else 0, mode=mode)

        self.register_buffer("freqs", torch.zeros(noise_channels, dtype=torch.float32, device="cpu"))
        self.register_buffer("phases", torch.zeros(noise_channels, dtype=torch.float32, device="cpu"))
        self.emb_noise = nn.Linear(noise_channels, emb_dim, bias=False)
        self.num_classes, self.null_class = num_classes, True
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, emb_dim)  # the last row is the null class
        self.conv_in = Conv3x3(in_channels + 1, widths[0], 3, padding=1, bias=False)
        self.enc, self.dec = nn.ModuleList(), nn.ModuleList()
        skips, c = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            if level > 0:
                self.enc.append(block(c, c, True, mode="down"))
                skips.append(c)
            for _ in range(blocks):
                self.enc.append(block(c, width, True, level in attention_levels))
                c = width
                skips.append(c)
        self.mid = nn.ModuleList([block(c, c, False, attention=True), block(c, c, False)])
        for level in range(last, -1, -1):
            if level < last:
                self.dec.append(block(c, c, False, mode="up"))
            for _ in range(blocks + 1):
                self.dec.append(block(c + skips.pop(), widths[level], False, level in attention_levels))
                c = widths[level]
        self.conv_out = Conv3x3(c, in_channels, 3, padding=1, bias=False)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t: [N, C, H, W]; t: [N] float; labels: [N] int64, -1 for the null class, or None."""
        emb = self.embed(t, labels)
        x = self.conv_in(torch.cat((x_t, torch.ones_like(x_t[:, :1])), dim=1))
        skips = [x]
        for block in self.enc:
            x = block(x, emb)
            skips.append(x)
        for block in self.mid:
            x = block(x, emb)
        for block in self.dec:
            x = block(x if block.mode else mp_cat(x, skips.pop()), emb)
        return self.conv_out(x)

    def embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the embedding of t and labels that conditions the blocks: [N, embedding_channels]."""
        t = t.to(self.freqs.dtype)
        emb = self.emb_noise(math.sqrt(2) * (t[:, None] * self.freqs + self.phases).cos())
        if self.config["num_classes"] is not None:
            labels = torch.full_like(t, -1, dtype=torch.int64) if labels is None else labels
            emb = mp_sum(emb, self.class_embedding(torch.where(labels == -1, self.config["num_classes"], labels)), 0.5)
        return mp_silu(emb)
