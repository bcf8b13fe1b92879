"""UNICORN-MAML: MAML whose classifier starts alike for every class (Ye and Chao 2022, arXiv 2106.16245)."""

from math import sqrt

from torch import Tensor

from theria.curvature.precision import at_least_float32
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
        loss_fn: of logits (S, ways) and labels, by their softmax; default cross-entropy.
        adapt: what the inner steps change, the classifier's weight among it; everything that requires grad by default.
    The others, and what `adapt` returns: see `TaskHeadLearner`; "head.weight" and "head.bias" are w and b above.

    Raises:
        ValueError: `adapt` without the classifier's weight, which would stay at zero.
    """

    def _choose(self, adapt: Adapt) -> None:
        super()._choose(adapt)
        if WEIGHT not in self.adapted:
            raise ValueError(
                f"adapt={adapt!r} leaves out {WEIGHT!r}: the classifier starts at zero, and would stay there, so that "
                f"nothing could be learned: add 'head'"
            )

    def _head_start(self, h: Tensor, member: Tensor) -> Params:
        h = at_least_float32(h)  # autocast leaves half precision, in which small steps would round away
        return {WEIGHT: h.new_zeros(self.ways, h.shape[-1]), BIAS: h.new_zeros(self.ways)}

    def _classify(self, params: Params, h: Tensor) -> Tensor:
        return sqrt(self.ways) * super()._classify(params, h)
