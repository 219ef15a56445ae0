"""How a program is run: the machine's part (:class:`Run`) and the loop over its rows."""

from .loop import Loop as Loop
from .run import Run as Run
