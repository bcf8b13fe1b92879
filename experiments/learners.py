"""What the trainer needs of a learner, whichever way it learns."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from theria import meta
from theria.data import Episode
from theria.nn import InContextClassifier, InContextRegressor

LossFn = Callable[[Tensor, Tensor], Tensor]


class InContextLearner(nn.Module):
    """Learning in the forward pass: the network reads the support set; training is plain descent on the query loss."""

    def __init__(self, model: InContextClassifier | InContextRegressor, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, episode: Episode) -> Tensor:
        """The mean loss of the queries; of every point given those before it where the context is causal."""
        if isinstance(self.model, InContextRegressor) and self.model.causal:
            x, y = sequence(episode)
            return self.loss_fn(self.model.prefixes(x, y), y)
        prediction = self.predict(episode)
        return self.loss_fn(prediction.flatten(0, 1), episode.query_y.flatten(0, 1))

    def predict(self, episode: Episode) -> Tensor:
        """([T,] Q, ...) predictions of the queries."""
        return self.model(episode.support_x, episode.support_y, episode.query_x)


# Both map an episode of T tasks to its mean query loss and have predict(episode).
Learner: TypeAlias = "meta.MAML | InContextLearner"


def sequence(episode: Episode) -> tuple[Tensor, Tensor]:
    """Support and query points as one sequence: x (T, K + Q, d) and y (T, K + Q, 1)."""
    return torch.cat([episode.support_x, episode.query_x], 1), torch.cat([episode.support_y, episode.query_y], 1)


@contextmanager
def attributes(target: Any, **values: Any):
    """Set attributes of a value for the time of a block."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield target
    finally:
        for name, value in before.items():
            setattr(target, name, value)
