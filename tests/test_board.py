"""A run's output to TensorBoard: the numbers of log.csv, and the sample grids."""

import csv
import sys
from types import SimpleNamespace

import pytest
import tiny
from tiny import one_thread  # noqa: F401

from diffkern.cli import main
from diffkern.training import Trainer, board, new_model
from diffkern.training.runs import FORMATS

CONFIG = dict(steps=2, log_every=1, validate_every=2, sample_every=2, tensorboard=True)


class Writer:
    """In place of TensorBoard's."""

    made: list["Writer"] = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.grids, self.closed = folder, purge_step, [], [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_image(self, name, image, step, dataformats):
        self.grids.append((name, image.shape, step, dataformats))

    def close(self):
        self.closed = True


def run(folder):
    data, config = tiny.dataset(), tiny.config(**CONFIG)
    trainer = Trainer(new_model(data, config), data, config, validation=data)
    trainer.grid = lambda: type(trainer).grid(trainer, 10, 1)
    trainer.run(folder, progress=False)


def test_a_run_tells_the_numbers_of_its_log_and_its_grids(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    run(tmp_path)
    (writer,) = Writer.made
    with (tmp_path / "log.csv").open() as file:
        lines = list(csv.DictReader(file))
    columns = {name: column for column, name in board.NAMES.items()}
    told = {(columns[name], step): f"{value:{FORMATS[columns[name]]}}" for name, value, step in writer.scalars}
    assert told == {(c, int(line["step"])): line[c] for line in lines for c in FORMATS if line[c]} and len(told) == 7
    ((name, shape, *rest),) = writer.grids
    assert (name, shape[2], rest) == ("samples", 3, [2, "HWC"])
    assert writer.folder == str(tmp_path / "tensorboard") and writer.purge_step == 1 and writer.closed


def test_without_tensorboard_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "none", "--out", "run", "--tensorboard"]) == 2
    assert (
        "tensorboard: expected the package tensorboard (pip install diffkern[tensorboard])" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tensorboard_reads_what_a_run_has_told(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/training")] == [1, 2]
    assert [event.step for event in events.Scalars("loss/validation")] == [2]
    assert [(image.step, image.width > image.height) for image in events.Images("samples")] == [(2, True)]
