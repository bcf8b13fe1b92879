"""Random deformations of images of handwriting: an affine map, a smooth displacement and the width of the strokes.

Displacing every point by a smooth random field is how Simard, Steinkraus and Platt ("Best practices for convolutional
neural networks applied to visual document analysis", ICDAR 2003) enlarge MNIST. They smooth white noise by a Gaussian;
here the field is a uniform cubic B-spline of random control points (the free-form deformation of Rueckert et al., IEEE
TMI 1999): as smooth, with a few numbers an image instead of one a pixel.

Positions are in pixels from the centre of the image, x to the right and y down. A point p of the drawing moves to
M p + t; the image is drawn by looking up, for each pixel q, the drawing at

    p = M^-1 (q - t) + d(q),     M = R(angle) [[1, -shear], [0, 1]] diag(scale_x, scale_y),

with d the smooth field. One grid, one interpolation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from theria.data.draws import Draws


class Deformation(NamedTuple):
    """What is done to each of n images; float32 on their device."""

    angle: Tensor  # (n,) radians, counter-clockwise
    scale: Tensor  # (n, 2) factors along x and y
    shear: Tensor  # (n,) how far a point moves to the right for each unit that it lies above the centre
    shift: Tensor  # (n, 2) to the right and down, shares of the width and of the height
    stroke: Tensor  # (n,) what a stroke gains on each side, a share of the shorter side; negative: loses
    elastic: Tensor | None  # (n, 2, g+3, g+3) control points of d along x and y, shares of the width and of the height


@dataclass(frozen=True)
class Augment:
    """A distribution of deformations. Every number is the bound of a uniform draw; zero everywhere is the identity.

    Lengths are shares of the image's side, so that a setting means the same at every size. Each image has draws of its
    own; its channels are deformed alike. What moves in from outside is paper (0).

    Args:
        rotation: largest angle in radians, either way.
        scale: each axis grows by a factor from 1 / (1 + scale) to 1 + scale, uniform in its logarithm.
        shear: largest slant, either way: the tangent of the angle between an upright stroke and the vertical.
        shift: largest shift along each axis, either way.
        elastic: largest displacement of a control point along each axis, either way. A point of the image moves by a
            weighted mean of 16 of them: never further, and by 0.28 * elastic in the root mean square. Up to
            0.48 / elastic_grid no such field folds (Choi and Lee, "Injectivity conditions of 2D and 3D uniform cubic
            B-spline functions", Graphical Models 2000).
        elastic_grid: cells of the control grid along a side: few make long waves, many make short ones.
        stroke: the most that a stroke gains or loses on each side; at 28 pixels 0.036 is one pixel.

    Raises:
        TypeError, ValueError: a bound that is not a finite number of at least 0, or a grid of no cell.
    """

    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    elastic: float = 0.0
    elastic_grid: int = 4
    stroke: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_bound(field.name, getattr(self, field.name))

    @property
    def moves(self) -> bool:
        """Whether any point moves."""
        return any((self.rotation, self.scale, self.shear, self.shift, self.elastic))

    @property
    def is_identity(self) -> bool:
        """Whether images are returned as they are."""
        return not (self.moves or self.stroke)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Deformed images (n, C, H, W) of images (n, C, H, W) in [0, 1] with ink = 1, on their device.

        `draws` decides how and goes on; nothing waits for the device, and no number is copied to it.

        Raises:
            TypeError, ValueError: images of another rank, or that are not floating.
        """
        check_images("Augment", tuple(images.shape[1:]), len(images.shape) == 4)
        if not images.is_floating_point():
            raise TypeError(f"Augment: images is {images.dtype}; a floating type in [0, 1] is needed: images / 255")
        if self.is_identity:
            return images
        drawn, side = self.draw(len(images), draws, images.device), min(images.shape[-2:])
        if self.moves:
            images = warp(images, drawn)
        if self.stroke:
            images = change_stroke(images, drawn.stroke * side, math.ceil(self.stroke * side))
        return images.clamp(0.0, 1.0)  # weights that sum to 1 exceed it by a rounding

    def draw(self, n: int, draws: Draws, device: torch.device | str | None = None) -> Deformation:
        """The deformations of n images. A bound changes the numbers that it is the bound of, and no others."""
        numbers = draws.uniform(n, 7, low=-1.0, high=1.0, device=device).to(torch.float32)
        angle, scale, shear, shift, stroke = numbers.split([1, 2, 1, 2, 1], dim=1)
        elastic = None
        if self.elastic:
            points = self.elastic_grid + 3
            control = draws.uniform(n, 2, points, points, low=-1.0, high=1.0, device=device)
            elastic = control.to(torch.float32) * self.elastic
        return Deformation(
            angle[:, 0] * self.rotation,
            torch.exp(scale * math.log1p(self.scale)),
            shear[:, 0] * self.shear,
            shift * self.shift,
            stroke[:, 0] * self.stroke,
            elastic,
        )


def warp(images: Tensor, by: Deformation) -> Tensor:
    """The images (n, C, H, W) with every point moved (not their strokes): one grid, one bilinear interpolation."""
    height, width = images.shape[-2:]
    x, y = _centred(width, images).view(1, 1, -1), _centred(height, images).view(1, -1, 1)
    cos, sin, shear = (value.view(-1, 1, 1) for value in (by.angle.cos(), by.angle.sin(), by.shear))
    scale_x, scale_y = by.scale.view(-1, 2, 1, 1).unbind(1)
    shift_x, shift_y = by.shift.view(-1, 2, 1, 1).unbind(1)
    x, y = x - shift_x * width, y - shift_y * height
    # M^-1 = diag(1/scale) [[1, shear], [0, 1]] R(-angle), with R(-angle) = [[cos, -sin], [sin, cos]] where y is down.
    from_x = ((cos + shear * sin) * x + (shear * cos - sin) * y) * (2.0 / width / scale_x)
    from_y = (sin * x + cos * y) * (2.0 / height / scale_y)
    if by.elastic is not None:
        field = displacement(by.elastic, height, width).mul_(2.0)
        from_x, from_y = from_x + field[:, 0], from_y + field[:, 1]
    grid = torch.stack([from_x, from_y], dim=-1).to(images.dtype)  # (n, H, W, 2) in [-1, 1] inside the image
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def displacement(control: Tensor, height: int, width: int) -> Tensor:
    """The cubic B-spline (n, 2, height, width) of control points (n, 2, g+3, g+3)."""
    cells = control.shape[-1] - 3
    return _spline(height, cells, control) @ control @ _spline(width, cells, control).T


def change_stroke(images: Tensor, radius: Tensor, most: int) -> Tensor:
    """Strokes `radius` (n,) pixels thicker on each side, thinner where it is negative; |radius| <= most.

    A whole radius r is the dilation (erosion) by a square of side 2r + 1, and between two of them it is their mixture:
    x + sum_r w_r (D_r - x) with w_r >= 0, so that no ink is lost by thickening, nor gained by thinning, not even by
    rounding. Erosion is the dilation of the paper, -D(-x), so that one maximum serves both.
    """
    sign = torch.where(radius < 0, -1.0, 1.0).to(images.dtype).view(-1, 1, 1, 1)
    radius = radius.abs().to(images.dtype).view(-1, 1, 1, 1)
    ink = result = images * sign
    for r in range(1, most + 1):
        weight = (1.0 - (radius - r).abs()).clamp(min=0.0)
        thicker = F.max_pool2d(ink, 2 * r + 1, stride=1, padding=r)
        result = result + weight * (thicker - ink)
    return result * sign


def check_images(who: str, shape: tuple[int, ...], good: bool) -> None:
    """Raises unless samples are images; `shape` is that of one sample."""
    if not good:
        raise ValueError(f"{who}: samples of shape {shape} cannot be deformed; images (n, C, H, W) are needed")


def _centred(side: int, like: Tensor) -> Tensor:
    """(side,) positions of the pixels' centres, in pixels from the centre of the image."""
    return torch.arange(side, dtype=torch.float32, device=like.device) + (0.5 - 0.5 * side)


def _spline(side: int, cells: int, like: Tensor) -> Tensor:
    """(side, cells + 3) weights of the control points, which lie at -1, 0, ..., cells + 1 cells, at each pixel."""
    at = (torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) * (cells / side)
    t = (at[:, None] - torch.arange(-1, cells + 2, dtype=like.dtype, device=like.device)).abs()
    near, far = (4.0 - 6.0 * t**2 + 3.0 * t**3) / 6.0, (2.0 - t).clamp(min=0.0) ** 3 / 6.0
    return torch.where(t < 1.0, near, far)


def _check_bound(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int if name == "elastic_grid" else int | float):
        needed = "an integer" if name == "elastic_grid" else "a number"
        raise TypeError(f"Augment: {name}={value!r} is a {type(value).__name__}; {needed} is needed")
    least = 1 if name == "elastic_grid" else 0
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"Augment: {name}={value}; a finite number of at least {least} is needed")
