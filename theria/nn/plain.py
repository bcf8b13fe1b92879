"""Whether calling a module is what its class says, so that the same may be computed in another way."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: nn.Module) -> bool:
    """Whether a call is the `forward` of the module's class and nothing else: no hook, of its own or of all modules,
    and no function in the place of its `forward`."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not (any(hooks) or _has_any_global_hook() or "forward" in vars(module))
