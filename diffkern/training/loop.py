"""The loop of a run, and what it writes into its folder."""

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from .. import images, parallel
from ..io.files import CHECKPOINT
from ..progress import bar as progress_bar
from . import runs
from .board import FOLDER, Board
from .ema import drop_later_snapshots
from .plot import loss_plot
from .runs import Log

if TYPE_CHECKING:
    from .trainer import Trainer


def run(trainer: "Trainer", out: str | os.PathLike, *, progress: bool, lock: bool) -> signal.Signals | None:
    """Do the work of :meth:`Trainer.run`."""
    trainer.description()  # what cannot be written is refused now
    out, config, files, heard = Path(out), trainer.config, None, 0
    with contextlib.ExitStack() as stack:
        if parallel.rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            if lock:
                stack.enter_context(runs.locked(out))
            files = Files(trainer, out)
            stack.callback(files.close)
        total, done = (steps * config.batch_size for steps in (config.steps, trainer.steps))
        bar = stack.enter_context(progress_bar(total, "training", "img", progress and files is not None, initial=done))
        received = stack.enter_context(runs.signals())
        stack.callback(trainer.batches.close)
        while trainer.steps < config.steps and heard not in runs.STOPPING:
            loss = trainer.step()
            heard = parallel.largest(received.take(), trainer.model.device)
            if files is not None:
                bar.update(config.batch_size)
                files.after_step(loss, bar, save=heard == runs.SAVING)
        if files is not None:
            files.finish(bar)
    return signal.Signals(heard) if trainer.steps < config.steps else None


class Files:
    """The files of a run's folder, each written as often as the settings say."""

    def __init__(self, trainer: "Trainer", out: Path):
        self.trainer, self.out = trainer, out
        self.log = Log(out / runs.LOG, trainer.steps, trainer.unlogged)
        drop_later_snapshots(out, trainer.steps)
        self.board = Board(out / FOLDER, trainer.steps) if trainer.config.tensorboard else None
        self.saved: int | None = None  # the step of the last checkpoint

    def after_step(self, loss: float, bar, *, save: bool) -> None:
        """Write what is due after the step that had this ``loss``; ``save``: a checkpoint in any case."""
        config, steps = self.trainer.config, self.trainer.steps
        self.log.add(loss)
        if steps % config.log_every == 0:
            self._write_line(bar)
        if config.keep_every and steps % config.keep_every == 0:
            self.trainer.save(self.out / f"checkpoint-{steps:07d}.safetensors")
        if config.snapshot_every and steps % config.snapshot_every == 0:
            self.trainer.powers.write_snapshot(self.out, steps)
        if save or steps % config.checkpoint_every == 0:
            self._write_checkpoint()
        if self._has_grids() and steps % config.sample_every == 0:
            self._write_grid()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def finish(self, bar) -> None:
        """Write the checkpoint of the last step, unless it is there; if the run is done, a line of the losses that wait
        for one."""
        if self.saved != self.trainer.steps:
            self._write_checkpoint()
        if self.trainer.steps >= self.trainer.config.steps and self.log.unlogged.count:
            self._write_line(bar, early=True)
            self._write_plot()

    def _write_line(self, bar, *, early: bool = False) -> None:
        """The line of the log that is due, or ``early``, with the loss on held-out data where that is due too."""
        config, steps = self.trainer.config, self.trainer.steps
        held_out = self.trainer.validate() if self._validates() else None
        said = {} if held_out is None else {"validation": f"{held_out:.4f}"}
        numbers = self.log.write(steps, config.learning_rate(steps - 1), config.batch_size, held_out, early=early)
        bar.report(step=steps, loss=f"{numbers['loss']:.4f}", **said)
        if self.board is not None:
            self.board.add_line(steps, numbers)

    def _write_grid(self) -> None:
        steps, grid = self.trainer.steps, self.trainer.grid()
        images.save_png(grid, self.out / f"samples-{steps:07d}.png", {"step": steps})
        if self.board is not None:
            self.board.add_grid(steps, grid)

    def _write_checkpoint(self) -> None:
        """The checkpoint, and the picture of the log."""
        self.trainer.save(self.out / CHECKPOINT)
        self.saved = self.trainer.steps
        self._write_plot()

    def _write_plot(self) -> None:
        curves = self.log.curves()
        if curves["training"]:
            images.save_png(loss_plot(curves), self.out / "loss.png", {"step": self.trainer.steps})

    def _validates(self) -> bool:
        """Whether a line of the log is the first since the held-out loss was due."""
        config, steps = self.trainer.config, self.trainer.steps
        due, before = steps // config.validate_every, max(steps - config.log_every, 0)
        return self.trainer.validation is not None and due > before // config.validate_every

    def _has_grids(self) -> bool:
        return bool(self.trainer.config.sample_every and self.trainer.task.draws_images)
