"""Is a network what it was when something was made of it?"""

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C


class Watch:
    """A network's modules and weights, as they were when this was made. It holds their tables, never the network."""

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        self.kinds = {type(module) for module in modules}
        self._tables = [module.__dict__ for module in modules]
        self._owners = [table[kind] for table in self._tables for kind in ("_modules", "_parameters")]
        self._members = self._find_members()
        self.weights = [member for member in self._members if isinstance(member, nn.Parameter)]
        self._counted = [weight for weight in self.weights if not weight.is_inference()]  # those have no version
        self._addresses, self._versions = self._find_addresses(), self._find_versions()
        self.native = bool(self.weights) and all(map(_native, self.weights))
        self._hash = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._hashing = {exact: self._record(exact) for exact in (False, True)} if self.native else {}
        self._seen = {exact: self._look(exact) for exact in (False, True)}

    def changed(self, exact: bool = False) -> bool:
        """Did a module, a weight or its numbers?

        torch counts what it writes to a weight. Fused optimisers, ``.data`` and NumPy write behind its back: hence the
        numbers themselves, all of them if exact, else 16 of each weight.
        """
        if self.changed_members() or self._find_addresses() != self._addresses:
            return True
        if self._find_versions() != self._versions:
            return True
        return self._look(exact) != self._seen[exact]

    def changed_members(self) -> bool:
        """Did a module or a weight give way to another?"""
        members = self._find_members()
        return len(members) != len(self._members) or any(map(operator.is_not, members, self._members))

    def does_as_written(self) -> bool:
        """Are there no hooks, nor a ``forward`` that is not the class's?"""
        return not any(
            table["_forward_hooks"] or table["_forward_pre_hooks"] or "forward" in table for table in self._tables
        )

    def _find_members(self) -> list[Any]:
        return [*itertools.chain.from_iterable(map(dict.values, self._owners))]

    def _find_addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.weights))

    def _record(self, exact: bool) -> _C.Program:
        """Record a look at the weights: to run it again converts no list of them."""
        program = _C.Program()
        with program:
            torch.ops.diffkern.fingerprint(self._hash, self.weights, exact)
        return program

    def _find_versions(self) -> list[int]:
        return [weight._version for weight in self._counted]

    def _look(self, exact: bool) -> int:
        if not self.native:
            return 0
        self._hashing[exact].run()
        return int(self._hash)


def _native(weight: nn.Parameter) -> bool:
    """Is it float32 on the CPU, in one piece?"""
    if type(weight) is not nn.Parameter:  # a subclass may hold its numbers elsewhere
        return False
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.layout != torch.strided:
        return False
    return torch.ops.aten.is_non_overlapping_and_dense(weight) and weight.untyped_storage().nbytes() >= weight.nbytes
