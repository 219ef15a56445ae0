"""Files: written whole or not at all, by whoever writes and whatever happens; read without trust in what they say."""

import errno
import json
import os
import resource
import signal
import struct
import threading
from contextlib import contextmanager

import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny import one_thread  # noqa: F401

from diffkern.io import files
from diffkern.io.files import check_writable, fill, read, write, write_atomically
from diffkern.networks import UNet
from diffkern.networks.blueprint import Blueprint


def write_new(path):
    write_atomically(path, lambda temporary: temporary.write_bytes(b"new"))


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# --- writing ---


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail_half_way(temporary):
        temporary.write_bytes(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail_half_way)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_write_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    write_new(tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == b"new"
    assert events == ["fsync", "rename", "fsync"]


def test_a_system_that_opens_no_directories_is_not_asked_to(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "os", FakeOs())
    write_new(tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == b"new"


class FakeOs:
    name = "other"

    def __getattr__(self, name):
        return pytest.fail("a folder was opened") if name == "open" else getattr(os, name)


@pytest.mark.parametrize(("mask", "mode"), [(0o027, 0o640), (0o777, 0o600)])
def test_a_written_file_has_the_mode_that_the_umask_asks_for_and_its_owner_can_use_it(tmp_path, mask, mode):
    with umask(mask):
        write(tmp_path / "m.safetensors", {}, {"w": torch.zeros(1)})
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == mode


def test_a_file_that_grows_beyond_the_limit_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, {}, {"w": torch.zeros(1)})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, hard))
    try:
        with pytest.raises(OSError, match="expected to be writable") as error:
            write(path, {}, {"w": torch.zeros(2**16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"{path}: expected to be writable, got File too large"
    assert error.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["m.safetensors"] and path.read_bytes() == before


@pytest.mark.parametrize(
    ("cause", "kind", "reason"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), OSError, "No space left on device"),
        (SafetensorError("Error while serializing: odd"), OSError, "Error while serializing: odd"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/.m.1.bin"), OSError, "Disk quota exceeded"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/.m.1.bin"), PermissionError, "Permission denied"),
    ],
)
def test_whatever_a_writer_raises_is_an_os_error_that_names_the_file(tmp_path, cause, kind, reason):
    def fail(temporary):
        raise cause

    with pytest.raises(kind) as error:
        write_atomically(tmp_path / "m.bin", fail)
    assert str(error.value) == f"{tmp_path}/m.bin: expected to be writable, got {reason}"
    assert os.listdir(tmp_path) == []


def test_threads_may_write_one_path_at_once(tmp_path):
    path, errors = tmp_path / "file.bin", []

    def write_often(content):
        try:
            for _ in range(10):
                write_atomically(path, lambda temporary: temporary.write_bytes(content))
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write_often, args=(content * 1000,)) for content in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and path.read_bytes() in (b"a" * 1000, b"b" * 1000)
    assert os.listdir(tmp_path) == ["file.bin"]


def killed_in_a_write(path) -> int:
    """The number of a process that had SIGKILL in a write of ``path``."""
    process = os.fork()
    if process == 0:
        write_atomically(path, lambda temporary: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(process, 0)
    return process


def test_what_a_kill_in_a_write_leaves_is_removed_by_the_next_write_of_that_file(tmp_path):
    path = tmp_path / "file.bin"
    dead = killed_in_a_write(path)
    (left,) = os.listdir(tmp_path)
    assert str(dead) in left
    mine = f".file.bin.{files.HOST}.{os.getpid()}"
    others = f".other.bin.{files.HOST}.{dead}.00000000", f".file.bin.{files.HOST}.1.00000000"
    for name in (f"{mine}.00000000", f"{mine}.00000001", *others):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / f"{mine}.00000001", (0, 0))  # of a process before, which had this number
    write_new(path)
    assert sorted(os.listdir(tmp_path)) == sorted([f"{mine}.00000000", *others, "file.bin"])


def test_the_temporary_of_another_host_stays(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    killed_in_a_write(path)  # a number that is free here, and may be that of a process there
    (theirs,) = os.listdir(tmp_path)
    monkeypatch.setattr(files, "HOST", "00000000")
    write_new(path)
    assert sorted(os.listdir(tmp_path)) == sorted([theirs, "file.bin"])


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_file_is_replaced(tmp_path, exists):
    (tmp_path / "there").mkdir()
    if exists:
        (tmp_path / "there" / "file.bin").write_bytes(b"old")
    link = tmp_path / "link.bin"
    link.symlink_to("there/file.bin")
    write_new(link)
    assert link.is_symlink() and (tmp_path / "there" / "file.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path / "there") == ["file.bin"]


def loop(folder):
    (folder / "loop.png").symlink_to("loop.png")
    return folder / "loop.png"


UNWRITABLE = {
    "system": (lambda folder: "/proc/x.png", "No such file or directory|Permission denied|Read-only file system"),
    "long name": (lambda folder: folder / ("n" * 252 + ".png"), "File name too long"),
    "no folder": (lambda folder: folder / "no" / "x.png", "no folder to write it in"),
    "folder": (lambda folder: folder, "a directory"),
    "device": (lambda folder: os.devnull, "a device"),
    "below a file": (lambda folder: f"{__file__}/x.png", "Not a directory"),
    "loop of links": (loop, "Too many levels of symbolic links"),
}


@pytest.mark.parametrize(("path", "reason"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written_is_known_before_the_work(tmp_path, path, reason):
    path = path(tmp_path)
    for attempt in (check_writable, write_new):
        with pytest.raises(OSError, match=f"^{path}: expected to be writable, got ({reason})$"):
            attempt(path)


@pytest.mark.parametrize("name", ["x.png", "n" * 251 + ".png", "é" * 100 + ".png"])
def test_asking_whether_a_file_can_be_written_leaves_nothing(tmp_path, name):
    check_writable(tmp_path / name)
    assert os.listdir(tmp_path) == []
    write_new(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


# --- reading ---


def pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize(
    ("path", "kind"), [(pipe, "pipe"), (lambda folder: "/dev/zero", "device"), (lambda folder: folder, "directory")]
)
def test_only_regular_files_are_opened(tmp_path, path, kind):
    path = path(tmp_path)
    with pytest.raises(ValueError, match=f"^{path}: expected a file, got a {kind}$"):
        read(path)


def test_a_file_comes_back_as_it_was_written(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "": torch.zeros(0)}
    write(tmp_path / "f", {"x": [1, None]}, tensors)
    description, stored = read(tmp_path / "f")
    assert description == {"x": [1, None]} and stored.keys() == tensors.keys()
    assert all(
        torch.equal(stored[key], tensor) and stored[key].dtype == tensor.dtype for key, tensor in tensors.items()
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{", "null", "[1]"])
def test_a_description_that_cannot_be_read_says_so(tmp_path, text):
    save_file({"w": torch.zeros(1)}, tmp_path / "f", metadata={"diffkern": text})
    with pytest.raises(
        ValueError, match=f"^{tmp_path}/f: expected a (description in JSON|file written by diffkern), got"
    ):
        read(tmp_path / "f")


def network(**changes):
    with Blueprint():
        return UNet(**{**tiny.NETWORK, **changes})


def test_tensors_that_are_not_used_are_not_read(tmp_path):
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    write(tmp_path / "f", {}, {"w": torch.zeros(2**24)})
    before = resident()
    stored = read(tmp_path / "f")[1]
    assert stored["w"].shape == (2**24,) and resident() - before < 2**25


def test_a_filled_network_has_the_weights_and_the_layout_of_an_ordinary_one(tmp_path):
    plain = UNet(**tiny.NETWORK)
    write(tmp_path / "f", {}, plain.state_dict())
    made = network()
    fill(made, read(tmp_path / "f")[1], "f")
    for key, tensor in plain.state_dict().items():
        assert torch.equal(made.state_dict()[key], tensor) and made.state_dict()[key].stride() == tensor.stride()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(channels=4096), r"conv_in.weight: expected shape \(4096, 1, 3, 3\), got \(8, 1, 3, 3\)"),
        (dict(blocks=3), r"expected the tensors of its network, got \d+ missing .* and 0 unexpected \[\]"),
    ],
)
def test_memory_is_not_taken_before_the_shapes_agree(changes, message):
    made = network(**changes)
    with pytest.raises(ValueError, match=f"^f: {message}"):
        fill(made, UNet(**tiny.NETWORK).state_dict(), "f")
    assert made.conv_in.weight.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_weights_that_are_no_floats_are_refused(dtype):
    stored = {key: tensor.to(dtype) for key, tensor in UNet(**tiny.NETWORK).state_dict().items()}
    with pytest.raises(ValueError, match=f"^f: conv_in.weight: expected a type like torch.float32, got {dtype}$"):
        fill(network(), stored, "f")


def test_a_file_with_bytes_of_too_large_a_header_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(struct.pack("<Q", 2**60) + json.dumps({}).encode())
    with pytest.raises(ValueError, match="expected a safetensors file, got"):
        read(tmp_path / "f")
