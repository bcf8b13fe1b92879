from theria.ops.sdpa import sdpa

__all__ = ["sdpa"]
