"""Training: Algorithm 1 of Ho et al. 2020, with an average of the weights, from counters alone.

Whatever is drawn for the k-th example that training sees (its image, t, noise, label dropout, flip) is a function of
k and the run's seed: there is no generator to save, and a resumed run continues to the bit. Several processes
(``torchrun -m diffkern train``) share each step's examples, and train the network that one alone would, but for the
order in which a gradient is summed.
"""

from ..io.files import CHECKPOINT
from .checkpoint import read_checkpoint
from .config import Config, config_fields
from .draws import Draws, draw
from .ema import PostHoc, ema_decay, post_hoc_ema
from .recipes import PRESETS, recipe
from .runs import Log
from .start import new_model
from .trainer import Diverged, Trainer

__all__ = [
    "CHECKPOINT",
    "PRESETS",
    "Config",
    "Diverged",
    "Draws",
    "Log",
    "PostHoc",
    "Trainer",
    "config_fields",
    "draw",
    "ema_decay",
    "new_model",
    "post_hoc_ema",
    "read_checkpoint",
    "recipe",
]
