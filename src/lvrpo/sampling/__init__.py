"""Sampling: timesteps, flow steps and solvers, guidance, tokens, seeds. Pure functions on tensors."""

from lvrpo.sampling import flow_sde, guidance, masked, seeds, solvers, timesteps, tokens
from lvrpo.sampling.flow_sde import *
from lvrpo.sampling.guidance import *
from lvrpo.sampling.masked import *
from lvrpo.sampling.seeds import *
from lvrpo.sampling.solvers import *
from lvrpo.sampling.timesteps import *
from lvrpo.sampling.tokens import *

__all__: list[str] = []
__all__ += flow_sde.__all__
__all__ += guidance.__all__
__all__ += masked.__all__
__all__ += seeds.__all__
__all__ += solvers.__all__
__all__ += timesteps.__all__
__all__ += tokens.__all__
