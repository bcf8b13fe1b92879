"""theria.data.Augment: what each deformation does in closed form, and the laws of its draws."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from theria.data import Augment
from theria.data.augment import Deformation, change_stroke, displacement, warp
from theria.data.draws import Draws

# float32 coordinates of up to 32 pixels round at 2e-6 of a pixel; the interpolation passes that on to the ink.
INTERPOLATED = 2e-5
# A smooth blob, sampled where it is well resolved: linear interpolation blurs it by (pixel / sigma)^2 / 8 and moves
# mass nowhere; what is left is the sum over pixels instead of the integral.
MASS = 5e-3
EVERYTHING = Augment(rotation=0.3, scale=0.2, shear=0.2, shift=0.1, elastic=0.1, elastic_grid=3, stroke=0.05)


def ink(n: int = 3, height: int = 20, width: int | None = None, margin: int = 0) -> Tensor:
    """Noise in [0, 1] with a margin of paper."""
    width = height if width is None else width
    images = torch.rand(n, 1, height - 2 * margin, width - 2 * margin, generator=torch.Generator().manual_seed(0))
    return F.pad(images, [margin] * 4)


def blob(side: int = 64, sigma: float = 5.0) -> Tensor:
    """A Gaussian in the middle, (1, 1, side, side)."""
    at = torch.arange(side) + 0.5 - side / 2
    line = torch.exp(-0.5 * (at / sigma) ** 2)
    return (line[:, None] * line).view(1, 1, side, side)


def deformation(n: int = 1, **changes: Tensor | None) -> Deformation:
    """The identity, but for what is given."""
    still = Deformation(
        torch.zeros(n), torch.ones(n, 2), torch.zeros(n), torch.zeros(n, 2), torch.zeros(n), torch.zeros(n, 2, 7, 7)
    )
    return still._replace(**changes)


def moments(image: Tensor) -> tuple[float, float, float]:
    """Mass and centre (x to the right, y down) of one image."""
    image = image.squeeze().double()
    y, x = (torch.arange(side, dtype=torch.float64) for side in image.shape)
    mass = image.sum()
    return float(mass), float((image.sum(0) * x).sum() / mass), float((image.sum(1) * y).sum() / mass)


# ------------------------------------------------------------------------------------------------------- the identity
def test_zero_everywhere_is_exactly_the_identity() -> None:
    images = ink()
    assert Augment().is_identity
    assert torch.equal(Augment()(images, Draws(0)), images)


@pytest.mark.parametrize("name", ["rotation", "scale", "shear", "shift", "elastic", "stroke"])
def test_each_bound_does_something(name: str) -> None:
    augment = replace(Augment(), **{name: 0.1})
    assert not augment.is_identity
    assert float((augment(ink(), Draws(0)) - ink()).abs().max()) > 0.01


# ------------------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (-4, 1)])
def test_a_shift_by_whole_pixels_moves_the_ink(right: int, down: int) -> None:
    images = ink(2, 20, 16, margin=4)
    moved = warp(images, deformation(2, shift=torch.tensor([right / 16, down / 20]).expand(2, 2)))
    assert (moved - images.roll((down, right), (-2, -1))).abs().max() < INTERPOLATED


@pytest.mark.parametrize("quarter", [-1, 1, 2])
def test_a_quarter_turn_is_rot90(quarter: int) -> None:
    images = ink()
    turned = warp(images, deformation(3, angle=torch.full((3,), quarter * math.pi / 2)))
    assert (turned - images.rot90(quarter, (-2, -1))).abs().max() < INTERPOLATED


def test_a_quarter_turn_of_a_wide_image_is_that_of_its_middle() -> None:
    images = F.pad(ink(1, 10), (6, 6))  # (10, 22)
    turned = warp(images, deformation(angle=torch.tensor([math.pi / 2])))
    assert (turned - F.pad(ink(1, 10).rot90(1, (-2, -1)), (6, 6))).abs().max() < INTERPOLATED


def test_doubling_repeats_what_halving_takes() -> None:
    """Halved, every pixel lies in the middle of 2x2 of the drawing: their mean."""
    images = ink(1, 16)
    halved = warp(images, deformation(scale=torch.full((1, 2), 0.5)))
    assert (halved - F.pad(F.avg_pool2d(images, 2), [4] * 4)).abs().max() < INTERPOLATED


def test_scales_multiply_the_mass_by_their_product() -> None:
    mass = moments(blob())[0]
    for x, y in ((1.3, 1.0), (0.8, 1.2)):
        scaled = warp(blob(), deformation(scale=torch.tensor([[x, y]])))
        assert moments(scaled)[0] == pytest.approx(mass * x * y, rel=MASS)


def test_rotation_and_shear_keep_the_mass_and_move_a_point_as_stated() -> None:
    angle, shear, above = 0.4, 0.25, 8
    image = blob(sigma=2.5).roll(-above, -2)
    mass, x, y = moments(warp(image, deformation(shear=torch.tensor([shear]))))
    assert (mass, x, y) == pytest.approx((moments(image)[0], 31.5 + shear * above, 31.5 - above), rel=MASS)
    mass, x, y = moments(warp(image, deformation(angle=torch.tensor([angle]))))
    left, up = above * math.sin(angle), above * math.cos(angle)  # counter-clockwise
    assert (mass, x, y) == pytest.approx((moments(image)[0], 31.5 - left, 31.5 - up), rel=MASS)


def test_shear_comes_before_rotation_and_scale_before_shear() -> None:
    """M = R(angle) [[1, -shear], [0, 1]] diag(scale): each step by itself, in that order, is the whole."""
    image, scale = blob(sigma=8.0), torch.tensor([[1.2, 0.9]])
    angle, shear, shift = torch.tensor([0.5]), torch.tensor([0.3]), torch.tensor([[0.05, -0.03]])
    whole = warp(image, deformation(angle=angle, scale=scale, shear=shear, shift=shift))
    steps: list[dict[str, Tensor]] = [{"scale": scale}, {"shear": shear}, {"angle": angle}, {"shift": shift}]
    for change in steps:
        image = warp(image, deformation(1, **change))
    assert (whole - image).abs().max() < 0.02  # four interpolations blur more than one
    wrong = warp(warp(blob(sigma=8.0), deformation(angle=angle)), deformation(scale=scale, shear=shear, shift=shift))
    assert (whole - wrong).abs().max() > 0.04


# ------------------------------------------------------------------------------------------------------------- elastic
def test_the_spline_reproduces_constants_and_linear_fields() -> None:
    """B-splines are a partition of unity and have linear precision: control points on a line give that line."""
    cells, height, width = 4, 12, 20
    knots = torch.arange(-1, cells + 2).float() / cells
    control = torch.stack([knots.expand(7, 7), knots[:, None].expand(7, 7)])[None]
    field = displacement(control, height, width)
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    assert torch.allclose(field[0, 0], x.expand(height, width), atol=1e-6)
    assert torch.allclose(field[0, 1], y[:, None].expand(height, width), atol=1e-6)
    assert torch.allclose(displacement(torch.ones(1, 2, 7, 7), 9, 9), torch.ones(1, 2, 9, 9), atol=1e-6)


def test_a_constant_displacement_is_a_shift_and_a_linear_one_a_scale() -> None:
    images = ink(1, 20, margin=4)
    constant = torch.tensor([0.1, -0.2]).view(1, 2, 1, 1).expand(1, 2, 7, 7)  # looks up 2 right and 4 up
    assert (warp(images, deformation(elastic=constant)) - images.roll((4, -2), (-2, -1))).abs().max() < INTERPOLATED
    knots = torch.arange(-1, 6).float() / 4 - 0.5
    outwards = torch.stack([knots.expand(7, 7), knots[:, None].expand(7, 7)])[None]
    twice_as_far = warp(images, deformation(elastic=outwards))
    halved = warp(images, deformation(scale=torch.full((1, 2), 0.5)))
    assert (twice_as_far - halved).abs().max() < INTERPOLATED


def test_the_displacement_has_the_stated_bound_and_size_and_does_not_fold() -> None:
    elastic, cells, side = 0.12, 4, 28
    augment = Augment(elastic=elastic, elastic_grid=cells)
    assert elastic <= 0.48 / cells
    control = augment.draw(2000, Draws(0)).elastic
    assert control is not None
    field = displacement(control, side, side)
    assert float(field.abs().max()) <= elastic
    assert float(field.square().mean().sqrt()) == pytest.approx(0.277 * elastic, rel=0.02)  # sqrt(1/3) * 151/315
    # At the bound, with every control point at a corner of its square: the Jacobian of q -> q + d(q) stays positive.
    fine = displacement(control.sign() * 0.48 / cells, 64, 64)
    along_x, along_y = fine.diff(dim=-1)[..., :-1, :] * 64, fine.diff(dim=-2)[..., :-1] * 64
    determinant = (1 + along_x[:, 0]) * (1 + along_y[:, 1]) - along_x[:, 1] * along_y[:, 0]
    assert float(determinant.min()) > 0


def test_elastic_keeps_the_mass_on_average() -> None:
    augment, image = Augment(elastic=0.08), blob(sigma=6.0)
    mass = augment(image.expand(4000, 1, 64, 64), Draws(1)).sum((1, 2, 3)) / image.sum()
    assert abs(float(mass.mean()) - 1) < 5 * float(mass.std()) / 4000**0.5 + 0.01  # E det of the inverse: second order
    assert 0.03 < float(mass.std()) < 0.3


# -------------------------------------------------------------------------------------------------------------- stroke
def test_whole_radii_are_dilations_and_erosions_by_squares() -> None:
    images = (ink(4, 18, margin=4) > 0.6).float()
    got = change_stroke(images, torch.tensor([1.0, 2.0, -1.0, 0.0]), 2)
    for row, radius in ((0, 1), (1, 2)):
        assert torch.equal(got[row], F.max_pool2d(images[row], 2 * radius + 1, 1, radius))
    assert torch.equal(got[2], 1 - F.max_pool2d(1 - images[2], 3, 1, 1))
    assert torch.equal(got[3], images[3])


def test_between_whole_radii_lies_their_mixture() -> None:
    images = torch.zeros(1, 1, 9, 9)
    images[..., 4, 4] = 1.0
    got = change_stroke(images, torch.tensor([1.25]), 2)[0, 0]
    rings = [float(got[4, 4 + r]) for r in range(4)]
    assert rings == pytest.approx([1.0, 1.0, 0.25, 0.0], abs=1e-6)


def test_thicker_never_removes_ink_and_thinner_never_adds_any() -> None:
    images = ink(400)
    radius = torch.linspace(-2.0, 2.0, 400)
    got = change_stroke(images, radius, 2)
    assert bool((got[200:] >= images[200:]).all())
    assert bool((got[:200] <= images[:200]).all())
    mass = change_stroke(images[:1].expand(400, -1, -1, -1), radius, 2).sum((1, 2, 3))
    assert bool((mass.diff() > 0).all())  # and the more of it, the more


def test_the_amount_is_a_share_of_the_side() -> None:
    augment, images = Augment(stroke=0.15), ink(50, margin=5)
    radius = augment.draw(50, Draws(6)).stroke * 20  # up to 3 pixels
    assert float(radius.abs().max()) > 2.5
    expected = change_stroke(images, radius, 9)
    assert -1e-6 < float(expected.min()) < 0.0  # two weights of one radius may round to more than 1,
    assert torch.equal(augment(images, Draws(6)), expected.clamp(0.0, 1.0))  # which is cut off


# ---------------------------------------------------------------------------------------------------------- the draws
def test_the_draws_keep_to_their_bounds_and_fill_them() -> None:
    drawn = EVERYTHING.draw(20_000, Draws(3))
    bounds = {"angle": 0.3, "shear": 0.2, "shift": 0.1, "stroke": 0.05, "elastic": 0.1}
    for name, bound in bounds.items():
        values = getattr(drawn, name)
        assert 0.999 * bound < float(values.max()) <= bound
        assert -bound <= float(values.min()) < -0.999 * bound
        assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert 1.1999 < float(drawn.scale.max()) <= 1.2 + 1e-6
    assert 1 / 1.2 - 1e-6 <= float(drawn.scale.min()) < 1 / 1.1999
    assert abs(float(drawn.scale.log().mean())) < 4 * math.log(1.2) / (3 * 40_000) ** 0.5  # log-uniform: mean 0
    assert drawn.elastic is not None
    assert drawn.elastic.shape == (20_000, 2, 6, 6)


def test_the_numbers_of_an_image_and_of_images_are_independent() -> None:
    drawn = EVERYTHING.draw(20_000, Draws(4))
    assert drawn.elastic is not None
    columns = [
        drawn.angle,
        *drawn.scale.T,
        drawn.shear,
        *drawn.shift.T,
        drawn.stroke,
        *drawn.elastic.flatten(1)[:, :3].T,
    ]
    table = torch.stack([*columns, *(column.roll(1) for column in columns)])
    correlation = torch.corrcoef(table) - torch.eye(len(table))
    assert float(correlation.abs().max()) < 5 / 20_000**0.5


def test_a_bound_changes_no_other_draw() -> None:
    one, other = EVERYTHING.draw(5, Draws(1)), Augment(rotation=0.3, shear=0.2).draw(5, Draws(1))
    assert torch.equal(one.angle, other.angle)
    assert torch.equal(one.shear, other.shear)
    assert other.elastic is None


def test_pure_in_seed_and_step_and_one_image_does_not_touch_another() -> None:
    images = ink(6)
    first = EVERYTHING(images, Draws(1, 7))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(EVERYTHING(images, Draws(1, 7)), first)
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator is not touched
    assert not torch.equal(EVERYTHING(images, Draws(1, 8)), first)
    assert not torch.equal(EVERYTHING(images, Draws(2, 7)), first)
    images[2] = 0.0
    changed = EVERYTHING(images, Draws(1, 7))
    assert [i for i in range(6) if not torch.equal(changed[i], first[i])] == [2]
    assert not torch.equal(EVERYTHING(images[:1].expand(2, -1, -1, -1), Draws(1))[0], EVERYTHING(images, Draws(1))[1])


def test_the_ink_stays_in_range_and_channels_move_together() -> None:
    images = ink(50).expand(-1, 2, -1, -1)
    got = EVERYTHING(images, Draws(5))
    assert got.shape == images.shape
    assert got.dtype == images.dtype
    assert float(got.min()) >= 0.0
    assert float(got.max()) <= 1.0
    assert torch.equal(got[:, 0], got[:, 1])


def test_shares_mean_the_same_at_every_size() -> None:
    """The same draws deform a drawing of 32 pixels as one of 64 of the same blob."""
    augment = Augment(rotation=0.3, scale=0.2, shear=0.2, shift=0.1, elastic=0.08)
    small, large = (augment(blob(side, side / 10), Draws(2)) for side in (32, 64))
    assert (F.avg_pool2d(large, 2) - small).abs().max() < 0.03
    assert (small - blob(32, 3.2)).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rotation": -0.1}, ValueError, "rotation=-0.1; a finite number of at least 0"),
        ({"scale": math.inf}, ValueError, "scale=inf; a finite"),
        ({"elastic": math.nan}, ValueError, "elastic=nan; a finite"),
        ({"stroke": "much"}, TypeError, "stroke='much' is a str; a number"),
        ({"shift": True}, TypeError, "shift=True is a bool"),
        ({"elastic_grid": 0}, ValueError, "elastic_grid=0; a finite number of at least 1"),
        ({"elastic_grid": 2.5}, TypeError, "elastic_grid=2.5 is a float; an integer"),
    ],
)
def test_wrong_settings_are_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        Augment(**options)


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"samples of shape \(28, 28\) .*images \(n, C, H, W\) are needed"):
        EVERYTHING(torch.zeros(3, 28, 28), Draws(0))
    with pytest.raises(TypeError, match=r"torch.uint8; a floating type in \[0, 1\] is needed: images / 255"):
        EVERYTHING(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), Draws(0))
