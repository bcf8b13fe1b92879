"""What a network attends to: the probabilities of its attention layers, computed beside them and off the training path.

The operator of `theria.ops` never forms the (N, M) matrix; here it is formed, for one image, from the same q and k.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.learners import InContextLearner, Learner, takes_steps
from theria.data import Episode
from theria.meta.cavia import CAVIA
from theria.meta.functional import pure_function
from theria.meta.learner import Learner as BaseLearner
from theria.nn import MultiheadAttention, PrototypeTransformer, TransformerClassifier


def attention_maps(module: nn.Module, call: Callable[[], Any]) -> dict[str, Tensor]:
    """P (..., H, N, M) of every `MultiheadAttention` of `module` by its name, recorded while `call` runs the module."""
    maps: dict[str, Tensor] = {}
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, MultiheadAttention)]
    handles = [layer.register_forward_pre_hook(partial(_record, maps, name)) for name, layer in layers]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return maps


def probabilities(
    layer: MultiheadAttention, x: Tensor, context: Tensor | None = None, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) of a layer given its inputs: (..., H, N, M), at least float32."""
    context = x if context is None else context
    q, k = (
        linear(tokens).unflatten(-1, (layer.n_heads, -1)).transpose(-3, -2)
        for linear, tokens in ((layer.query, x), (layer.key, context))
    )
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).mT / math.sqrt(q.shape[-1])
    if layer.is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).nan_to_num(0.0)  # a row that sees no key attends to nothing, as in theria.ops


def entropy(P: Tensor) -> float:
    """The mean entropy of the rows of P (..., M), over that of a uniform row: 1 looks everywhere, 0 at one key."""
    return float(torch.special.entr(P).sum(-1).mean()) / math.log(P.shape[-1]) if P.shape[-1] > 1 else 0.0


class QueryAttention(NamedTuple):
    """Where the first query of a task looks.

    Attributes:
        layers: for each layer (H, M), rows that sum to 1.
        over: what the M keys are: "patches" of its own image, "cls" for those with a learned token before them,
            "support" examples (of regressions with a start token before them), or the "classes" of the task.
        entropies: of each layer, over all its rows.
    """

    layers: list[Tensor]
    over: str
    entropies: list[float]


def query_attention(learner: Learner, task: Episode) -> QueryAttention | None:
    """The attention of an adapted network for the first query of one task (no leading T); None without attention.

    A network that reads the support set shows the row of the query. One that reads an image alone shows the row of
    the token that its classifier reads; where that is the mean over the tokens, the mean over the rows.
    """
    if isinstance(learner, InContextLearner):
        return _in_context(learner, task)
    maps = list(_adapted_maps(learner, task).values())
    if not maps:
        return None
    network = next((m for m in learner.model.modules() if isinstance(m, TransformerClassifier)), None)
    cls = network is not None and network.cls is not None
    rows = [P[0, :, 0, :] if cls else P[0].mean(-2) for P in maps]
    return _seen(rows, "cls" if cls else "patches", maps)


def _in_context(learner: InContextLearner, task: Episode) -> QueryAttention | None:
    """That of the layers whose M keys are followed by the Q queries: (H, M + Q, M)."""
    queries, found = len(task.query_x), attention_maps(learner.model, lambda: learner.model(*task[:3])).values()
    maps = [P for P in found if P.ndim == 3 and P.shape[-2] == P.shape[-1] + queries]
    over = "classes" if isinstance(learner.model, PrototypeTransformer) else "support"
    return _seen([P[:, P.shape[-1], :] for P in maps], over, maps) if maps else None


def _seen(rows: list[Tensor], over: str, maps: list[Tensor]) -> QueryAttention:
    return QueryAttention([row.cpu() for row in rows], over, [entropy(P) for P in maps])


def _adapted_maps(learner: BaseLearner, task: Episode) -> dict[str, Tensor]:
    """Of the network after its inner steps, if it takes any, for the queries."""
    model: nn.Module = learner.model  # pyright: ignore[reportAssignmentType]
    function = pure_function(model, learner.batch_norm)
    parameters, inputs = {name: p.detach() for name, p in model.named_parameters()}, (task.query_x,)
    if takes_steps(learner):
        adapted = learner.adapt(task.support_x, task.support_y)
        parameters |= {name: p for name, p in adapted.items() if name in parameters}
        inputs = (*inputs, adapted["context"]) if isinstance(learner, CAVIA) else inputs
    return attention_maps(model, lambda: function(parameters, *inputs))


def _record(maps: dict[str, Tensor], name: str, layer: MultiheadAttention, inputs: tuple[Any, ...]) -> None:
    maps[name] = probabilities(layer, *inputs)
