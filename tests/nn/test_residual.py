"""The residual network: its norm against PyTorch's, its shapes, what an image's embedding depends on, its stem.

Its derivatives of second order are in test_second_order.py.
"""

from typing import Any

import pytest
import torch
from torch import nn

from theria.nn import GroupNorm, InContextClassifier, ResidualNet, ResidualStem, TransformerClassifier, residual_net
from theria.nn.residual import ResidualBlock

EXACT = 1e-12  # float64, the same arithmetic in another order


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (384, 8), (20, 1), (8, 2), (18, 2), (3, 1)])
def test_group_norm_equals_torch(channels, groups):
    torch.manual_seed(0)
    ours, theirs = GroupNorm(channels).double(), nn.GroupNorm(groups, channels).double()
    assert ours.groups == groups
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = 3 * torch.randn(2, channels, 3, 5, dtype=torch.float64) + 1
    torch.testing.assert_close(ours(x), theirs(x), rtol=EXACT, atol=EXACT)
    half = ours.bfloat16()(x.bfloat16())
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half, theirs.bfloat16()(x.bfloat16()), rtol=2**-6, atol=2**-6)  # two bf16 roundings


@pytest.mark.parametrize("mean", [1e3, 1e-3])
def test_group_norm_keeps_the_digits_of_a_small_variance(mean):
    """Variance 1 around a mean of 1,000: E[x²] - E[x]² would lose half of float32's digits."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64) + mean
    # float32 rounds at 6e-8: the input, of the size of the mean, and an output of 4, a few times each.
    single, double = GroupNorm(8)(x.float()).double(), GroupNorm(8).double()(x)
    torch.testing.assert_close(single, double, rtol=0, atol=5e-7 * (1 + mean))


def test_a_residual_block_is_its_formula():
    torch.manual_seed(0)
    block = ResidualBlock(1, 4, norm="group", downsample="stride").double()
    x = torch.randn(2, 1, 7, 7, dtype=torch.float64)
    gelu, conv = nn.functional.gelu, nn.functional.conv2d
    h = gelu(block.norm1(conv(x, block.conv1.weight, stride=2, padding=1)))
    h = block.norm2(conv(h, block.conv2.weight, padding=1))
    expected = gelu(h + x[..., ::2, ::2] * block.shortcut.weight[:, 0])
    torch.testing.assert_close(block(x), expected, rtol=EXACT, atol=EXACT)


def test_a_pooled_block_is_one_without_a_stride_and_a_pooling():
    torch.manual_seed(0)
    block = ResidualBlock(1, 4, norm="group", downsample="max_pool").double()
    x = torch.randn(2, 1, 7, 7, dtype=torch.float64)
    block.pooled = False
    full = block(x)
    block.pooled = True
    assert full.shape == (2, 4, 7, 7)
    torch.testing.assert_close(
        block(x)[..., :3, :3], full[..., :6, :6].unfold(-2, 2, 2).unfold(-2, 2, 2).amax((-2, -1))
    )
    torch.testing.assert_close(block(x)[..., 3, 3], full[..., 6, 6], rtol=0, atol=0)


@pytest.mark.parametrize("downsample", ["stride", "max_pool"])
@pytest.mark.parametrize(("side", "cells"), [(28, 2), (64, 4), (27, 2)])
def test_the_map_is_halved_four_times_and_the_parameters_do_not_depend_on_the_side(side, cells, downsample):
    model = residual_net(width=4, downsample=downsample)
    assert model.features(torch.rand(2, 1, side, side)).shape == (2, 24, cells, cells)
    assert parameters(model) == parameters(residual_net(width=4))


def test_the_default_has_three_and_a_half_million_parameters():
    assert 3.4e6 < parameters(ResidualNet()) < 3.6e6
    assert parameters(residual_net()) == parameters(ResidualNet())
    assert not list(ResidualNet().buffers())


def test_any_leading_dimensions_and_a_classifier():
    torch.manual_seed(0)
    model = residual_net(3, width=4).double()
    x = torch.rand(2, 3, 1, 28, 28, dtype=torch.float64)
    y = model(x)
    assert y.shape == (2, 3, 3)
    torch.testing.assert_close(model(x[1]), y[1], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(model(x[1, 2]), y[1, 2], rtol=EXACT, atol=EXACT)
    model.head = nn.Identity()  # what a metric learner does
    torch.testing.assert_close(model(x), model.features(x).mean((-2, -1)), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("norm", "alone"), [("group", True), ("batch", False)])
def test_an_image_is_embedded_by_itself_unless_the_batch_is_asked_for(norm, alone):
    torch.manual_seed(0)
    model = residual_net(width=4, norm=norm).double()
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    difference = (model(x)[:2] - model(x[:2])).abs().max()
    assert (difference < EXACT) == alone
    torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=0, atol=0)


@pytest.mark.parametrize(("side", "tokens"), [(28, 16), (64, 64), (27, 16)])
def test_stem_gives_one_token_for_each_cell(side, tokens):
    torch.manual_seed(0)
    stem = ResidualStem(8, image_size=side).double()
    x = torch.rand(2, 3, 1, side, side, dtype=torch.float64)
    y = stem(x)
    assert y.shape == (2, 3, stem.n_tokens, 8) == (2, 3, tokens, 8)
    torch.testing.assert_close(stem(x[1, 2]), y[1, 2], rtol=EXACT, atol=EXACT)
    features = stem.convolutions.features(x[1, 2])
    rows = features.shape[-1]
    torch.testing.assert_close(y[1, 2, rows + 1], features[:, 1, 1] + stem.position[rows + 1], rtol=EXACT, atol=EXACT)


def test_transformers_take_the_stem():
    x = torch.rand(2, 3, 1, 64, 64)
    small: dict[str, Any] = {"image_size": 64, "d_model": 8, "n_heads": 2, "n_layers": 1}
    assert TransformerClassifier(5, stem="residual", **small)(x).shape == (2, 3, 5)
    labels = torch.arange(3).repeat(2, 1)
    assert InContextClassifier(3, stem="residual", **small)(x, labels, x[:, :2]).shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResidualNet(norm="layer"), "norm='layer'"),
        (lambda: ResidualNet(downsample="none"), "downsample='none'"),
        (lambda: ResidualNet(widths=[]), r"widths=\[\]"),
        (lambda: residual_net(width=0), r"widths=\[0, 0, 0, 0\]"),
        (lambda: ResidualStem(6), "d_model=6"),
    ],
)
def test_impossible_sizes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
