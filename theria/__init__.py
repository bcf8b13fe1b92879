"""theria: learning that differentiates through learning.

The public API on one page; each subpackage re-exports its own by hand.
"""

from theria import attention, curvature, ops
from theria.curvature import hvp
from theria.ops import explain, sdpa

__version__ = "0.1.0"

__all__ = ["attention", "curvature", "explain", "hvp", "ops", "sdpa"]
