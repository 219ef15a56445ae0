"""Fast, exact kernels for denoising diffusion, and what is needed around them to train and to sample."""

from importlib import metadata

from . import startup

try:
    __version__ = metadata.version("diffkern")
except metadata.PackageNotFoundError:  # built in its folder, not installed
    __version__ = "0+uninstalled"

if not startup.is_command():  # the command imports these itself, where Ctrl-C ends it with one line
    from .public import *  # noqa: F403
    from .public import __all__  # noqa: F401


def __getattr__(name: str):
    if name == "Scheduler":  # diffusers is imported where it is used
        from .schedulers import Scheduler

        return Scheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
