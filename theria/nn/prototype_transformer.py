"""Prototypes that see each other: attention over the classes of a task, on a prototypical network."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theria.curvature.precision import at_least_float32
from theria.nn.in_context import ContextTransformer, class_means


class PrototypeTransformer(nn.Module):
    """Few-shot classification by distances to class prototypes that a transformer adapts to the task.

        z = embedding(x),   c_k = mean of z over the support of class k                    (Snell et al. 2017)
        (c', q') = (c, z) + W T(A c, A z + r)                                     logit_k = s similarity(q', c'_k)

    T is a `ContextTransformer`: prototypes attend to each other, as in FEAT (Ye et al. 2020, arXiv 1812.03664), and
    each query attends to the prototypes, so that both sides of a distance know which classes are to be told apart.
    W begins at zero: training begins at a plain prototypical network, and the transformer learns to correct it.

    No number of a class enters anywhere. So the logits follow a permutation of the labels exactly, and the
    parameters do not depend on the number of ways: train with 20, test with 5. Queries do not see each other.

    Args:
        embedding: images (..., C, H, W) -> (..., d), such as a `ResidualNet`.
        d: its width.
        ways: number of classes of a task; labels are integers in [0, ways), each in the support set. An attribute,
            which may be set; `forward` takes another.
        d_model, n_heads, n_layers, d_ff: of the transformer; 0 layers leave the prototypical network.
        similarity: "euclidean", -|q' - c'|^2, or "cosine".
        scale: where s begins. It is learned as "log_scale". None: 1 for "euclidean", 10 for "cosine".
        backend: which implementation of attention runs, see `theria.ops.sdpa`.

    Raises:
        ValueError: an unknown similarity, a scale that is not positive.
    """

    def __init__(
        self,
        embedding: nn.Module,
        d: int,
        ways: int,
        *,
        d_model: int = 256,
        n_heads: int = 4,
        n_layers: int = 2,
        d_ff: int | None = None,
        similarity: str = "euclidean",
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if similarity not in ("euclidean", "cosine"):
            raise ValueError(f"similarity={similarity!r} is not known: give 'euclidean' or 'cosine'")
        scale = {"euclidean": 1.0, "cosine": 10.0}[similarity] if scale is None else scale
        if not scale > 0:
            raise ValueError(f"scale={scale}: the scale of the logits has to be positive")
        self.embedding, self.ways, self.similarity = embedding, ways, similarity
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.transformer = None
        if n_layers:
            self.transformer = ContextTransformer(d_model, n_heads, n_layers, d_ff=d_ff, backend=backend)
            self.read, self.write = nn.Linear(d, d_model), nn.Linear(d_model, d)
            self.query = nn.Parameter(0.02 * torch.randn(d_model))  # r: tells a query from a prototype
            nn.init.zeros_(self.write.weight)
            nn.init.zeros_(self.write.bias)

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, ways: int | None = None) -> Tensor:
        """support_x ([T,] S, C, H, W), support_y ([T,] S), query_x ([T,] Q, C, H, W) -> logits ([T,] Q, ways).

        A class without an example in the support set has NaN for its logits: nothing waits for the device to look.
        Under autocast the embeddings are averaged and compared in float32.
        """
        support, queries = (at_least_float32(self.embedding(x)) for x in (support_x, query_x))
        with torch.autocast(support.device.type, enabled=False):  # a mean of half precision would be rounded once more
            prototypes = class_means(support, support_y, self.ways if ways is None else ways)
        prototypes, queries = self.adapt(prototypes, queries)
        return self.log_scale.exp() * self._similarity(queries, prototypes)

    def adapt(self, prototypes: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """c (..., ways, d) and z (..., Q, d) -> c' and q'."""
        if self.transformer is None:
            return prototypes, queries
        c, q = self.transformer.both(self.read(prototypes), self.read(queries) + self.query)
        return prototypes + self.write(c), queries + self.write(q)

    def _similarity(self, queries: Tensor, prototypes: Tensor) -> Tensor:
        """(..., Q, d), (..., ways, d) -> (..., Q, ways)."""
        # Element by element: a product of matrices would be one of half precision under autocast, and in
        # 2 q.c - |c|^2 the digits of a small distance are lost.
        queries, prototypes = queries.unsqueeze(-2), prototypes.unsqueeze(-3)
        if self.similarity == "cosine":
            return (F.normalize(queries, dim=-1) * F.normalize(prototypes, dim=-1)).sum(-1)
        return -(queries - prototypes).square().sum(-1)
