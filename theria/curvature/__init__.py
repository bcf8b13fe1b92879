"""Curvature of scalar functions on pytrees."""

from theria.curvature.hvp import hvp

__all__ = ["hvp"]
