"""The surroundings of a run: its folder and lock, its log, its signals."""

import os
import signal

import pytest

from diffkern.training import runs

HEADER = "step,loss,lr,images_per_second,validation_loss\n"

# --- the folder ---


def test_a_folder_has_one_run_at_a_time_and_a_lock_file_left_behind_means_nothing(tmp_path):
    (tmp_path / runs.LOCK).write_text("left by a run that was killed")
    for _ in range(2):
        with (
            runs.locked(tmp_path),
            pytest.raises(RuntimeError, match="^out: expected a folder that no other run writes to, got .*"),
            runs.locked(tmp_path),
        ):
            pass


def test_what_can_not_become_a_folder_is_told_and_what_can_is_left_as_it_was(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(OSError, match=rf"^out: expected a folder to write to, got '{path}' \("):
            runs.check_folder(path)
    runs.check_folder(tmp_path / "a" / "run")
    assert os.listdir(tmp_path) == ["file"]


# --- log.csv ---

GOOD = "1,0.900000,1e-05,10.0,\n2,0.800000,2e-05,10.0,0.850000\n"
DAMAGED = {
    "an empty line": (GOOD + "\n", 1),
    "zeros": (GOOD + "\0\0\0", 1),
    "a cut line": (GOOD + "3", 1),
    "a cut number": (GOOD + "3,0.700000,3e-05,1", 1),
    "a spreadsheet": (GOOD + "3;0,7;3e-05;10,0\n4;0,6;3e-05;10,0\n", 2),
    "no UTF-8": ("\udcff\n" + GOOD, 1),
}


@pytest.mark.parametrize(("text", "damaged"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_lines_of_a_log_are_dropped_with_one_warning(tmp_path, text, damaged):
    path = tmp_path / "log.csv"
    path.write_bytes((HEADER + text).encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=rf"log.csv: dropped {damaged} damaged lines; expected step,loss") as warned:
        log = runs.Log(path, 9)
    assert len(warned) == 1
    assert path.read_text() == HEADER + GOOD
    log.add(0.7)
    log.write(3, 3e-5, 4)
    assert path.read_text().startswith(HEADER + GOOD + "3,0.700000,3e-05,")


@pytest.mark.filterwarnings("error")
def test_a_log_of_an_earlier_version_gets_the_column_of_held_out_data(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss,lr,images_per_second\n1,0.9,1e-05,10.0\n")
    log = runs.Log(path, 9)
    log.add(0.5)
    log.write(2, 1e-5, 4, 0.75)
    old, new = path.read_text().removeprefix(HEADER).splitlines()
    assert old == "1,0.9,1e-05,10.0," and new.endswith(",0.750000")


@pytest.mark.filterwarnings("error")
def test_a_log_that_is_whole_is_not_written_anew(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(HEADER + GOOD)
    before = path.stat()
    runs.Log(path, 2)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    path.write_bytes((HEADER + GOOD).replace("\n", "\r\n").encode())  # by an editor
    runs.Log(path, 1)
    assert path.read_text() == HEADER + GOOD.splitlines(keepends=True)[0]


# --- signals ---


def test_a_repeated_signal_is_the_same_signal():
    for number in runs.STOPPING:
        with runs.signals() as received:
            assert received.take() == 0
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert received.take() == received.take() == number


def test_a_ctrl_c_some_time_after_the_first_acts_at_once(monkeypatch):
    monkeypatch.setattr(runs, "IMPATIENCE", -1.0)
    with runs.signals() as received, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert received.take() == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_to_save_is_taken_once_and_stops_nothing():
    with runs.signals() as received:
        signal.raise_signal(runs.SAVING)
        assert (received.take(), received.take()) == (runs.SAVING, 0)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runs.signals() as received:
            signal.raise_signal(signal.SIGHUP)
            assert received.take() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
