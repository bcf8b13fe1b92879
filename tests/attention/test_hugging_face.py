"""``attn_implementation="theria"`` against transformers' own eager attention, to second order."""

import pytest
import torch

from tests.tolerances import EAGER_SOFTMAX_F32
from theria.attention import higher_order, register_hf
from theria.testing import difference

transformers = pytest.importorskip("transformers", reason="needs Hugging Face transformers")


def gradients(implementation: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=implementation,
    )
    model = transformers.LlamaForCausalLM(config).double()
    tokens = torch.randint(0, 17, (2, 6), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(tokens)
    padding[0, 4:] = 0  # on the right, so that every row sees a key: eager gives NaN in one that sees none
    loss = model(input_ids=tokens, attention_mask=padding, labels=tokens).loss
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, create_graph=True)
    return (*grads, *torch.autograd.grad(sum((g**2).sum() for g in grads), params))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("default")
def test_registered_implementation_differentiates_twice() -> None:
    expected = gradients("eager")
    assert difference(gradients(register_hf()), expected) <= EAGER_SOFTMAX_F32
    with higher_order():
        assert difference(gradients("sdpa"), expected) <= EAGER_SOFTMAX_F32
