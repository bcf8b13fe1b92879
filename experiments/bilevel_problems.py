"""The bilevel problems of `python -m experiments.bilevel`, on data that scikit-learn carries."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.bilevel_config import HyperCleaningConfig, ProblemConfig, RidgeConfig
from experiments.errors import UserError
from theria.meta.bilevel import BilevelProblem

Figures = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """One outer optimisation.

    Attributes:
        problem: what is minimised.
        outer0, inner0: where it begins.
        largest: outer -> a bound of the largest eigenvalue of the inner Hessian, () : its inverse is a safe rate.
        figures: (outer, inner) -> what a line of metrics.jsonl shows.
    """

    problem: BilevelProblem
    outer0: Tensor
    inner0: Tensor
    largest: Callable[[Tensor], Tensor]
    figures: Callable[[Tensor, Tensor], Figures]


@dataclass(frozen=True)
class Experiment:
    """Stages, in order, and what their answers amount to: (the outer variable of each stage) -> results."""

    stages: dict[str, Stage]
    report: Callable[[dict[str, Tensor]], dict[str, Any]]


def build(config: ProblemConfig, seed: int) -> Experiment:
    """The experiment of a configuration.

    Raises:
        UserError: sizes that the data set does not have.
    """
    match config:
        case HyperCleaningConfig():
            return hyper_cleaning(config, seed)
        case RidgeConfig():
            return ridge(config, seed)
    raise TypeError(f"no builder for {type(config).__name__}")


def load(name: str) -> tuple[Tensor, Tensor]:
    """A data set that scikit-learn carries, "digits" or "diabetes", in float64."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise UserError('scikit-learn is not installed: pip install -e ".[experiments]"') from error
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return torch.from_numpy(x).double(), torch.from_numpy(y)


def split(n: int, config: HyperCleaningConfig | RidgeConfig, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the training, validation and test samples.

    Raises:
        UserError: where nothing is left to test on.
    """
    if config.train < 1 or config.validation < 1 or config.train + config.validation >= n:
        raise UserError(
            f"problem.train={config.train}, problem.validation={config.validation}: both are at least 1, and of {n} "
            f"samples some have to be left to test on"
        )
    order = torch.randperm(n, generator=source)
    return order[: config.train], order[config.train :][: config.validation], order[config.train + config.validation :]


# ------------------------------------------------------------------------------------------------------ hyper-cleaning
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def hyper_cleaning(config: HyperCleaningConfig, seed: int) -> Experiment:
    """Softmax regression on digits whose training labels are partly wrong (Franceschi et al. 2017, arXiv 1703.01785).

    Inner: mean of s(x_i) ce_i + c |W|^2 over the training samples, s the sigmoid; outer: mean ce over clean samples.
    """
    if not 0 <= config.corrupted < 1:
        raise UserError(f"problem.corrupted={config.corrupted}: needed is a share in [0, 1)")
    if not config.penalty > 0:
        raise UserError(
            f"problem.penalty={config.penalty}: needed is a positive number, or the inner problem has no end"
        )
    source = torch.Generator().manual_seed(seed)
    pixels, labels = load("digits")
    train, validation, test = split(len(labels), config, source)
    pixels = pixels / 16 - (pixels[train] / 16).mean(0)
    features = torch.cat([pixels, torch.ones(len(labels), 1).double()], 1)
    wrong = torch.rand(len(train), generator=source) < config.corrupted
    other = (labels[train] + torch.randint(1, 10, (len(train),), generator=source)) % 10
    given = torch.where(wrong, other, labels[train])
    data = _Softmax(features[train], given), _Softmax(features[validation], labels[validation])
    held_out = _Softmax(features[test], labels[test])

    problem = BilevelProblem(
        lambda W, x: (x.sigmoid() * data[0].losses(W)).mean() + config.penalty * W.square().sum(),
        lambda W, x: data[1].losses(W).mean(),
    )
    moment = torch.linalg.eigvalsh(data[0].X.T @ data[0].X / len(train))[-1]

    def figures(x: Tensor, W: Tensor) -> Figures:
        return {"test_accuracy": held_out.accuracy(W), "auc": auc(x, ~wrong)}

    def report(outer: dict[str, Tensor]) -> dict[str, Any]:
        weights = outer["weights"].sigmoid()
        cleaned = data[0].fit(weights, config.penalty)
        both = _Softmax(torch.cat([data[0].X, data[1].X]), torch.cat([given, labels[validation]]))
        rivals = {
            "all_training_labels": (data[0], torch.ones(len(train)).double()),
            "all_training_labels_and_clean_samples": (both, torch.ones(len(both.X)).double()),
            "clean_samples_alone": (data[1], torch.ones(len(validation)).double()),
            "oracle_without_the_wrong_labels": (data[0], (~wrong).double()),
        }
        # Each rival has the penalty that is best for it on the test set: a figure in its favour.
        best = {
            name: max(held_out.accuracy(one.fit(share, c)) for c in PENALTIES) for name, (one, share) in rivals.items()
        }
        return {
            "test_accuracy": {"cleaned": held_out.accuracy(cleaned), **best},
            "auc_of_the_weights": auc(outer["weights"], ~wrong),
            "mean_weight": {"right": float(weights[~wrong].mean()), "wrong": float(weights[wrong].mean())},
            "wrong_labels": int(wrong.sum()),
            "samples": {"train": len(train), "validation": len(validation), "test": len(test)},
        }

    stage = Stage(
        problem,
        torch.full((len(train),), config.start, dtype=torch.float64),
        torch.zeros(features.shape[1], 10, dtype=torch.float64),
        # diag(q) - qq' <= 1/2 for probabilities q, and the weights are below 1.
        lambda x: moment / 2 + 2 * config.penalty,
        figures,
    )
    return Experiment({"weights": stage}, report)


@dataclass(frozen=True)
class _Softmax:
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


def auc(score: Tensor, positive: Tensor) -> float:
    """The probability that a positive sample has the larger score, ties counted half; 0.5 where one kind is missing."""
    difference = score[positive][:, None] - score[~positive][None, :]
    return float(((difference > 0).double() + (difference == 0).double() / 2).mean()) if difference.numel() else 0.5


# --------------------------------------------------------------------------------------------------------------- ridge
def ridge(config: RidgeConfig, seed: int) -> Experiment:
    """Ridge regression on the diabetes data; x is the logarithm of the penalty, then of one penalty for each feature.

    The features are the 10 of the data set and their 55 products, standardised. Inner: mean r^2 / 2 + sum_j exp(x_j)
    w_j^2 / 2 on the training samples; outer: mean r^2 / 2 on the validation samples.
    """
    if config.grid < 3 or not config.grid_from < config.grid_to:
        raise UserError(
            "problem.grid, grid_from, grid_to: needed are 3 points or more, from a lower to a higher number"
        )
    X, y = load("diabetes")
    y = y.double()
    train, validation, test = split(len(y), config, torch.Generator().manual_seed(seed))
    X = (X - X[train].mean(0)) / X[train].std(0)
    i, j = torch.triu_indices(X.shape[1], X.shape[1])
    X = torch.cat([X, X[:, i] * X[:, j]], 1)
    X = (X - X[train].mean(0)) / X[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    n, p = len(train), X.shape[1]
    gram, moment = X[train].T @ X[train] / n, X[train].T @ y[train] / n
    top = torch.linalg.eigvalsh(gram)[-1]

    def error(w: Tensor, which: Tensor) -> Tensor:
        return (X[which] @ w - y[which]).square().mean()

    def solution(x: Tensor) -> Tensor:
        return torch.linalg.solve(gram + torch.diag(x.exp().expand(p)), moment)

    def value(x: Tensor) -> Tensor:
        """h in closed form; its gradient by autograd is the hypergradient."""
        return error(solution(x), validation) / 2

    problem = BilevelProblem(
        lambda w, x: error(w, train) / 2 + (x.exp() * w.square()).sum() / 2, lambda w, x: error(w, validation) / 2
    )

    def figures(x: Tensor, w: Tensor) -> Figures:
        return {"validation_error": float(error(w, validation)), "test_error": float(error(w, test))}

    def report(outer: dict[str, Tensor]) -> dict[str, Any]:
        grid = torch.linspace(config.grid_from, config.grid_to, config.grid, dtype=torch.float64)
        values = torch.func.vmap(value)(grid)
        best = grid[values.argmin()]
        points = {
            "single": outer["single"],
            "per_feature": outer["per_feature"],
            "grid": best,
            "no_penalty": best - 60,
        }
        return {
            "log_penalty": {"learned": float(outer["single"]), "grid": float(best), "step": float(grid[1] - grid[0])},
            "log_penalty_per_feature": outer["per_feature"].tolist(),
            "validation_error": {name: float(error(solution(x), validation)) for name, x in points.items()},
            "test_error": {name: float(error(solution(x), test)) for name, x in points.items()},
            "hypergradient_left": {
                name: float(torch.func.grad(value)(outer[name]).norm()) for name in ("single", "per_feature")
            },
            "samples": {"train": n, "validation": len(validation), "test": len(test)},
        }

    def stage(x: Tensor) -> Stage:
        return Stage(problem, x, torch.zeros_like(moment), lambda x: top + x.exp().max(), figures)

    start = torch.tensor(config.start, dtype=torch.float64)
    return Experiment({"single": stage(start), "per_feature": stage(start.expand(p).clone())}, report)
