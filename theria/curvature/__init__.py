"""Curvature of scalar functions on pytrees."""

from theria.curvature.hvp import hvp
from theria.curvature.second_order import second_order

__all__ = ["hvp", "second_order"]
