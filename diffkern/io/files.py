"""Files in and out: tensors with a JSON description as one safetensors file, and any file written atomically.

A reader maps a file's tensors and compares their names, types and shapes before it takes memory for a network.
Every failure of a writer is an ``OSError`` that names the file asked for, never the temporary one beside it.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINT = "checkpoint.safetensors"
"""The file that a training run keeps in its folder."""

LONG_NAME = 200  # bytes: the temporary folder of a longer name has a digest for it (a file system's limit is 255)
BEGUN = time.time()
HOST = hashlib.sha256(os.fsencode(platform.node())).hexdigest()[:8]  # process numbers are those of one host

FilePath = str | os.PathLike


# --- reading ---


def check_regular(path: FilePath) -> None:
    """Raise unless ``path`` is a regular file, which can be opened without waiting: no pipe, device or folder."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected a file, got none") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected a file, got a {_kind(mode)}")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def read(path: FilePath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file of :func:`write`.

    Tensors are mapped: their types and shapes are known, and bytes are read where they are used.
    Raises FileNotFoundError, OSError, or ValueError for a file of another kind.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("diffkern", "null")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from None
    except OSError as error:
        raise _os_error(error.errno, f"{path}: expected a file that can be read, got {_reason(error)}") from None
    try:
        description = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: expected a description in JSON, got {error}") from None
    if not isinstance(description, dict):
        raise ValueError(f"{path}: expected a file written by diffkern, got one without its description")
    return description, tensors


def is_checkpoint(path: FilePath) -> bool:
    """Whether ``path`` holds the state of a training run."""
    try:
        return "training" in read(path)[0]
    except ValueError:
        return False


def compare(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], source: FilePath, whose: str) -> None:
    """ValueError, in the name of ``source``, unless names and shapes are the same, and floating point or not."""
    missing, unexpected = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{source}: expected the tensors of {whose}, got {len(missing)} missing {missing[:3]} "
            f"and {len(unexpected)} unexpected {unexpected[:3]}"
        )
    for key, tensor in expected.items():
        if got[key].shape != tensor.shape:
            raise ValueError(f"{source}: {key}: expected shape {tuple(tensor.shape)}, got {tuple(got[key].shape)}")
        if got[key].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{source}: {key}: expected a type like {tensor.dtype}, got {got[key].dtype}")


def state(network: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a network, by name; one that has several names by its first."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            named.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach() for name, tensor in named.values()}


def digest_of(network: nn.Module) -> str:
    """Return the SHA-256 of the names and the values of the parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state(network).items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(repr((name, str(values.dtype), tuple(values.shape))).encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def restore(live: Mapping[str, Tensor], stored: Mapping[str, Tensor], path: FilePath) -> None:
    """Copy ``stored`` into ``live``, which keeps its dtypes, devices and memory formats; the keys must be the same."""
    compare(live, stored, path, "its network")
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(stored[key])


def fill(
    network: nn.Module, stored: Mapping[str, Tensor], path: FilePath, device: torch.device | str | None = None
) -> None:
    """Move ``network`` from the meta device to ``device`` (None: the CPU), with the weights ``stored``.

    Memory is taken once their names and shapes agree. Tensors that are not floating point become 0.
    """
    planned = network.state_dict()
    compare(floating(planned), stored, path, "its network")
    live = {
        key: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or "cpu")
        for key, tensor in planned.items()
    }
    restore(floating(live), stored, path)
    for tensor in live.values():
        if not tensor.is_floating_point():
            tensor.zero_()
    network.load_state_dict(live, assign=True)


def floating(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point ones of a state dict: all but such as BatchNorm's count of batches."""
    return {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}


# --- writing ---


def write(path: FilePath, description: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, atomically: ``description`` in its metadata, and ``tensors``."""
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    metadata = {"diffkern": json.dumps(description)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def write_atomically(path: FilePath, write_to: Callable[[Path], Any]) -> None:
    """Let ``write_to`` fill a file beside ``path``, force it to disk, and give it the name ``path``.

    Whatever interrupts this, ``path`` holds the old file or the new one, whole. If ``path`` is a link, the file that
    it leads to is replaced. The file has the mode that the umask asks for, and its owner can read and write it.
    Raises OSError that names ``path``.
    """
    with _temporary(path) as (temporary, target, mode):
        write_to(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # safetensors makes it anew
        os.replace(temporary, target)
        _sync_folder(target.parent)


def check_writable(path: FilePath) -> None:
    """Raise the OSError of :func:`write_atomically` for a ``path`` that cannot be written: before the work, not after.

    A temporary file is made and removed, so that rights, length of the name and read-only disks are found out.
    """
    with _temporary(path):
        pass


@contextmanager
def _temporary(path: FilePath) -> Iterator[tuple[Path, Path, int]]:
    """A new empty file, in a folder of its own beside the file that ``path`` leads to; with that target and its mode.

    The folder goes afterwards, with whatever else was made in it: safetensors writes into a file of its own name.
    """
    try:
        target = _target(path)
        _remove_stale(target)
        folder = target.with_name(f"{_hidden(target)}{HOST}.{os.getpid()}.{os.urandom(4).hex()}")
        folder.mkdir()
        try:
            folder.chmod(0o700)
            temporary = folder / target.name
            with open(temporary, "xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode) | 0o600  # of the umask, and usable
            temporary.chmod(mode)
            yield temporary, target, mode
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _os_error(_number(error), f"{path}: expected to be writable, got {_reason(error)}") from None


def _target(path: FilePath) -> Path:
    """The regular file that ``path`` is or leads to, or will be."""
    target = Path(os.path.realpath(path))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if target.parent.is_dir():
            return target
        raise FileNotFoundError(errno.ENOENT, "no folder to write it in") from None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"a {_kind(mode)}")
    return target


def _hidden(target: Path) -> str:
    """Begin the names of temporary folders for ``target``: the host, the process and a random number follow."""
    name = target.name
    return f".{name if len(os.fsencode(name)) <= LONG_NAME else hashlib.sha256(os.fsencode(name)).hexdigest()}."


def _remove_stale(target: Path) -> None:
    """Remove the temporary folders of processes that were killed in a write of this target.

    On a shared file system those of other hosts stay: whether their processes live is not known here.
    """
    left = re.compile(re.escape(f"{_hidden(target)}{HOST}.") + r"(\d{1,9})\.[0-9a-f]{8}")
    with suppress(OSError):  # a folder that cannot be listed, something that another process has just removed
        for entry in os.scandir(target.parent):
            match = left.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False) and _is_left(int(match[1]), entry):
                shutil.rmtree(entry.path)


def _is_left(process: int, entry: os.DirEntry) -> bool:
    """Whether ``process`` is gone; in a container a new one may have its number, and this is older."""
    if process == os.getpid():
        return entry.stat().st_mtime < BEGUN
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _sync_folder(folder: Path) -> None:
    """Force a new name to disk, where the system opens folders and this one may be read."""
    if os.name != "posix":
        return
    try:
        directory = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _number(error: Exception) -> int | None:
    """The errno; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = _number(error)
    return str(error) if number is None else os.strerror(number)


def _os_error(number: int | None, message: str) -> OSError:
    """OSError, or its class for that errno, whose text is ``message`` alone."""
    error = type(OSError(number, ""))(message) if number is not None else OSError(message)
    error.errno = number
    return error
