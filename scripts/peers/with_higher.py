"""higher: unrolling of torch.optim."""
# pyright: reportMissingImports=false, reportCallIssue=false

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version

import higher
import numpy as np
import torch
from given import Given
from torches import Inner, gradient, leaf, losses, start

VERSION = version("higher")


def unrolled(given: Given) -> np.ndarray:
    inner, outer = losses(given)
    x = leaf(given.outer0)
    z0 = start(given, x)
    module = Inner(z0.detach(), inner)
    optimiser = torch.optim.SGD(module.parameters(), lr=given.rate)
    with higher.innerloop_ctx(module, optimiser) as (fast, stepper):
        if given.starts_at_outer:
            fast.update_params([z0])
        for _ in range(given.steps):
            stepper.step(fast(x))
        return gradient(outer(fast.z, x), x)


def methods(given: Given) -> Mapping[str, Callable[[], np.ndarray]]:
    return {"innerloop_ctx": partial(unrolled, given)}
