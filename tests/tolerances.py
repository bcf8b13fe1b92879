"""Every tolerance of the operator's tests, each with its reason. All are relative errors."""

# Reference against autograd of the naive formula: the same sums in another order; float64 rounds at 1.1e-16.
REFERENCE_F64 = 1e-12
# Explicit rules against the reference: other formulas (lse instead of a normalised softmax), the same mathematics.
CUSTOM_F64 = 1e-10
# Laws in float64: a handful of sums of at most a few hundred terms.
LAW_F64 = 1e-12
# The adjoint identity of a jvp against central differences with the best step: ε^(2/3) = 4e-11, times the curvature.
FINITE_DIFFERENCE_F64 = 1e-7
# hvp_fd_vjp with its own step: (ε^(1/3))² in units of the third derivative.
HVP_FD_F64 = 1e-8
HVP_FD_F32 = 2e-3
# Hugging Face's eager attention computes its softmax in float32, also in a float64 model.
EAGER_SOFTMAX_F32 = 1e-6
# Two meta-gradients of an attention model after up to 20 inner steps, float64: rounding grown by 20 Hessians.
META_GRADIENT_F64 = 1e-10
# Kernels in float32 with torch's "highest" products, against the reference in float64.
TRITON_F32 = 2e-6
