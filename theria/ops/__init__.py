from theria.ops.sdpa import Explanation, explain, sdpa

__all__ = ["Explanation", "explain", "sdpa"]
