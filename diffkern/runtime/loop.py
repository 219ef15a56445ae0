"""The loop: takes samples along the rows of a program, in place."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import covariance, ops
from ..constraints import Quantile
from ..guidance import K_G, P_G, Guidance, W
from ..ops.row import LONG_COLUMNS, of_x0
from ..program import Program, Row

Network = Callable[..., Any]
"""network(x_t [N, ...] float32, t [N], labels [N] int64 or None, **conditions) -> [N, C or 2C, ...], or what holds that
as its ``sample``. t is int64 of a schedule's time steps, else float32"""

P_X, P_O = (LONG_COLUMNS.index(name) for name in ("p_x", "p_o"))
FROM_OUT = [LONG_COLUMNS.index(name) for name in ("p_o", "k_o", "q_o")]
FROM_X0 = [LONG_COLUMNS.index(name) for name in ("p_x", "p_o", "p_g")]
SIGMA, LOG_VAR_MIN, LOG_VAR_MAX = (LONG_COLUMNS.index(name) for name in ("sigma", "log_var_min", "log_var_max"))


class Loop:
    """A batch x [N, ...] on its way through a program.

    All that a row reads and writes stays where it is on the device, the number of the row too, and a row advances it:
    a CUDA graph of a row serves all rows of its kind. A step takes no number from a row and no list as an index, which
    would be a copy from the host: a graph cannot hold one.
    """

    def __init__(
        self,
        network: Network,
        program: Program,
        shape: tuple[int, ...],
        device: torch.device,
        *,
        limit: float | None = 1.0,
        quantile: Quantile | None = None,
        guidance: Guidance | None = None,
        conditions: dict[str, tuple[Tensor, Tensor]] | None = None,
        inpaint: bool = False,
        dtype: torch.dtype | None = None,
    ):
        """conditions: by name, [N, ...] of what the network gets, and of what it gets without the condition."""
        self.network, self.program, self.dtype = network, program, dtype
        self.guidance, self.quantile = guidance or Guidance(), quantile
        table = self.guidance.fill(program.table(limit), program)
        self.table = table.float().to(device)
        self.addresses = program.addresses().to(device)
        points = [row.point for row in program.rows]
        whole = program.grid.process.discrete and all(p is None or p.c_noise == int(p.c_noise) for p in points)
        c_noise = torch.tensor([0.0 if p is None else p.c_noise for p in points], dtype=torch.float64, device="cpu")
        self.c_noise = c_noise.to(device, torch.int64 if whole else torch.float32)
        c_in = [1.0 if p is None else program.grid.process.c_in(p) for p in points]
        self.c_in = None if set(c_in) == {1.0} else torch.tensor(c_in, dtype=torch.float32, device=device)
        rho = [0.0 if p is None else p.rho for p in points]
        self.rho = torch.tensor(rho, dtype=torch.float32, device=device)
        self.learned = program.learned_variance
        self.outputs = shape[1] * (2 if self.learned else 1)  # the channels of its output that the kernel reads
        self.channels = covariance.channels(shape[1:]) if program.correlated else self.outputs
        self.normals = torch.zeros_like(self.table) if program.correlated else None
        if self.normals is not None:
            self.normals[:, SIGMA] = 1  # rows that do nothing but draw
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.each = torch.arange(shape[0], dtype=torch.int64, device=device)
        self.x = torch.empty(shape, dtype=torch.float32, device=device)
        self.slots = [torch.zeros_like(self.x) for _ in range(program.slots)]
        self.seeds = torch.empty(shape[0], dtype=torch.int64, device=device)
        self.weights = None if self.guidance.one_weight else torch.empty(shape[0], dtype=torch.float32, device=device)
        self.given = {name: value.clone() for name, (value, _) in (conditions or {}).items()}
        self.null = {name: value.clone() for name, (_, value) in (conditions or {}).items()}
        self.known = torch.zeros_like(self.x) if inpaint else None
        self.mask = torch.ones_like(self.x) if inpaint else None
        self.graphs: dict[Any, torch.cuda.CUDAGraph] = {}

    def begin(
        self,
        x_T: Tensor,
        seeds: Tensor,
        conditions: dict[str, tuple[Tensor, Tensor]] | None = None,
        *,
        weights: Tensor | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Put a batch at the first row. conditions: by name, what the network gets with and without the condition."""
        self.x.copy_(x_T)
        self.seeds.copy_(seeds)
        for name, (given, null) in (conditions or {}).items():
            self.given[name].copy_(given)
            self.null[name].copy_(null)
        if weights is not None:
            self.weights.copy_(weights)
        if known is not None:
            self.known.copy_(known)
            self.mask.copy_(mask.expand_as(self.mask))
        self.row.zero_()

    # --- one row ---

    def step(self, row: Row, watch: Callable[[Tensor], Any] | None = None) -> None:
        """Do a row. The host looks at no value. ``watch`` gets x0_hat before x changes."""
        out = uncond = gradient = None
        if row.point is not None:
            out, uncond, gradient = self._call(row)
        if row.noise is not None and row.noise.correlated:
            self._correlate(out)
        if self.channels > self.outputs:
            out, uncond = (o if o is None else o[:, : self.outputs] for o in (out, uncond))
        table, addresses, step = self._rows(row, out, uncond, gradient)
        operands = dict(out_uncond=uncond, address=addresses, learned_variance=self.learned, grad=gradient)
        if out is None:
            operands["learned_variance"] = False
        if watch is not None:
            watch(ops.reverse_step(self.x, out, of_x0(table), step, self.seeds, **operands))
        ops.reverse_step_(
            self.x,
            out,
            table,
            step,
            self.seeds,
            history=self.slots,
            kept=None if row.keep is None else self.slots[row.keep],
            known=self.known if row.reached else None,
            mask=self.mask if row.reached else None,
            **operands,
        )
        self.row.add_(1)

    def _call(self, row: Row) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, out_uncond, gradient) of a row's call. Two outputs take two calls of N: each is what it is alone."""
        t = self.c_noise.index_select(0, self.row).repeat(len(self.x))
        given, other = self.guidance.outputs(row)
        if self.guidance.by_gradient and self.guidance.at(row):
            return self._differentiate(t)
        out = self._predict(self.network, self.x, t, self.given) if given else None
        if not other:
            return out, None, None
        if self.guidance.network is not None:
            worse = self._predict(self.guidance.network, self.x, t, self.given)
        else:
            worse = self._predict(self.network, self.x, t, self.null)
        return (out, worse, None) if given else (worse, None, None)

    def _correlate(self, out: Tensor) -> None:
        """Put the row's normals, with the covariance that ``out`` tells, into the last slot."""
        z = ops.reverse_step(self.x, None, self.normals, self.row, self.seeds, address=self.addresses)
        values = self.table.index_select(0, self.row).T  # [columns, 1]
        factor = covariance.factor(out, values[LOG_VAR_MIN, :, None], values[LOG_VAR_MAX, :, None])
        self.slots[-1].copy_((factor @ z[..., None])[..., 0])

    def _predict(self, network: Network, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
        """A network's output. It gets copies of what the loop changes in place: a graph of its own may hold them."""
        conditions = {name: value.clone() if isinstance(value, Tensor) else value for name, value in conditions.items()}
        x_in = x.clone() if self.c_in is None else x * self.c_in.index_select(0, self.row)
        return call(network, x_in, t, conditions, self.channels, self.dtype).float()

    def _differentiate(self, t: Tensor) -> tuple[Tensor, None, Tensor]:
        """(out, None, grad ln p) by the guidance's classifier or measurement."""
        with torch.enable_grad():
            x = self.x.detach().clone().requires_grad_()
            if self.guidance.classifier is not None:
                log_p = self.guidance.classifier(x, t, self.given.get("labels"))
                if log_p.ndim == 2:
                    log_p = log_p.log_softmax(1).gather(1, self.given["labels"][:, None])[:, 0]
                out = None
            else:
                out = self._predict(self.network, x, t, self.given)
                values = self.table.index_select(0, self.row)[0]
                x0_hat = values[P_X] * x + values[P_O] * out[:, : x.shape[1]]
                log_p = self.guidance.log_p(x0_hat, self.rho.index_select(0, self.row)[0])
            (gradient,) = torch.autograd.grad(log_p.sum(), x)
        if out is None:
            out = self._predict(self.network, self.x, t, self.null)
        return out.detach(), None, gradient.float()

    def _rows(
        self, row: Row, out: Tensor | None, uncond: Tensor | None, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(table, addresses, step): the program's; or a row for each sample, where what it says depends on the data."""
        weighted = self.weights is not None and self.guidance.at(row)
        rescaled = uncond is not None and self.guidance.rescale > 0
        bounded = self.quantile is not None and out is not None
        if not (weighted or rescaled or bounded):
            return self.table, self.addresses, self.row
        n = len(self.x)
        table = self.table.index_select(0, self.row).repeat(n, 1)
        addresses = self.addresses.index_select(0, self.row).repeat(n, 1)
        if weighted and self.guidance.by_gradient:
            _scale(table, (P_G, K_G), self.weights)
        elif weighted:
            table[:, W] = self.weights
        if rescaled:
            channels, w = self.x.shape[1], table[:, W].double()
            c, u, cc, cu, uu = ops.moments(out[:, :channels], uncond[:, :channels]).div_(self.x[0].numel()).unbind(1)
            conditional = cc - c * c
            guided = w**2 * conditional + 2 * w * (1 - w) * (cu - c * u) + (1 - w) ** 2 * (uu - u * u)
            ratio = (conditional / guided).sqrt().nan_to_num_(1.0, 1.0)  # of constant outputs: leave them as they are
            factor = 1 + self.guidance.rescale * (ratio - 1)
            _scale(table, FROM_OUT, factor.float())
        if bounded:
            operands = dict(out_uncond=uncond, grad=gradient, learned_variance=self.learned)
            size = ops.abs_quantile(self.x, out, table, self.each, self.quantile.q, **operands)
            _scale(table, FROM_X0, size.clamp_(min=1).reciprocal_())
        return table, addresses, self.each

    # --- all rows ---

    def run(self, tick: Callable[[], Any], callback: Callable[[int, Row, Tensor, Tensor, Tensor], Any] | None = None):
        """Do every row. ``callback`` gets, in each step, its number, its row, x_t, x0_hat and the x that it reached; a
        tensor that it returns takes the place of the last."""
        number, step = 0, None
        for row in self.program.rows:
            if callback is not None and row.begins and row.point is not None:
                step, seen = (number, row, self.x.clone()), []
                self.step(row, seen.append)
            else:
                self.step(row)
            if step is not None and row.reached is not None:
                changed = callback(*step, seen[0], self.x.clone())
                if changed is not None:
                    self.x.copy_(changed)
                step = None
            number += row.begins
            tick()

    def kind(self, row: Row) -> tuple[Any, ...]:
        """Return the kind of a row: one CUDA graph serves all rows of a kind."""
        calls = row.point is not None and (*self.guidance.outputs(row), self.guidance.at(row))
        return calls, row.keep, row.reached is not None, row.noise is not None and row.noise.correlated

    def replay(self, tick: Callable[[], Any]) -> None:
        """:meth:`run` by CUDA graphs, one for each kind of row, which the first batch records. All of it happens on the
        device of x, whichever is current: a stream of another one would record nothing.
        """
        with torch.cuda.device(self.x.device):
            for row in self.program.rows:
                kind = self.kind(row)
                if kind not in self.graphs:
                    self.graphs[kind] = self._record(row)
                self.graphs[kind].replay()
                tick()

    def _record(self, row: Row) -> torch.cuda.CUDAGraph:
        state = [self.x, self.row, *self.slots]
        before = [tensor.clone() for tensor in state]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.step(row)  # libraries set themselves up at their first call, which a graph cannot hold
        torch.cuda.current_stream().wait_stream(aside)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(row)
        return graph


def _scale(table: Tensor, columns: Iterable[int], factors: Tensor) -> None:
    """Multiply those columns of each row by its factor, in place."""
    for column in columns:
        table[:, column] *= factors


def call(
    network: Network, x_t: Tensor, t: Tensor, conditions: dict[str, Any], channels: int, dtype: torch.dtype | None
) -> Tensor:
    """``network(x_t, t, labels, **conditions)``, with autocast to ``dtype``: the first ``channels`` of it, checked."""
    conditions = dict(conditions)
    labels = conditions.pop("labels", None)
    with torch.autocast(x_t.device.type, dtype=dtype, enabled=dtype is not None):
        out = network(x_t, t, labels, **conditions)
    return checked_output(out, x_t, channels)


def checked_output(out: Any, x_t: Tensor, channels: int) -> Tensor:
    """The first ``channels`` of the network's output: more of them tell a variance, which may not be asked for."""
    n, own, *size = x_t.shape
    out = getattr(out, "sample", out)
    if not isinstance(out, Tensor):
        raise TypeError(f"model: expected a tensor as output, got {type(out).__name__}")
    if not out.is_floating_point():
        raise TypeError(f"model: expected a floating-point output, got {out.dtype}")
    if out.device != x_t.device:
        raise ValueError(f"model: expected an output on {x_t.device}, got {out.device}")
    shape, more = (n, channels, *size), [2 * own] if size else [2 * own, covariance.most_channels(own)]
    if out.shape not in [shape, *((n, c, *size) for c in more if c > channels)]:
        raise ValueError(f"model: expected an output of shape {shape}, got {tuple(out.shape)}")
    return out if out.shape == shape else out[:, :channels]
