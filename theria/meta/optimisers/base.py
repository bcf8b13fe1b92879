"""What an adjoint needs of an inner optimiser."""

from typing import Any, ClassVar, Protocol

from torch import Tensor

Params = dict[str, Tensor]
State = dict[str, Any]  # a pytree of floating-point tensors: buffers by parameter, the count of steps
Hyper = dict[str, Params | Tensor]  # {} or, for a hyperparameter, a tensor for each parameter or one for all


class InnerOptimiser(Protocol):
    """A step of an inner optimisation: three pure functions, differentiable in every tensor they are given.

    `update` is element-wise in each parameter, and its state is a pytree of floating-point tensors, so that it maps
    under `vmap` and differentiates in both modes.

    `linear_in_gradient` promises that the derivative of `update` in `grads` does not depend on their value (`update`
    is affine in them, or piecewise so with the same derivative everywhere), which lets `MixedMode` run backwards with
    a single forward-over-reverse pass in each step.
    """

    linear_in_gradient: ClassVar[bool]

    def hyper(self, params: Params) -> Hyper: ...

    def init(self, params: Params) -> State: ...

    def update(self, grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]: ...
