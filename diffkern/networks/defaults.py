"""Modules that are the same whatever torch's default dtype and device are."""

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {torch.empty, torch.ones, torch.tensor, torch.zeros}
"""The functions by which the layers of torch.nn make their parameters and buffers."""


class float32_on(TorchFunctionMode):
    """A context in which layers have float32 parameters on ``device``, in this thread alone."""

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in FACTORIES:
            if kwargs.get("device") is None:
                kwargs["device"] = self.device
            if kwargs.get("dtype") is None and func is not torch.tensor:
                kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)
