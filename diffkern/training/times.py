"""How t is drawn: a function of a counter-based word for each example, so that a resumed run draws the same."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..process import Process, checked_count, checked_float


def uniforms(words: NDArray) -> NDArray:
    """The middles of 2^32 equal parts of [0, 1]: words [N], uint64 below 2^32 -> float64 [N]."""
    return (np.asarray(words, np.uint64).astype(np.float64) + 0.5) * 2.0**-32


def _normals(words: NDArray) -> NDArray:
    return torch.special.ndtri(torch.from_numpy(uniforms(words))).numpy()


@dataclass(frozen=True)
class Uniform:
    """t uniform on [low, high]; of T steps each with the same probability. 0 is t_min of a process, 1 its t_max."""

    low: float = 0.0
    high: float = 1.0

    def __call__(self, words: NDArray) -> NDArray:
        return self.low + (self.high - self.low) * uniforms(words)


@dataclass(frozen=True)
class LogitNormal:
    """ln(t / (1 - t)) ~ N(mean, std^2): t in (0, 1), from t_min to t_max (Esser et al. 2024, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, words: NDArray) -> NDArray:
        return 1 / (1 + np.exp(-(self.mean + self.std * _normals(words))))


@dataclass(frozen=True)
class LogNormal:
    """ln(sigma / alpha) ~ N(mean, std^2): sigma of EDM, where it is t itself (Karras et al. 2022, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, words: NDArray) -> NDArray:
        return np.exp(self.mean + self.std * _normals(words))


Times = Uniform | LogitNormal | LogNormal

TIMES: dict[str, type[Times]] = {"uniform": Uniform, "logit_normal": LogitNormal, "log_normal": LogNormal}
"""How t is drawn, by name."""


def at(times: Times, words: NDArray, process: Process) -> NDArray:
    """Real times of a process, float64 [N]."""
    drawn = times(words)
    if isinstance(times, LogNormal):
        return np.array([process.time(-lam) for lam in np.log(drawn).tolist()])
    return process.t_min + (process.t_max - process.t_min) * drawn


def steps(times: Times, words: NDArray, T: int) -> Tensor:
    """0-based steps [N] of a schedule of T: the floor of T t, by integers where t is uniform on [0, 1]. int64.

    Raises ValueError for times that are no part of a schedule.
    """
    if isinstance(times, LogNormal):
        raise ValueError(f"times: expected t in [0, 1], got {times}")
    if times == Uniform():
        t = np.asarray(words, np.uint64) * np.uint64(T) >> np.uint64(32)
    else:
        t = np.clip(np.floor(T * times(words)), 0, T - 1)
    return torch.from_numpy(t.astype(np.int64))


class Importance:
    """Draw steps by how much the bound's terms vary (Nichol & Dhariwal 2021, section 3.3).

    p_t is proportional to sqrt(E L_t^2) over the last terms of each step, mixed with ``uniform``; uniform until each
    step has as many as ``length``. A loss is weighted by 1 / (T p_t), so that its mean stays what it was.

    ``tensors()`` is the state that a checkpoint holds: the terms and how many came, which :meth:`update` changes.
    """

    def __init__(self, T: int, length: int = 10, uniform: float = 0.001):
        self.T, self.length = checked_count("T", T), checked_count("length", length)
        self.uniform = checked_float("uniform", uniform, "a number in [0, 1]", lambda value: 0 <= value <= 1)
        self.history = torch.zeros(
            T, length, dtype=torch.float64, device="cpu"
        )  # of step t, the k-th term is in column k % length
        self.counts = torch.zeros(T, dtype=torch.int64, device="cpu")

    def tensors(self) -> dict[str, Tensor]:
        return {"history": self.history, "counts": self.counts}

    def probabilities(self) -> NDArray:
        """p_t, float64 [T]."""
        if (self.counts < self.length).any():
            return np.full(self.T, 1 / self.T)
        p = self.history.square().mean(1).sqrt().numpy()
        total = p.sum()
        p = p / total if total > 0 else np.full(self.T, 1 / self.T)
        return (1 - self.uniform) * p + self.uniform / self.T

    def __call__(self, words: NDArray) -> tuple[Tensor, Tensor]:
        """The steps int64 [N] of these words, and the weights 1 / (T p_t), float32 [N]."""
        p = self.probabilities()
        cumulative = np.cumsum(p)
        t = np.searchsorted(cumulative, uniforms(words) * cumulative[-1], side="right").clip(max=self.T - 1)
        return torch.from_numpy(t), torch.from_numpy(1 / (self.T * p[t])).float()

    def update(self, t: Tensor, terms: Tensor) -> None:
        """Take in the bound's terms [N] of steps [N]: of all processes, in the order of the examples."""
        for step, term in zip(t.tolist(), terms.detach().double().tolist(), strict=True):
            self.history[step, self.counts[step] % self.length] = term
            self.counts[step] += 1
