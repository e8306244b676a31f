"""How outputs are drawn: times, steps of a flow, guidance, tokens and seeds. Pure functions on tensors."""

from lvrpo.sampling.flow_sde import (
    STEPS,
    FlowStep,
    StepFunction,
    cps_step,
    dance_sde_step,
    flow_sde_step,
    ode_step,
    step_logprob,
    step_weights,
)
from lvrpo.sampling.guidance import guide
from lvrpo.sampling.seeds import derive_seed, normal_noise, uniform_noise
from lvrpo.sampling.solvers import PastVelocity, adams_bashforth_step
from lvrpo.sampling.timesteps import (
    check_window,
    fast_window,
    flow_time,
    full_window,
    shift_time,
    sliding_window,
    timestep_grid,
)
from lvrpo.sampling.tokens import sample_tokens, token_entropy, token_logprobs

__all__ = [
    "STEPS",
    "FlowStep",
    "PastVelocity",
    "StepFunction",
    "adams_bashforth_step",
    "check_window",
    "cps_step",
    "dance_sde_step",
    "derive_seed",
    "fast_window",
    "flow_sde_step",
    "flow_time",
    "full_window",
    "guide",
    "normal_noise",
    "ode_step",
    "sample_tokens",
    "shift_time",
    "sliding_window",
    "step_logprob",
    "step_weights",
    "timestep_grid",
    "token_entropy",
    "token_logprobs",
    "uniform_noise",
]
