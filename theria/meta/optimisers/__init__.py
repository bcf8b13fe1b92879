"""Inner optimisers: pure functions, differentiable in everything they are given.

What a step is, is a value: `SGD`, `Adam`, `AdamW`, `RMSprop`, `Lion`. Each agrees with `torch.optim` step by step,
takes its rate as a number, a sequence or a function of the step, can learn it (`learn_lr`), and is differentiable in
each hyperparameter that is given as a tensor (`hyper`). Positional arguments are those of torch, in its order. The
shapes are in NOTE [shapes of hyperparameters], `hyperparameters.py`.
"""

from theria.meta.optimisers.adam import Adam, AdamW
from theria.meta.optimisers.base import Hyper, InnerOptimiser, Params, State
from theria.meta.optimisers.hyperparameters import Rate, Schedule, safe_sqrt
from theria.meta.optimisers.lion import Lion
from theria.meta.optimisers.rmsprop import RMSprop
from theria.meta.optimisers.schedules import Cosine, Exponential
from theria.meta.optimisers.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Cosine",
    "Exponential",
    "Hyper",
    "InnerOptimiser",
    "Lion",
    "Params",
    "RMSprop",
    "Rate",
    "Schedule",
    "State",
    "safe_sqrt",
]
