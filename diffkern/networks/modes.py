"""Eval mode on loan: a module has its training flag back when the last one who runs it has left."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Borrower = tuple[int, object]  # the thread, and one of its calls


@dataclass(eq=False)
class _Loan:
    module: nn.Module
    training: bool  # the flag to give back
    borrowers: set[Borrower] = field(default_factory=set)


_lock = threading.Lock()
_loans: dict[int, _Loan] = {}  # by the id of the module, which a loan keeps alive


@contextlib.contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Eval mode for every module of ``network``; nothing for what is no module.

    Calls may overlap, in one thread or in several, on the same network or on parts of it. When the last of them ends,
    every module has the flag that it had before the first, or True if ``train()`` was called meanwhile. Until then
    every thread sees ``training=False``, one that trains the same network too.
    """
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    borrower = threading.get_ident(), object()
    try:
        with _lock:
            for module in modules:
                loan = _loans.setdefault(id(module), _Loan(module, module.training))
                loan.training |= module.training
                loan.borrowers.add(borrower)
                module.training = False
        yield
    finally:
        with _lock:
            for module in modules:
                _give_back(module, {borrower})


def _give_back(module: nn.Module, borrowers: set[Borrower]) -> None:
    loan = _loans.get(id(module))
    if loan is None:
        return
    loan.borrowers -= borrowers
    if not loan.borrowers:
        module.training |= loan.training
        del _loans[id(module)]


def _after_fork() -> None:
    """The child has the thread that forked alone: the others never come back to end their loans."""
    global _lock
    _lock = threading.Lock()
    for loan in list(_loans.values()):
        _give_back(loan.module, {one for one in loan.borrowers if one[0] != threading.get_ident()})


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
