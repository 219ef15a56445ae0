"""``python -m diffkern`` is the command ``diffkern``."""

import sys

from .cli import main

sys.exit(main())
