"""The equations of post-training: pure functions on tensors, usable in any loop."""

from lvrpo.algorithms import advantages, audit, gradients, kl, nft, objectives, preferences, representation, selection
from lvrpo.algorithms.advantages import *
from lvrpo.algorithms.audit import *
from lvrpo.algorithms.gradients import *
from lvrpo.algorithms.kl import *
from lvrpo.algorithms.nft import *
from lvrpo.algorithms.objectives import *
from lvrpo.algorithms.preferences import *
from lvrpo.algorithms.representation import *
from lvrpo.algorithms.selection import *

__all__: list[str] = []
__all__ += advantages.__all__
__all__ += audit.__all__
__all__ += gradients.__all__
__all__ += kl.__all__
__all__ += nft.__all__
__all__ += objectives.__all__
__all__ += preferences.__all__
__all__ += representation.__all__
__all__ += selection.__all__
