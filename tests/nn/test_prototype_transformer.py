"""Attention on prototypes: where it begins, its symmetries, what it does not depend on, that it learns."""

import pytest
import torch
from torch import Tensor, nn

from theria.meta.protonet import ProtoNet
from theria.nn import InContextClassifier, PrototypeTransformer, residual_net
from theria.nn.in_context import class_means

EXACT = 1e-11  # float64, the same arithmetic in another order, through two blocks of attention
WAYS = 4


def build(similarity: str = "euclidean", learned: bool = True) -> PrototypeTransformer:
    """On a small residual network; `learned`: the transformer has begun to say something."""
    torch.manual_seed(0)
    embedding = residual_net(width=4)
    model = PrototypeTransformer(embedding, 24, WAYS, d_model=16, n_heads=2, n_layers=2, similarity=similarity).double()
    if learned:
        nn.init.normal_(model.write.weight, std=0.3)
        nn.init.normal_(model.write.bias, std=0.3)
    return model


@pytest.fixture(params=["euclidean", "cosine"])
def model(request: pytest.FixtureRequest) -> PrototypeTransformer:
    return build(request.param)


@pytest.fixture
def episode() -> tuple[Tensor, Tensor, Tensor]:
    """3 tasks of 4 classes, two examples each, 5 queries."""
    torch.manual_seed(1)
    x = torch.rand(3, 13, 1, 12, 12, dtype=torch.float64)
    return x[:, :8], torch.arange(WAYS).repeat(3, 2), x[:, 8:]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


def test_class_means_are_the_means_of_the_classes():
    torch.manual_seed(0)
    h, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([2, 0, 2, 2, 0, 2])
    means = class_means(h, y, 3)
    close(means[0], h[[1, 4]].mean(0))
    close(means[2], h[[0, 2, 3, 5]].mean(0))
    assert means[1].isnan().all()  # a class without a sample is loud


def test_it_begins_as_a_prototypical_network(episode):
    sx, sy, qx = episode
    model = build(learned=False)
    expected = ProtoNet(model.embedding, ways=WAYS).predict((sx, sy, qx, torch.zeros(3, 5, dtype=torch.int64)))
    close(model(*episode), expected)
    assert (build()(*episode) - expected).abs().max() > 1e-2
    model(*episode).square().sum().backward()
    assert model.write.weight.grad is not None
    assert model.write.weight.grad.abs().max() > 1e-6  # and leaves it at the first step


def test_cosine_begins_at_ten_times_the_cosine_of_embedding_and_mean(episode):
    sx, sy, qx = episode
    model = build("cosine", learned=False)
    c, q = class_means(model.embedding(sx), sy, WAYS), model.embedding(qx)
    assert model.log_scale.exp().item() == pytest.approx(10, rel=1e-6)  # of a float32 parameter
    expected = model.log_scale.exp() * nn.functional.cosine_similarity(q[:, :, None], c[:, None], dim=-1)
    close(model(*episode), expected)


def test_classes_may_be_numbered_in_any_order(model, episode):
    sx, sy, qx = episode
    expected, order = model(sx, sy, qx), torch.tensor([2, 0, 3, 1])  # class k is called order[k]
    close(model(sx, order[sy], qx)[..., order], expected)
    assert (model(sx, order[sy], qx) - expected).abs().max() > 1e-6


def test_the_order_of_the_support_does_not_matter(model, episode):
    sx, sy, qx = episode
    order = torch.randperm(8)
    close(model(sx[:, order], sy[:, order], qx), model(sx, sy, qx))


def test_queries_do_not_see_each_other(model, episode):
    sx, sy, qx = episode
    close(torch.cat([model(sx, sy, qx[:, i : i + 1]) for i in range(5)], 1), model(sx, sy, qx))


def test_classes_see_each_other(model, episode):
    """The logit of class 0 changes with the drawings of class 3: what a prototypical network does not do."""
    sx, sy, qx = episode
    other = torch.where((sy == 3)[..., None, None, None], sx.flip(-1), sx)
    assert (model(other, sy, qx) - model(sx, sy, qx))[..., 0].abs().max() > 1e-4
    plain = build(learned=False)
    close(plain(other, sy, qx)[..., 0], plain(sx, sy, qx)[..., 0])


def test_tasks_are_independent_and_vmap_agrees(model, episode):
    expected = torch.stack([model(*(part[t] for part in episode)) for t in range(3)])
    close(model(*episode), expected)
    close(torch.func.vmap(model)(*episode), expected)


def test_the_number_of_ways_is_free(model, episode):
    sx, sy, qx = episode
    two = (sx[:, :2], sy[:, :2], qx)
    expected = model(*two, ways=2)
    assert expected.shape == (3, 5, 2)
    model.ways = 2
    close(model(*two), expected)


def test_autocast_keeps_the_logits_and_their_gradient(model, episode):
    """bf16 has 8 bits: errors of 2^-8 of an embedding, a few of which meet in a logit."""
    model = model.float()
    sx, sy, qx = episode
    expected = model(sx.float(), sy, qx.float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(sx.float(), sy, qx.float())
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * expected.detach().abs().max().item())
    assert all(g.dtype is torch.float32 for g in torch.autograd.grad(logits.sum(), list(model.parameters())))


def test_autocast_rounds_the_embeddings_and_nothing_after_them(episode):
    sx, sy, qx = (x.float() if x.is_floating_point() else x for x in episode)
    model = PrototypeTransformer(residual_net(width=4), 24, WAYS, n_layers=0)
    with torch.autocast("cpu", torch.bfloat16):
        logits, support, queries = model(sx, sy, qx), model.embedding(sx), model.embedding(qx)
    assert support.dtype is torch.bfloat16
    means = torch.stack([support.double()[:, k::WAYS].mean(1) for k in range(WAYS)], 1)
    expected = -(queries.double()[:, :, None] - means[:, None]).square().sum(-1)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)  # float32, |q|^2 of the order of 1


def test_without_layers_it_is_prototypes_alone():
    model = PrototypeTransformer(residual_net(width=4), 24, WAYS, n_layers=0)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"embedding", "log_scale"}
    x = torch.rand(4, 1, 12, 12)
    assert model(x, torch.arange(4), x).argmax(-1).tolist() == [0, 1, 2, 3]


def test_it_learns_what_distances_of_fixed_features_cannot():
    """Each task tells its classes apart in one of two coordinates, and the other is noise. Which one says a third, that
    is the same for both classes and that the queries do not have: they have to look at the prototypes."""
    generator = torch.Generator().manual_seed(1)

    def sample(tasks: int) -> tuple[Tensor, ...]:
        hint = torch.randint(2, (tasks, 1, 1), generator=generator).expand(-1, 10, -1)
        labels = torch.arange(10).repeat(tasks, 1) % 2
        signal, noise = (2.0 * labels - 1).unsqueeze(-1), 2 * torch.randn(tasks, 10, 1, generator=generator)
        seen = torch.cat([2.0 * hint[:, :2] - 1, torch.zeros(tasks, 8, 1)], 1)
        x = torch.cat([torch.where(hint == 1, signal, noise), torch.where(hint == 1, noise, signal), seen], -1)
        return x[:, :2], labels[:, :2], x[:, 2:], labels[:, 2:]

    def error(model: PrototypeTransformer, episode: tuple[Tensor, ...]) -> Tensor:
        return nn.functional.cross_entropy(model(*episode[:3]).flatten(0, 1), episode[3].flatten())

    def trained(n_layers: int) -> float:
        torch.manual_seed(0)
        model = PrototypeTransformer(nn.Linear(3, 16), 16, 2, d_model=32, n_heads=2, n_layers=n_layers)
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(300):
            optimiser.zero_grad()
            error(model, sample(64)).backward()
            optimiser.step()
        test = sample(300)
        return float((model(*test[:3]).argmax(-1) == test[3]).float().mean())

    assert trained(0) < 0.8 < 0.95 < trained(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "dot"}, "similarity='dot'"),
        ({"scale": 0.0}, r"scale=0\.0"),
        ({"scale": float("nan")}, "scale=nan"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PrototypeTransformer(residual_net(width=4), 24, WAYS, **options)


def test_in_context_readout_by_prototypes(episode):
    """Order and vmap as with a linear head; a logit is a product with the mean token of a class."""
    torch.manual_seed(0)
    model = InContextClassifier(WAYS, readout="prototypes", image_size=12, d_model=16, n_heads=2, n_layers=2).double()
    sx, sy, qx = episode
    expected, order = model(sx, sy, qx), torch.randperm(8)
    close(model(sx[:, order], sy[:, order], qx), expected)
    close(torch.func.vmap(model)(*episode), expected)
    support = model._image(sx) + model.label[sy]
    tokens = model.transformer(support, torch.cat([support, model._image(qx) + model.unknown], -2))  # both as queries
    means = torch.stack([tokens[:, :8][:, torch.arange(k, 8, WAYS)].mean(1) for k in range(WAYS)], 1)
    close(expected, torch.einsum("tqd,tkd->tqk", tokens[:, 8:], means) / 4)
    with pytest.raises(ValueError, match="readout='mean'"):
        InContextClassifier(WAYS, readout="mean")
