from theria.ops import sdpa

__all__ = ["sdpa"]
