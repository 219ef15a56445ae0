"""Networks without memory: what they would hold is known, and nothing is made."""

import torch
from torch.overrides import TorchFunctionMode


class Blueprint(TorchFunctionMode):
    """Within, networks are made on the meta device: no memory, no initial values, nothing drawn from a generator.

    One mode for both. ``torch.device("meta")`` alone initializes too, for which torch loads its compiler (seconds).
    """

    MADE = frozenset((torch.empty, torch.ones, torch.tensor, torch.zeros))
    SKIPPED = frozenset(("fill_", "kaiming_uniform_", "normal_", "uniform_", "zero_"))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]  # torch.nn.init's name for it
        if func in self.MADE:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
