"""``auto`` is one of the backends, the one that ``explain`` names."""

from functools import partial

from tests.boundary import SAMPLES
from theria.ops import explain, sdpa
from theria.testing import COMPOSITIONS


def test_auto_is_the_backend_that_explain_names() -> None:
    for sample in SAMPLES:
        chosen = explain(*sample.x, **sample.options).backend
        assert chosen is not None
        for composition in ("forward", "double_backward"):
            compose = COMPOSITIONS[composition]
            named, auto = compose(partial(sdpa, backend=chosen), sample), compose(sdpa, sample)
            assert all(a.equal(b) for a, b in zip(auto, named, strict=True)), sample.name
