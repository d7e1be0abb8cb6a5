"""An adapted model runs on the meta device, where shapes are tried out before there is memory for them."""

import pytest
import torch
from ilora_helpers import EXPERTS, WIDTH, layers, tiny
from peft import get_peft_model

from llm2rec.ilora import ILoraConfig


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_runs_without_memory(dropout):
    model = tiny("llama").to("meta").requires_grad_(False)
    model.config._attn_implementation = "eager"  # torch's fused kernels look at masks
    adapted = get_peft_model(model, ILoraConfig(r=8, num_experts=EXPERTS, dropout=dropout)).train()
    ids = torch.zeros(3, 6, dtype=torch.int64, device="meta")
    with adapted.base_model.use_gates(torch.empty(3, WIDTH, device="meta")) as gates:
        logits = adapted(input_ids=ids).logits
        logits.sum().backward()
    assert gates.shape == (3, EXPERTS)
    assert logits.shape[:2] == (3, 6)
    assert all(layer.ilora_A["default"].weight.grad.is_meta for layer in layers(adapted))
