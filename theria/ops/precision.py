"""How float32 products and convolutions are computed, by PyTorch's settings."""

import torch


def matmul_precision() -> str:
    """``torch.get_float32_matmul_precision()``, also where it refuses to tell."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch.backends.*.fp32_precision, which the older name does not know
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def convolution_precision() -> str:
    """The same of convolutions, which have a setting of their own: "high" (TF32) unless told otherwise."""
    try:
        tf32 = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by fp32_precision, which the older name does not know
        tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "high" if tf32 else "highest"
