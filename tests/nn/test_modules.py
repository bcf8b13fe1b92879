"""Each module against PyTorch's own modules, or against the sentence that defines it."""

import pytest
import torch
from torch import nn

from theria.nn import (
    MLP,
    BatchNorm2d,
    ConvNet4,
    ConvStem,
    LayerNorm,
    MultiheadAttention,
    PatchEmbedding,
    Transformer,
    TransformerBlock,
    TransformerClassifier,
)

EXACT = 1e-12  # float64, the same arithmetic in another order


def copy_attention(ours: MultiheadAttention, theirs: nn.MultiheadAttention) -> None:
    with torch.no_grad():
        for name, rows in zip(("query", "key", "value"), theirs.in_proj_weight.chunk(3), strict=True):
            getattr(ours, name).weight.copy_(rows)
        for name, rows in zip(("query", "key", "value"), theirs.in_proj_bias.chunk(3), strict=True):
            getattr(ours, name).bias.copy_(rows)
        ours.out.load_state_dict(theirs.out_proj.state_dict())


@pytest.mark.parametrize("cross", [False, True])
def test_attention_equals_torch(cross):
    torch.manual_seed(0)
    ours, theirs = MultiheadAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    copy_attention(ours, theirs)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    context = torch.randn(2, 7, 12, dtype=torch.float64) if cross else x
    expected = theirs(x, context, context, need_weights=False)[0]
    torch.testing.assert_close(ours(x, context if cross else None), expected, rtol=EXACT, atol=EXACT)


def test_attention_to_itself_is_attention_to_a_context_of_itself():
    """One product for queries, keys and values, or three: the same to second order."""
    torch.manual_seed(0)
    layer = MultiheadAttention(8, 2).double()
    x, parameters = torch.randn(2, 5, 8, dtype=torch.float64), list(layer.parameters())

    def derivatives(out):
        first = torch.autograd.grad(out.square().sum(), parameters, create_graph=True)
        return [out, *first, *torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), parameters)]

    for a, b in zip(derivatives(layer(x)), derivatives(layer(x, x)), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("how", ["hook", "global hook", "no bias", "another module", "another function"])
def test_attention_calls_layers_that_are_more_or_less_than_a_weight_and_a_bias(how):
    torch.manual_seed(0)
    layer = MultiheadAttention(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    before = layer(x)
    hook = None
    if how == "hook":
        layer.query.register_forward_hook(lambda *given: 2 * given[-1])  # pyright: ignore[reportOperatorIssue]
    elif how == "global hook":
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, _, out: 2 * out if module is layer.query else None
        )
    elif how == "another function":
        query = layer.query.forward
        layer.query.forward = lambda x: 2 * query(x)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        new = torch.nn.Linear(8, 8, bias=False).double()
        layer.query = new if how == "no bias" else torch.nn.Sequential(new)  # pyright: ignore
    try:
        found, wanted = layer(x), layer(x, x)
    finally:
        if hook is not None:
            hook.remove()
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("widths", [(8, 8, 16), (4, 4, 16), (16, 16, 4)])
def test_attention_with_layers_of_other_widths(widths):
    torch.manual_seed(0)
    layer = MultiheadAttention(8, 2)
    layer.query, layer.key, layer.value = (nn.Linear(8, width) for width in widths)
    layer.out = nn.Linear(widths[-1], 8)
    layer.double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer(x, x), rtol=EXACT, atol=EXACT)


def test_attention_with_layers_that_do_not_fit():
    """They are 24 wide together, as those that fit are."""
    layer = MultiheadAttention(8, 2)
    layer.query, layer.key = nn.Linear(8, 4), nn.Linear(8, 12)
    with pytest.raises(ValueError, match="one width D"):
        layer(torch.randn(2, 5, 8))


@pytest.mark.parametrize("causal", [False, True])
def test_block_equals_torch_encoder_layer(causal):
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(
        12, 3, dim_feedforward=20, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    ours = TransformerBlock(12, 3, d_ff=20, is_causal=causal).double()
    copy_attention(ours.attention, theirs.self_attn)
    for mine, its in [
        (ours.norm1, theirs.norm1),
        (ours.norm2, theirs.norm2),
        (ours.feed_forward[0], theirs.linear1),
        (ours.feed_forward[2], theirs.linear2),
    ]:
        mine.load_state_dict(its.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None
    torch.testing.assert_close(ours(x), theirs(x, src_mask=mask), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (LayerNorm(6), nn.LayerNorm(6), (2, 3, 6)),
        (BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 5)),
    ],
    ids=["layer", "batch"],
)
def test_norms_equal_torch(ours, theirs, shape):
    torch.manual_seed(0)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = 3 * torch.randn(shape, dtype=torch.float64) + 1
    torch.testing.assert_close(ours.double()(x), theirs.double()(x), rtol=EXACT, atol=EXACT)
    half = ours.bfloat16()(x.bfloat16())
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half, theirs.bfloat16()(x.bfloat16()), rtol=2**-7, atol=2**-7)  # one bf16 rounding


def test_causal_transformer_does_not_see_the_future():
    torch.manual_seed(0)
    model = Transformer(8, 2, 2, is_causal=True).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    changed = torch.cat([x[:4], torch.randn(2, 8, dtype=torch.float64)])
    torch.testing.assert_close(model(x)[:4], model(changed)[:4], rtol=0, atol=0)
    assert (model(x)[4:] - model(changed)[4:]).abs().max() > 1e-3


def test_patch_embedding_is_a_strided_convolution():
    torch.manual_seed(0)
    stem = PatchEmbedding(6, image_size=12, channels=2, patch=4).double()
    x = torch.randn(3, 2, 12, 12, dtype=torch.float64)
    kernel = stem.projection.weight.reshape(6, 2, 4, 4)
    expected = nn.functional.conv2d(x, kernel, stem.projection.bias, stride=4).flatten(2).mT + stem.position
    assert stem.n_tokens == 9
    torch.testing.assert_close(stem(x), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("stem", "side"), [(PatchEmbedding(6), 28), (ConvStem(6), 28), (ConvStem(6, image_size=27), 27)]
)
def test_stems_take_any_leading_dimensions(stem, side):
    stem = stem.double()
    x = torch.randn(2, 3, 1, side, side, dtype=torch.float64)
    y = stem(x)
    assert y.shape == (2, 3, stem.n_tokens, 6)
    torch.testing.assert_close(stem(x[1]), y[1], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(stem(x[1, 2]), y[1, 2], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("downsample", "image_size", "features"), [("stride", 28, 64), ("max_pool", 28, 64), ("max_pool", 84, 1600)]
)
def test_convnet4_has_the_papers_shape(downsample, image_size, features):
    model = ConvNet4(5, image_size=image_size, downsample=downsample)
    assert model.head.in_features == features
    assert model(torch.randn(2, 1, image_size, image_size)).shape == (2, 5)
    assert not list(model.buffers())


def test_convnet4_normalises_by_the_batch_in_train_and_eval():
    torch.manual_seed(0)
    model, x = ConvNet4(5), torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(model.eval()(3 * x + 1), model.train()(3 * x + 1), rtol=0, atol=0)
    # Both BatchNorms: each output depends on the whole batch.
    assert (model(x)[:2] - model(x[:2])).abs().max() > 1e-4


def test_mlp_sizes_and_head():
    model = MLP([1, 40, 40, 1])
    assert sum(p.numel() for p in model.parameters()) == 1761  # 80 + 1640 + 41
    assert model.head.in_features == 40


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_classifier_starts_almost_undecided(stem, pool):
    torch.manual_seed(0)
    model = TransformerClassifier(5, stem=stem, pool=pool, d_model=16, n_layers=1)
    probabilities = model(torch.rand(8, 1, 28, 28)).softmax(-1)
    assert probabilities.shape == (8, 5)
    assert 0 < (probabilities - 0.2).abs().max() < 0.05


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiheadAttention(10, 3), "d_model=10, n_heads=3"),
        (lambda: PatchEmbedding(8, image_size=28, patch=5), "patch=5 does not divide image_size=28"),
        (lambda: TransformerClassifier(5, stem="vit"), "stem='vit'"),
        (lambda: TransformerClassifier(5, pool="max"), "pool='max'"),
        (lambda: ConvNet4(5, downsample="none"), "downsample='none'"),
        (lambda: ConvNet4(5, image_size=8, downsample="max_pool"), "image_size=8"),
        (lambda: MLP([3]), r"sizes=\[3\]"),
    ],
)
def test_impossible_sizes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
