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
from lvrpo.sampling.guidance import guide, guide_logits
from lvrpo.sampling.masked import (
    choose_revealed,
    mask_draws,
    masked_counts,
    masked_input,
    monte_carlo_logprob,
    path_logprobs,
)
from lvrpo.sampling.multistep import PredictedData, dpm_solver_step, predicted_data
from lvrpo.sampling.seeds import derive_seed, normal_noise, uniform_noise
from lvrpo.sampling.solvers import PastVelocity, adams_bashforth_step
from lvrpo.sampling.timesteps import (
    check_window,
    compressed_grid,
    decaying_window,
    fast_window,
    flow_time,
    full_window,
    random_window,
    shift_time,
    sliding_window,
    timestep_grid,
)
from lvrpo.sampling.tokens import sample_tokens, token_entropy, token_logprobs

__all__ = [
    "STEPS",
    "FlowStep",
    "PastVelocity",
    "PredictedData",
    "StepFunction",
    "adams_bashforth_step",
    "check_window",
    "choose_revealed",
    "compressed_grid",
    "cps_step",
    "dance_sde_step",
    "decaying_window",
    "derive_seed",
    "dpm_solver_step",
    "fast_window",
    "flow_sde_step",
    "flow_time",
    "full_window",
    "guide",
    "guide_logits",
    "mask_draws",
    "masked_counts",
    "masked_input",
    "monte_carlo_logprob",
    "normal_noise",
    "ode_step",
    "path_logprobs",
    "predicted_data",
    "random_window",
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
