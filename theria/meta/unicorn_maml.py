"""UNICORN-MAML: MAML whose classifier starts alike for every class (Ye and Chao 2022, arXiv 2106.16245)."""

from math import sqrt

from torch import Tensor

from theria.meta.checks import Adapt
from theria.meta.optimisers import Params
from theria.meta.task_head import BIAS, WEIGHT, TaskHeadLearner


class UnicornMAML(TaskHeadLearner):
    """MAML that cannot tell one class from another before it has seen the support set.

    MAML learns a classifier with one row for each class, though how the classes of a task are numbered is chance. The
    paper learns one row w for all of them instead. With the softmax and any w the steps are those from zero, which
    is where this starts:

        logits_k = w_k . f(x) + b_k with w_k = w + v_k, b_k = a + u_k, and p = softmax(logits);
        w . f(x) + a is the same for each k, so that p depends on v and u alone, and so do the gradients
        (p_k - y_k) f(x) in w_k, p_k - y_k in b_k, and sum_k (p_k - y_k) w_k = sum_k (p_k - y_k) v_k in f(x),
        since sum_k (p_k - y_k) = 0.

    So w would never be learned, and there is none. How large a step of the classifier is does not depend on the number
    of classes here, so that what was learned at 20 ways is right at 5: the logits are

        sqrt(ways) (w_k . f(x) + b_k),

    with which a step of rate r moves the classifier as one of rate `ways` r without the factor. The first step, from
    p = 1 / ways, makes a classifier of class means c_k, for as many examples of each class

        sqrt(ways) w_k = r (c_k - mean of c),   b_k = 0,

    and changes nothing else, since the gradient in f(x) is zero there; the later ones move the embedding with it. At
    least two steps, then, where the embedding is to adapt.

    Args:
        model: the embedding f: an `nn.Module` x (B, *x) -> (B, d), or a pure function with `params`. It has no
            parameter of its own called "head.weight" or "head.bias".
        loss_fn: of logits (S, ways) and labels, by their softmax; default cross-entropy.
        ways: number of classes of a task; labels are integers in [0, ways), each in the support set. Nothing that is
            learned depends on it: `learner.ways = 5` evaluates at 5 what learned at 20.
        inner, steps, adjoint: as in `MAML`.
        adapt: what the inner steps change: None for everything that requires grad (the default), "head" alone, or names
            of the model's parameters or modules with it, such as ["body.3", "head"]. If it is the head alone, the
            support is embedded once.
    The others: see `Learner`.

    Raises:
        ValueError: `adapt` without the classifier, which would stay at zero.

    Where the optimiser learns a rate for each entry of a parameter, the classifier has one for its weight and one for
    its bias: one for each entry would depend on the order of the classes.

    `adapt` returns all parameters of the model by its own names, and "head.weight" (ways, d) and "head.bias" (ways,),
    w and b above.
    """

    def _choose(self, adapt: Adapt) -> None:
        super()._choose(adapt)
        if WEIGHT not in self.adapted:
            raise ValueError(
                f"adapt={adapt!r} leaves out {WEIGHT!r}: the classifier starts at zero, and would stay there, so that "
                f"nothing could be learned: add 'head'"
            )

    def _head_start(self, h: Tensor, member: Tensor) -> Params:
        return {WEIGHT: h.new_zeros(self.ways, h.shape[-1]), BIAS: h.new_zeros(self.ways)}

    def _classify(self, params: Params, h: Tensor) -> Tensor:
        return sqrt(self.ways) * super()._classify(params, h)
