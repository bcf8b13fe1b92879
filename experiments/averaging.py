"""An exponential moving average of the meta-parameters (`trainer.ema`), evaluated in their place.

After update number t, counted from 0, of parameters theta:

    a <- a + w (theta - a),    w = 1 - min(decay, (1 + t)/(10 + t))

The ramp of the decay is the one of TensorFlow's ExponentialMovingAverage (its `num_updates`). With a constant decay the
parameters that the run began from would keep the weight decay^t: 37 % after 1,000 updates at 0.999. With the ramp it is
prod_s (1 + s)/(10 + s) = 1/binomial(t + 9, 9) as long as the ramp lasts: below 1e-4 after 10 updates. Dividing by 1 -
decay^t, as Adam does, has no weight on the beginning either, but averages the first steps, the worst ones, evenly.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from experiments.learners import Learner


class Average:
    """A copy of a learner whose parameters are the average of the learner's.

    Nothing is swapped: a checkpoint that is written while the copy is evaluated holds the parameters of training, and a
    recorded step finds them where they were. The weight of an update is computed on the device, in place, from a
    count that lives there, so that an update waits for nothing and could be recorded as well.

    Args:
        learner: what is trained; its parameters are the average so far.
        decay: in [0, 1).
    """

    def __init__(self, learner: Learner, decay: float) -> None:
        self.source, self.decay, self.learner = learner, decay, copy.deepcopy(learner)
        self._pairs = _by_dtype(self.learner, learner)
        self._buffers = list(zip(self.learner.buffers(), learner.buffers(), strict=True))
        device = next(learner.parameters()).device
        self.count = torch.zeros((), dtype=torch.float64, device=device)  # updates; exact to 2^53

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now; buffers are copied."""
        weight = 1 - ((1 + self.count) / (10 + self.count)).clamp(max=self.decay)
        self.count += 1
        for dtype, (averages, values) in self._pairs.items():
            change = torch._foreach_sub(values, averages)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_mul_(change, weight.to(dtype))  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(averages, change)  # pyright: ignore[reportPrivateImportUsage]
        for average, value in self._buffers:
            average.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: what `load_state_dict` needs to go on to the same bits."""
        return {"learner": self.learner.state_dict(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.count.copy_(state["count"])


def evaluated(state: dict[str, Any]) -> dict[str, Tensor]:
    """The learner's state in a checkpoint that its run evaluates: the average where it has one."""
    average = state.get("average")
    return state["learner"] if average is None else average["learner"]


def _by_dtype(copied: Learner, source: Learner) -> dict[torch.dtype, tuple[list[Tensor], list[Tensor]]]:
    """Averages and parameters in lists of one dtype each, which one launch can update."""
    pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for average, value in zip(copied.parameters(), source.parameters(), strict=True):
        averages, values = pairs.setdefault(value.dtype, ([], []))
        averages.append(average)
        values.append(value)
    return pairs
