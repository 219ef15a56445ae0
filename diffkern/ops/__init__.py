"""The ops: what a user calls, their shapes for the compiler, and their gradients.

Each op has a kernel for the CPU and for CUDA (``csrc/``), and a file here of the same name. The file holds the public
function, its fake, its gradient, its ``composite`` and its ``reference``, all with one signature. The composite is made
of torch's own ops: it runs in ``diffkern.torch_ops()``, in a transform of ``torch.func``, and for tensors with a
tangent (``transforms.py``). :mod:`diffkern.reference` gathers the references. The file's ``examples`` are small calls
(``example.py``): the doctor and the tests of all ops read them, and have no lists of ops of their own.

Noise is addressed, never drawn from a state: the seed of a sample, a step and a stream name it, and with them come the
same bits on any device, in any batch, on any number of threads (``docs/noise.md``).

Elementwise ops take float32, bfloat16 and float16 tensors of any strides, compute in float32 and round once.
Shapes are ``[N, ...]``: N samples of any shape, images as a rule. Errors name the argument, what was expected and
what came: RuntimeError for shapes, dtypes, devices and indices, TypeError and ValueError for options.
"""

from . import fingerprint, flops  # noqa: F401  registers the former's shapes
from .abs_quantile import abs_quantile
from .attention import attention
from .conv2d import PackedConv, conv2d, expand_taps, pack_conv, pack_taps, pack_upsampling
from .conv3x3 import conv3x3
from .diffusion_loss import LOSS_COLUMNS, diffusion_loss
from .group_norm_silu import group_norm_silu
from .moments import moments
from .noise import noise
from .noise_loss import noise_loss
from .q_sample import q_sample, q_sample_
from .reverse_step import reverse_step, reverse_step_
from .row import COLUMNS, LONG_COLUMNS, MAX_HISTORY, has_long_rows, long_columns
from .seeds import Seeds, as_seeds

flops.register()

__all__ = [
    "COLUMNS",
    "LONG_COLUMNS",
    "LOSS_COLUMNS",
    "MAX_HISTORY",
    "PackedConv",
    "Seeds",
    "abs_quantile",
    "as_seeds",
    "attention",
    "conv2d",
    "conv3x3",
    "diffusion_loss",
    "expand_taps",
    "group_norm_silu",
    "has_long_rows",
    "long_columns",
    "moments",
    "noise",
    "noise_loss",
    "pack_conv",
    "pack_taps",
    "pack_upsampling",
    "q_sample",
    "q_sample_",
    "reverse_step",
    "reverse_step_",
]
