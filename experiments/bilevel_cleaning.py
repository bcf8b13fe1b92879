"""Softmax regression on digits whose training labels are partly wrong (Franceschi et al. 2017, arXiv 1703.01785).

Inner: mean of s(x_i) ce_i + c |W|^2 over the training samples, s the sigmoid; outer: mean ce over clean samples.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.bilevel_config import HyperCleaningConfig
from experiments.bilevel_data import Experiment, Figures, Stage, load, split
from experiments.errors import UserError
from theria.meta.bilevel import BilevelProblem

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def build(config: HyperCleaningConfig, seed: int) -> Experiment:
    """One stage, "weights".

    Raises:
        UserError: a share, a penalty or sizes that do not fit.
    """
    if not 0 <= config.corrupted < 1:
        raise UserError(f"problem.corrupted={config.corrupted}: needed is a share in [0, 1)")
    if not config.penalty > 0:
        raise UserError(f"problem.penalty={config.penalty}: needed is a positive number: the inner problem has no end")
    cleaning = draw(config, seed)
    problem = BilevelProblem(cleaning.inner_loss, cleaning.outer_loss)
    n, p = cleaning.train.X.shape
    moment = torch.linalg.eigvalsh(cleaning.train.X.T @ cleaning.train.X / n)[-1]
    stage = Stage(
        problem,
        torch.full((n,), config.start, dtype=torch.float64),
        torch.zeros(p, 10, dtype=torch.float64),
        # diag(q) - qq' <= 1/2 for probabilities q, and the weights are below 1.
        lambda x: moment / 2 + 2 * config.penalty,
        cleaning.figures,
    )
    return Experiment({"weights": stage}, cleaning.report)


def draw(config: HyperCleaningConfig, seed: int) -> "Cleaning":
    """Split the digits and replace labels, by the seed."""
    source = torch.Generator().manual_seed(seed)
    pixels, labels = load("digits")
    train, validation, test = split(len(labels), config, source)
    pixels = pixels / 16 - (pixels[train] / 16).mean(0)
    X = torch.cat([pixels, torch.ones(len(labels), 1).double()], 1)
    wrong = torch.rand(len(train), generator=source) < config.corrupted
    other = (labels[train] + torch.randint(1, 10, (len(train),), generator=source)) % 10
    given = Softmax(X[train], torch.where(wrong, other, labels[train]))
    clean, held_out = (Softmax(X[which], labels[which]) for which in (validation, test))
    return Cleaning(given, clean, held_out, wrong, config.penalty)


@dataclass(frozen=True)
class Softmax:
    """Softmax regression on samples X (n, p) with classes y (n,)."""

    X: Tensor
    y: Tensor

    def losses(self, W: Tensor) -> Tensor:
        """(n,): cross-entropies."""
        return -(self.X @ W).log_softmax(1)[torch.arange(len(self.y)), self.y]

    def accuracy(self, W: Tensor) -> float:
        return float(((self.X @ W).argmax(1) == self.y).double().mean())

    def fit(self, share: Tensor, penalty: float) -> Tensor:
        """argmin of the mean of share_i ce_i + penalty |W|^2, by L-BFGS."""
        W = torch.zeros(self.X.shape[1], 10, dtype=torch.float64, requires_grad=True)
        tolerances = {"tolerance_grad": 1e-8, "tolerance_change": 0}
        optimiser = torch.optim.LBFGS([W], max_iter=500, line_search_fn="strong_wolfe", **tolerances)

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = (share * self.losses(W)).mean() + penalty * W.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)  # pyright: ignore[reportArgumentType]
        return W.detach()


@dataclass(frozen=True)
class Cleaning:
    """The problem, and what its answer amounts to.

    Attributes:
        train, validation, test: samples; the labels of `train` are partly wrong.
        wrong: (n,), which.
        penalty: c.
    """

    train: Softmax
    validation: Softmax
    test: Softmax
    wrong: Tensor
    penalty: float

    def inner_loss(self, W: Tensor, x: Tensor) -> Tensor:
        return (x.sigmoid() * self.train.losses(W)).mean() + self.penalty * W.square().sum()

    def outer_loss(self, W: Tensor, x: Tensor) -> Tensor:
        return self.validation.losses(W).mean()

    def figures(self, x: Tensor, W: Tensor) -> Figures:
        return {"test_accuracy": self.test.accuracy(W), "auc": auc(x, ~self.wrong)}

    def rivals(self) -> dict[str, float]:
        """Test accuracies without learned weights, each with the penalty that is best for it on the test set."""
        train, validation = self.train, self.validation
        both = Softmax(torch.cat([train.X, validation.X]), torch.cat([train.y, validation.y]))
        trained = {
            "all_training_labels": (train, torch.ones(len(train.y)).double()),
            "all_training_labels_and_clean_samples": (both, torch.ones(len(both.y)).double()),
            "clean_samples_alone": (validation, torch.ones(len(validation.y)).double()),
            "oracle_without_the_wrong_labels": (train, (~self.wrong).double()),
        }
        return {
            name: max(self.test.accuracy(samples.fit(share, penalty)) for penalty in PENALTIES)
            for name, (samples, share) in trained.items()
        }

    def report(self, outer: dict[str, Tensor]) -> dict[str, Any]:
        weights, wrong = outer["weights"].sigmoid(), self.wrong
        cleaned = self.train.fit(weights, self.penalty)
        return {
            "test_accuracy": {"cleaned": self.test.accuracy(cleaned), **self.rivals()},
            "auc_of_the_weights": auc(outer["weights"], ~wrong),
            "mean_weight": {"right": float(weights[~wrong].mean()), "wrong": float(weights[wrong].mean())},
            "wrong_labels": int(wrong.sum()),
            "samples": {"train": len(wrong), "validation": len(self.validation.y), "test": len(self.test.y)},
        }


def auc(score: Tensor, positive: Tensor) -> float:
    """The probability that a positive sample has the larger score, ties counted half; 0.5 where one kind is missing."""
    difference = score[positive][:, None] - score[~positive][None, :]
    return float(((difference > 0).double() + (difference == 0).double() / 2).mean()) if difference.numel() else 0.5
