"""Learners by gradient steps whose linear classifier is made anew for each task, on an embedding that is learned.

Nothing of such a learner depends on how the classes are numbered, nor on how many there are: what it learned at 20 ways
is evaluated at 5 by setting `ways`. Where the classifier begins is what `ProtoMAML` and `UnicornMAML` differ in.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from theria.curvature.second_order import second_order
from theria.meta.adjoint import Adjoint, Context, InnerLoss, Unrolled
from theria.meta.checks import Adapt, Count, check_embedding, check_every_class, check_start, names_of, select, within
from theria.meta.functional import Predictor, in_full, one_hot
from theria.meta.learner import GradientLearner, LossFn
from theria.meta.optimisers import SGD, InnerOptimiser, Params

HEAD, WEIGHT, BIAS = "head", "head.weight", "head.bias"


class TaskHeadLearner(GradientLearner):
    """Gradient steps on the support set from a classifier that `_head_start` makes, and from the embedding.

    Where the optimiser learns a rate for each entry of a parameter, the classifier has one for its weight and one for
    its bias: one for each entry would depend on the order of the classes, and on their number.

    Args:
        model: the embedding f: an `nn.Module` x (B, *x) -> (B, d), or a pure function with `params`. It has no
            parameter of its own called "head.weight" or "head.bias", and where `adapt` names "head", none in a module
            "head" either.
        loss_fn: of logits (S, ways) and labels; default cross-entropy.
        ways: number of classes of a task; labels are integers in [0, ways), each in the support set. Nothing that is
            learned depends on it: `learner.ways = 5` evaluates at 5 what learned at 20.
        inner, steps, adjoint: as in `MAML`.
        adapt: what the inner steps change: "head" alone, names of the model's parameters or modules with it, such as
            ["body.3", "head"], a predicate, or None for everything that requires grad. If it is the head alone, the
            support is embedded once. The default is that of each learner.
    The others: see `Learner`.

    `adapt` returns all parameters of the model by its own names, and "head.weight" (ways, d) and "head.bias" (ways,).
    """

    ways = Count()

    def __init__(
        self,
        model: nn.Module | Predictor,
        loss_fn: LossFn | None = None,
        inner: InnerOptimiser | None = None,
        steps: int = 5,
        adjoint: Adjoint | None = None,
        adapt: Adapt = None,
        *,
        ways: int,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            F.cross_entropy if loss_fn is None else loss_fn,
            SGD(lr=0.1) if inner is None else inner,
            steps,
            Unrolled() if adjoint is None else adjoint,
            **options,
        )
        self.ways = ways
        self._choose(adapt)
        self._embeds_each_step = any(name not in (WEIGHT, BIAS) for name in self.adapted)
        check_start(self.adjoint, learned=self._learns_more)

    def _choose(self, adapt: Adapt) -> None:
        """Adapt these parameters of the model and of the classifier; None: all but those that are frozen."""
        theta, names = self._theta(dict(self.named_parameters())), self._all_names
        initial = {name: p.detach() for name, p in theta.items()}
        if not initial:
            raise ValueError("the model has no parameters: there is no embedding to learn")
        taken = [name for name in (WEIGHT, BIAS) if name in names]
        if taken:
            raise ValueError(
                f"the model has parameters {taken}, names that the classifier made for each task needs: give the "
                f"embedding, a model without its last layer (model.head = nn.Identity())"
            )
        own = next((name for name in names if within(name, HEAD)), None)
        if own is not None and adapt is not None and not callable(adapt) and HEAD in names_of(adapt):
            raise ValueError(
                f"adapt={adapt!r}: {HEAD!r} is the classifier made for each task, and the model has {own!r} of its "
                f"own: give {[WEIGHT, BIAS]} for the classifier, and whole names such as {own!r} for the model's"
            )
        like = next(iter(initial.values()))
        # One entry: what broadcasts to every number of classes, and treats them alike.
        head = {WEIGHT: like.new_zeros(1, 1), BIAS: like.new_zeros(1)}
        default = {*head, *(name for name, p in theta.items() if p.requires_grad)}
        chosen = select({**names, WEIGHT: WEIGHT, BIAS: BIAS}, adapt, default)
        self._learn_rates({name: {**initial, **head}[name] for name in chosen})

    def _problem(
        self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[InnerLoss, Params, Context, Params]:
        theta = self._theta(meta_params)
        before, after = self._stages
        data = second_order(before)(theta, x)
        h = check_embedding(second_order(after)(theta, data), x)
        member = one_hot(y, self.ways)
        check_every_class(member, y)
        everything = {**theta, **self._head_start(h, member)}
        # Views: the classifier may be made of the same parameters, and an adjoint that asks autograd for the inner
        # gradient (`Higher`) would get the total derivative, through the start too, where a step takes the partial one.
        start = {name: everything[name].view_as(everything[name]) for name in self.adapted}
        fixed = {name: p for name, p in everything.items() if name not in start}
        context = {**fixed, **self._constants}, data if self._embeds_each_step else h, y
        return self._support_loss, start, context, fixed

    @abstractmethod
    def _head_start(self, h: Tensor, member: Tensor) -> Params:
        """The classifier before the first step, WEIGHT and BIAS, of embeddings h (S, d), whose classes member
        (S, ways) says."""

    def _classify(self, params: Params, h: Tensor) -> Tensor:
        """Embeddings (B, d) -> logits (B, ways)."""
        return _linear(h, params[WEIGHT], params[BIAS])

    def _support_loss(self, params: Params, context: tuple[Params, Tensor, Tensor]) -> Tensor:
        """The inner loss, given (the other parameters and buffers, data, y).

        The data are as in `GradientLearner._context`, or the embeddings where the inner steps do not change them.
        """
        fixed, data, y = context
        everything = {**fixed, **params}
        _, after = self._stages

        def logits() -> Tensor:
            return self._classify(everything, after(_of_model(everything), data) if self._embeds_each_step else data)

        return self._loss(logits, y, "support set")

    def _output(self, model: Predictor, meta_params: Mapping[str, Tensor], adapted: Params, x: Tensor) -> Tensor:
        return self._classify(adapted, model(_of_model(adapted), x))


def _of_model(everything: Params) -> Params:
    """The parameters without the classifier's."""
    return {name: p for name, p in everything.items() if name not in (WEIGHT, BIAS)}


@in_full
def _linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return h @ weight.T + bias
