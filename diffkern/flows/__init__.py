"""Normalizing flows: invertible layers before a standard normal, with an exact density.

    ln p(x) = ln N(z; 0, I) + ln |det dz/dx|,  z = f(x)                                     (Dinh et al. 2017, eq. 3)

``Flow`` is a distribution: ``sample(n, seeds=...)`` and ``log_prob(x)`` in nats. ``RealNVP`` is one of vectors,
``Glow`` one of images, and ``Flow(shape, layers)`` one of any layers.
:class:`diffkern.training.Trainer` trains them.
"""

from .architectures import Glow as Glow
from .architectures import RealNVP as RealNVP
from .files import load as load
from .files import save as save
from .flow import Flow as Flow
from .layers import ActNorm as ActNorm
from .layers import Chain as Chain
from .layers import Coupling as Coupling
from .layers import Half as Half
from .layers import Layer as Layer
from .layers import Linear as Linear
from .layers import Permutation as Permutation
from .layers import Squeezed as Squeezed
