"""Attention maps: rows that sum to 1, the softmax computed apart, and the output that they make."""

import math
from typing import cast

import pytest
import torch
from torch import nn

from experiments import attention_maps, pictures
from experiments.learners import InContextLearner
from tests.experiments.small import EXACT, F64, classification, mlp, regression, square, transformer
from theria import meta
from theria.data import Episode
from theria.nn import InContextClassifier, MultiheadAttention, PrototypeTransformer, TransformerBlock

MASKS = {
    "none": None,
    "boolean": torch.tensor([[True, False, True], [True, True, False], [False, True, True], [True, True, True]]),
    "additive": torch.linspace(-1, 1, 12, dtype=F64).view(4, 3),
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_maps_are_softmax_and_make_the_layers_output(mask):
    torch.manual_seed(0)
    layer = MultiheadAttention(6, 2).double()
    x, context = torch.randn(4, 6, dtype=F64), torch.randn(3, 6, dtype=F64)
    output = []
    call = lambda: output.append(layer(x, context, MASKS[mask]))  # noqa: E731
    (P,) = attention_maps.attention_maps(nn.Sequential(layer), call).values()
    assert P.shape == (2, 4, 3)
    torch.testing.assert_close(P.sum(-1), torch.ones(2, 4, dtype=F64), rtol=EXACT, atol=EXACT)
    for head in range(2):
        columns = slice(3 * head, 3 * head + 3)
        scores = layer.query(x)[:, columns] @ layer.key(context)[:, columns].T / 3**0.5
        if mask == "boolean":
            scores[~MASKS["boolean"]] = -math.inf
        elif mask == "additive":
            scores = scores + MASKS["additive"]
        apart = scores.exp() / scores.exp().sum(1, keepdim=True)
        torch.testing.assert_close(P[head], apart, rtol=EXACT, atol=EXACT)
    heads = [P[head] @ layer.value(context)[:, 3 * head : 3 * head + 3] for head in range(2)]
    torch.testing.assert_close(layer.out(torch.cat(heads, 1)), output[0], rtol=EXACT, atol=EXACT)
    assert not layer._forward_pre_hooks


def test_causal_attention_looks_back_only():
    layer = MultiheadAttention(4, 1, is_causal=True).double()
    x = torch.randn(3, 4, dtype=F64)
    P = attention_maps.probabilities(layer, x)
    assert torch.equal(P.triu(1), torch.zeros_like(P))
    torch.testing.assert_close(layer.out(P[0] @ layer.value(x)), layer(x), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_the_attention_of_a_query_is_that_of_the_adapted_network(pool):
    model, episode = transformer(pool), classification()
    learner = meta.MAML(model, nn.functional.cross_entropy, meta.SGD(lr=0.5), steps=2)
    task = Episode(*(field[0] for field in episode))
    seen = attention_maps.query_attention(learner, task)
    assert seen is not None
    copy = transformer(pool)
    copy.load_state_dict({name: p.detach() for name, p in learner.adapt(*task[:2]).items()})
    maps = list(attention_maps.attention_maps(copy, lambda: copy(task.query_x[:1])).values())
    assert len(seen.layers) == 2
    for row, P, entropy in zip(seen.layers, maps, seen.entropies, strict=True):
        expected = P[0, :, 0] if pool == "cls" else P[0].mean(1)
        torch.testing.assert_close(row, expected, rtol=EXACT, atol=EXACT)
        assert 0 < entropy <= 1
    unadapted = attention_maps.query_attention(meta.MAML(transformer(pool), nn.functional.cross_entropy), task)
    assert unadapted is not None
    assert not torch.allclose(unadapted.layers[1], seen.layers[1], rtol=1e-3)


def in_context(task):
    torch.manual_seed(0)
    model = InContextClassifier(3, stem="patch", d_model=8, n_heads=2, n_layers=2).double()
    seen = attention_maps.query_attention(InContextLearner(model, nn.functional.cross_entropy), task)
    assert seen is not None
    return seen


def test_the_attention_of_a_query_in_context_is_over_the_support_set():
    task = Episode(*(field[0] for field in classification()))
    seen = in_context(task)
    assert seen.over == "support"
    assert [row.shape for row in seen.layers] == [(2, 3)] * 2
    for row in seen.layers:
        torch.testing.assert_close(row.sum(-1), torch.ones(2, dtype=F64), rtol=EXACT, atol=EXACT)
    # Another order of the support set is another order of the columns; the other queries do not matter.
    turned = Episode(task.support_x.flip(0), task.support_y.flip(0), task.query_x[:1], task.query_y[:1])
    other = in_context(turned)
    torch.testing.assert_close(other.layers[1], seen.layers[1].flip(-1), rtol=1e-8, atol=1e-8)


def test_the_attention_of_a_query_on_prototypes_is_over_the_classes(tmp_path):
    torch.manual_seed(0)
    embedding = nn.Sequential(nn.Flatten(-3), nn.Linear(784, 6))
    model = PrototypeTransformer(embedding, 6, 3, d_model=8, n_heads=2, n_layers=2).double()
    task = Episode(*(field[0] for field in classification(shots=2)))
    seen = attention_maps.query_attention(InContextLearner(model, nn.functional.cross_entropy), task)
    assert seen is not None
    assert seen.over == "classes"
    z = embedding(task.support_x)
    c = torch.stack([z[task.support_y == k].mean(0) for k in range(3)])
    assert model.transformer is not None
    layer = cast(TransformerBlock, model.transformer.blocks[0])
    tokens = layer.norm1(torch.cat([model.read(c), model.read(embedding(task.query_x)) + model.query]))
    P = attention_maps.probabilities(layer.attention, tokens, tokens[:3])
    torch.testing.assert_close(seen.layers[0], P[:, 3], rtol=EXACT, atol=EXACT)
    assert pictures.attention(seen, task, tmp_path / "classes.png").exists()


def test_entropy_is_1_everywhere_and_0_at_one_key():
    assert attention_maps.entropy(torch.full((2, 4), 0.25)) == pytest.approx(1)
    assert attention_maps.entropy(torch.eye(3)) == 0
    half = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert attention_maps.entropy(half) == pytest.approx(0.5)  # log 2 of log 4


def test_a_network_without_attention_has_no_maps():
    assert attention_maps.query_attention(meta.MAML(mlp(), square), Episode(*(f[0] for f in regression()))) is None


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_pictures_are_drawn(pool, tmp_path):
    from matplotlib.image import imread

    learner = meta.MAML(transformer(pool), nn.functional.cross_entropy, meta.SGD(lr=0.5), steps=1)
    episode = classification()
    task = Episode(*(field[0] for field in episode))
    seen = attention_maps.query_attention(learner, task)
    assert seen is not None
    drawn = [
        pictures.attention(seen, task, tmp_path / "attention.png"),
        pictures.attention(in_context(task), task, tmp_path / "context.png"),
        pictures.episode(learner, episode, 1, tmp_path / "episode.png"),
    ]
    for path in drawn:
        assert imread(path).std() > 0.01, f"{path} is empty"
