"""A convolution's weight as a kernel reads it."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class PackedConv:
    """The weight [out_channels, in_channels, kernel, kernel] of ``ops.conv2d``, by one of ``ops.pack_*``.

    The tensor's layout belongs to the kernels. Its blocks have zeros behind the last channels, so that it cannot tell
    the counts.
    """

    tensor: Tensor = dataclasses.field(repr=False)
    in_channels: int
    out_channels: int
    kernel: int
