"""Programs: a sampler, written as in its paper, run once without data to get rows of coefficients for one kernel.

A sampler is a function ``(m, grid, **options) -> m.program(x)``. What it computes with are *forms*, linear combinations
of the state, of earlier predictions and of addressed noises; so every step of every sampler is a row

    x0_hat = p_x x + p_o out                                           clamped
    x_next = k_x x + k_o out + k_u out_uncond + k_0 x0_hat + sum_j k_j slot_j + sigma (z + z' + ..)
    kept   = q_x x + q_o out + q_0 x0_hat                              into one of the slots

of ``ops.reverse_step``. :class:`Trace` finds the rows. :class:`Direct` runs the same function on tensors, step by step.

One state is enough. Where the network is called on X' = a X + rest, a later use of X is (X' - rest) / a: the
intermediate states that a paper keeps cost no memory, and a noise before a call is the noise of the row before it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from .ops.row import LONG_COLUMNS, long_columns
from .prediction import head_at
from .process import Grid, Point

FIRST_VISIT = 1 << 20  # below are the addresses of a step's first noise
HALVES = 1 << 31  # the first of the addresses of half steps


# --- what a sampler's symbols are ---


@dataclass(frozen=True)
class X0:
    """The x0_hat that the call in that row gives."""

    row: int


@dataclass(frozen=True)
class Uncond:
    """The network's output without its condition, in the call of that row."""

    row: int


@dataclass(frozen=True)
class Kept:
    """The tensor that the sampler kept in that row."""

    row: int


@dataclass(frozen=True)
class Noise:
    """The sum of ``count`` standard normals at descending addresses, over sqrt(count)."""

    address: int
    count: int
    log_var: tuple[float, float] | None = None  # times the standard deviation that the network predicts between these
    correlated: bool = False  # by what the network predicts beside it (covariance.py)


STATE = "x"  # what the latest call got
Coefficients = dict[Any, float]


def _combine(*parts: tuple[float, Coefficients]) -> Coefficients:
    """The sum of the parts, each times its number. What cancels but for rounding is 0: it must not cost a slot."""
    total: Coefficients = {}
    for factor, coefficients in parts:
        for symbol, value in coefficients.items():
            before, added = total.get(symbol, 0.0), factor * value
            after = before + added
            total[symbol] = 0.0 if abs(after) < 1e-13 * max(abs(before), abs(added)) else after
    return {symbol: value for symbol, value in total.items() if value != 0}


class Form:
    """A linear combination of the state, predictions and noises, which follows the state from call to call."""

    def __init__(self, trace: "Trace", coefficients: Coefficients):
        self.trace, self.epoch, self.coefficients = trace, len(trace.states), coefficients

    def now(self) -> Coefficients:
        """The coefficients over the present state: the one before it was x = (state - rest) / k_x."""
        for k_x, rest in self.trace.states[self.epoch :]:
            of_x = self.coefficients.get(STATE, 0.0)
            if of_x != 0:
                if k_x == 0:
                    raise ValueError("sampler: expected m.keep(x) for a state that the next one does not contain")
                others = {symbol: value for symbol, value in self.coefficients.items() if symbol != STATE}
                self.coefficients = _combine((1.0, others), (of_x / k_x, {STATE: 1.0}), (-of_x / k_x, rest))
        self.epoch = len(self.trace.states)
        return self.coefficients

    def becomes_state(self) -> None:
        self.coefficients, self.epoch = {STATE: 1.0}, len(self.trace.states)

    def __add__(self, other: "Form") -> "Form":
        if not isinstance(other, Form):
            _refuse(f"a sum with a {type(other).__name__}")
        return Form(self.trace, _combine((1.0, self.now()), (1.0, other.now())))

    def __sub__(self, other: "Form") -> "Form":
        if not isinstance(other, Form):
            _refuse(f"a difference from a {type(other).__name__}")
        return Form(self.trace, _combine((1.0, self.now()), (-1.0, other.now())))

    def __mul__(self, factor: float) -> "Form":
        if isinstance(factor, Form):
            _refuse("a product of two")
        return Form(self.trace, _combine((float(factor), self.now())))

    def __truediv__(self, divisor: float) -> "Form":
        if isinstance(divisor, Form):
            _refuse("a quotient of two")
        return Form(self.trace, {symbol: value / divisor for symbol, value in self.now().items()})

    def _is_not_linear(self, *_: Any) -> NoReturn:
        _refuse("a power, a reciprocal or a comparison")

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *_: Any) -> NoReturn:
        _refuse(f"torch's {getattr(function, '__name__', function)}")

    def __neg__(self) -> "Form":
        return self * -1.0

    __rmul__, __radd__, __rsub__ = __mul__, __add__, __sub__
    __pow__ = __rpow__ = __rtruediv__ = __abs__ = _is_not_linear
    __lt__ = __le__ = __gt__ = __ge__ = _is_not_linear


def _refuse(got: str) -> NoReturn:
    raise TypeError(f"sampler: expected sums and multiples of the state and the network's outputs, got {got}")


# --- the two ways to run a sampler ---


class Sampling(ABC):
    """The interface for samplers: ``m(x, s)`` is x0_hat, ``m.eps(x, s)`` the noise, ``m.z(s, t)`` a step's noise."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.at_step_start, self.begins = False, True
        self._visits: dict[int, int] = {}

    def steps(self) -> Iterator[tuple[Point, Point]]:
        """(s, t) of each step of the grid. The first call in a step is on what the step before has reached."""
        for s, t in self.grid.steps:
            self.at_step_start = self.begins = True
            yield s, t

    @abstractmethod
    def predict(self, x: Any, s: Point) -> tuple[Any, Any]:
        """Call the network on x at s: (x0_hat, eps = (x - alpha x0_hat) / sigma)."""

    def __call__(self, x: Any, s: Point) -> Any:
        return self.predict(x, s)[0]

    def eps(self, x: Any, s: Point) -> Any:
        return self.predict(x, s)[1]

    def z(
        self,
        s: Point,
        t: Point | None = None,
        *,
        log_var: tuple[float, float] | None = None,
        correlated: bool = False,
    ) -> Any:
        """Standard normals: the noise of the step from s to t, new at each visit; without t it is never a path's.

        log_var     of a learned variance: times exp(log_var / 2), which the network predicts between these two
        correlated  and with the correlations that it predicts, of samples [N, D]
        """
        learned = log_var, correlated
        if self.grid.path and t is not None:
            return self.noise(Noise(s.address, s.address - t.address if s.address > t.address else 1, *learned))
        visit = self._visits[s.address] = self._visits.get(s.address, 0 if self.grid.path else -1) + 1
        return self.noise(Noise(s.address + (visit * FIRST_VISIT), 1, *learned))

    def z_halves(self, s: Point) -> tuple[Any, Any]:
        """The standard normals of the two halves of the step that leaves s. That of the step is their sum / sqrt(2)."""
        first = HALVES + 2 * s.address + 1
        return self.noise(Noise(first, 1)), self.noise(Noise(first - 1, 1))

    @abstractmethod
    def noise(self, address: Noise) -> Any:
        """The standard normals at an address."""

    def reach(self, x: Any, t: Point) -> Any:
        """Say that x is at the grid's point t, where constraints apply: :meth:`steps` does, once a step."""
        return x


class Direct(Sampling):
    """A sampler on tensors or arrays, call by call, as its paper says it: what its program is held against.

    denoise  (x, s) -> x0_hat at the point s
    noise    (address, count) -> standard normals like x
    x_T      the start
    """

    def __init__(self, grid: Grid, denoise: Callable[[Any, Point], Any], noise: Callable[[int, int], Any], x_T: Any):
        super().__init__(grid)
        self.denoise, self.noise_at, self.x_T = denoise, noise, x_T

    def start(self) -> Any:
        return self.x_T

    def predict(self, x, s):
        x0 = self.denoise(x, s)
        return x0, (x - x0 * s.alpha) / s.sigma if s.sigma > 0 else None

    def noise(self, address):
        if address.log_var is not None:
            raise ValueError("variance: expected a fixed one, got a learned one, which Direct has no network for")
        return self.noise_at(address.address, address.count)

    def keep(self, x: Any) -> Any:
        return x

    def program(self, x: Any) -> Any:
        return x


@dataclass
class Row:
    """One row of a program: a network call, unless ``point`` is None, and the update that follows."""

    point: Point | None
    p_x: float = 0.0
    p_o: float = 0.0
    k_x: float = 1.0
    k_o: float = 0.0
    k_u: float = 0.0
    k_0: float = 0.0
    slots: dict[Any, float] = field(default_factory=dict)  # by slot; while traced by symbol
    sigma: float = 0.0  # of each of the noise's normals
    noise: Noise | None = None
    q: tuple[float, float, float] = (0.0, 0.0, 0.0)  # q_x, q_o, q_0 of what is kept
    keep: int | None = None  # the slot that it goes to
    begins: bool = False  # whether the call is a step's first
    reached: Point | None = None  # the grid's point that x is at after the row; None within a step


class Trace(Sampling):
    """A sampler on forms: records its rows.

    prediction  what the network's output is
    plus_plus   take the noise of :meth:`Sampling.eps` from the output without the condition (CFG++, Chung et al. 2024)
    """

    def __init__(self, grid: Grid, prediction: str = "x0", *, plus_plus: bool = False):
        super().__init__(grid)
        self.prediction, self.plus_plus = prediction, plus_plus
        self.rows: list[Row] = []
        self.open = False  # whether the last row has made its call and not yet its update
        self.states: list[tuple[float, Coefficients]] = []  # of each update: k_x, and the rest
        self.kept: dict[Kept, tuple[float, float, float]] = {}

    def start(self) -> Form:
        return Form(self, {STATE: 1.0})

    def noise(self, address):
        return Form(self, {address: 1.0})

    def predict(self, x, s):
        self._update(x, s if self.at_step_start else None)
        begins, self.begins, self.at_step_start = self.begins, False, False
        row = len(self.rows)
        p_x, p_o = head_at(self.prediction, s, self.grid.process) if s.sigma > 0 else (1.0 / s.alpha, 0.0)
        self.rows.append(Row(s, p_x, p_o, begins=begins))
        self.open = True
        x0, state = Form(self, {X0(row): 1.0}), Form(self, {STATE: 1.0})
        if s.sigma == 0:
            return x0, None
        if self.plus_plus:
            return x0, state * ((1 - s.alpha * p_x) / s.sigma) + Form(self, {Uncond(row): -s.alpha * p_o / s.sigma})
        return x0, (state - x0 * s.alpha) / s.sigma

    def keep(self, form: Form) -> Form:
        """Keep a form of the state and x0_hat of the latest call as it is now, such as its eps."""
        row, c = len(self.rows) - 1, dict(form.now())
        q = (c.pop(STATE, 0.0), 0.0, c.pop(X0(row), 0.0))
        if c:
            raise ValueError(
                f"sampler: expected to keep a form of the latest x and x0_hat, got one of {sorted(map(str, c))}"
            )
        self.kept[Kept(row)] = q
        return Form(self, {Kept(row): 1.0})

    def reach(self, x: Form, t: Point) -> Form:
        self._update(x, t)
        self.begins = True
        return x

    def program(self, x: Form) -> "Program":
        """The rows that lead to x."""
        self._update(x, self.grid.points[-1])
        rows, slots = _allocate(self.rows, self.kept)
        if any(row.noise is not None and row.noise.correlated for row in rows):
            rows, slots = [_correlated(row, slots) for row in rows], slots + 1
        return Program(tuple(rows), slots, self.grid, self.prediction)

    def _update(self, x: Form, reached: Point | None) -> None:
        """x becomes the state: the update of the open row, or of a row without a call."""
        c = dict(x.now())
        if not all(math.isfinite(value) for value in c.values()):
            raise FloatingPointError(f"sampler: expected finite coefficients, got {c}")
        if not self.open:
            if c == {STATE: 1.0}:
                return
            self.rows.append(Row(None))
        row, number = self.rows[-1], len(self.rows) - 1
        self.states.append((c.get(STATE, 0.0), {symbol: value for symbol, value in c.items() if symbol != STATE}))
        x.becomes_state()
        self.open = False
        if (kept := c.pop(Kept(number), 0.0)) != 0:  # kept by this very row: written out
            q_x, _, q_0 = self.kept[Kept(number)]
            c = _combine((1.0, c), (kept, {STATE: q_x, X0(number): q_0}))
        row.k_x, row.k_0, row.k_u = (c.pop(symbol, 0.0) for symbol in (STATE, X0(number), Uncond(number)))
        row.sigma, row.noise = _one_noise({symbol: c.pop(symbol) for symbol in list(c) if isinstance(symbol, Noise)})
        row.slots, row.reached = c, reached
        if any(isinstance(symbol, Uncond) for symbol in c):
            raise ValueError("plus_plus: expected a sampler that uses the noise of its latest call alone")


def _one_noise(noises: Mapping[Noise, float]) -> tuple[float, Noise | None]:
    """(sigma, noise) of one row: one noise, or several of equal weight at addresses that follow each other."""
    if not noises:
        return 0.0, None
    ordered = sorted(noises, key=lambda noise: -noise.address)
    first, weight = ordered[0], noises[ordered[0]] / math.sqrt(ordered[0].count)  # of each single normal
    count = 0
    for noise in ordered:
        same = math.isclose(noises[noise] / math.sqrt(noise.count), weight, rel_tol=1e-12)
        same = same and (noise.log_var, noise.correlated) == (first.log_var, first.correlated)
        if not same or noise.address != first.address - count:
            raise ValueError(f"sampler: expected noises of equal weight at addresses in sequence, got {dict(noises)}")
        count += noise.count
    return weight, replace(first, count=count)


def _allocate(rows: list[Row], kept: Mapping[Kept, tuple[float, float, float]]) -> tuple[list[Row], int]:
    """(rows with slots for symbols, the number of slots). A row may write the slot that it is the last to read."""
    last = {symbol: number for number, row in enumerate(rows) for symbol in row.slots}
    made: dict[int, list[Any]] = {}
    for symbol in last:
        made.setdefault(symbol.row, []).append(symbol)
    free: list[int] = []
    where: dict[Any, int] = {}
    slots, done = 0, []
    for number, row in enumerate(rows):
        reads = {where[symbol]: value for symbol, value in row.slots.items()}
        free += sorted((where[symbol] for symbol in row.slots if last[symbol] == number), reverse=True)
        row = replace(row, slots=reads)
        if number in made:
            if len(made[number]) > 1:
                raise ValueError(
                    "sampler: expected one prediction of a call to be used later, x0_hat or what it keeps, got both"
                )
            (symbol,) = made[number]
            slot = free.pop() if free else slots
            slots = max(slots, slot + 1)
            where[symbol] = slot
            row = replace(row, keep=slot, q=kept[symbol] if isinstance(symbol, Kept) else (0.0, 0.0, 1.0))
        done.append(row)
    return done, slots


def _correlated(row: Row, slot: int) -> Row:
    """The row with its noise in that slot, which the loop fills: the kernel draws each dimension alone."""
    if row.noise is None or not row.noise.correlated:
        return row
    if row.point is None:
        raise ValueError("sampler: expected a call of the network before a noise that it correlates, got none")
    return replace(row, sigma=0.0, slots=row.slots | {slot: row.sigma})


# --- what a sampler becomes ---


@dataclass(frozen=True)
class Program:
    """The rows of a run, and how many tensors like x they keep between them."""

    rows: tuple[Row, ...]
    slots: int
    grid: Grid
    prediction: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def calls(self) -> int:
        """How often the network is called."""
        return sum(row.point is not None for row in self.rows)

    @property
    def learned_variance(self) -> bool:
        return any(row.noise is not None and row.noise.log_var is not None for row in self.rows)

    @property
    def correlated(self) -> bool:
        """Whether the last slot holds the noise of a row, which the network correlates."""
        return any(row.noise is not None and row.noise.correlated for row in self.rows)

    def fold(self) -> "Program":
        """The same program with x0_hat written out (k_0 = q_0 = 0), for a run that clamps nothing.

        Of ddpm and "eps" it is algorithm 2 of Ho et al. 2020 as printed.
        """
        return replace(self, rows=tuple(_folded(row) for row in self.rows))

    def table(self, limit: float | None = None) -> Tensor:
        """The rows as ``ops.reverse_step`` takes them, long ones: float64 [rows, columns].

        limit   clamp x0_hat to [-limit, limit]; None: not at all
        """
        table = torch.zeros(len(self.rows), long_columns(self.slots), dtype=torch.float64, device="cpu")
        for values, row in zip(table, self.rows, strict=True):
            log_var = (0.0, 0.0) if row.noise is None or row.noise.log_var is None else row.noise.log_var
            blend = (row.reached.alpha, row.reached.sigma) if row.reached else (0.0, 0.0)
            columns = (
                *(row.p_x, row.p_o, 0.0, math.inf if limit is None else limit, row.k_x, row.k_o, row.k_u, row.k_0),
                *(0.0, row.sigma, *log_var, 1.0, *row.q, *blend, 0.0, 0.0),
            )
            values[: len(LONG_COLUMNS)] = torch.tensor(columns, dtype=torch.float64, device="cpu")
            for slot, k in row.slots.items():
                values[len(LONG_COLUMNS) + slot] = k
        return table

    def addresses(self) -> Tensor:
        """The address of each row's noise, and of what a mask blends in: int64 [rows, 2], it and how many
        normals are added up."""
        noises = [row.noise or Noise(row.point.address if row.point else 0, 1) for row in self.rows]
        return torch.tensor([(noise.address, noise.count) for noise in noises], dtype=torch.int64, device="cpu")

    def bytes(self) -> list[int]:
        """Return the bytes that each row reads and writes for an element, in float32."""
        return [4 * (2 + (r.point is not None) + len(r.slots) + (r.keep is not None)) for r in self.rows]


def _folded(row: Row) -> Row:
    k_x, q_x = (
        _combine((1.0, {0: a}), (row.p_x, {0: b})).get(0, 0.0) for a, b in ((row.k_x, row.k_0), (row.q[0], row.q[2]))
    )
    k_o, q_o = row.k_o + row.k_0 * row.p_o, row.q[1] + row.q[2] * row.p_o
    return replace(row, k_x=k_x, k_o=k_o, k_0=0.0, q=(q_x, q_o, 0.0))
