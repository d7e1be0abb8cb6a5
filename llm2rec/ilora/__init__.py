"""iLoRA as a PEFT method: a LoRA cut into experts that are mixed by gates of the instance (arXiv 2408.10159).

Importing this package registers the method, so PEFT's own functions work::

    model = get_peft_model(base, ILoraConfig(r=16, num_experts=4))
    with model.base_model.instance(gate_input):  # gate_input: (B, d)
        model(**batch).loss.backward()
    model.save_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder)
"""

from .config import DEFAULT_TARGET_MODULES, ILoraConfig
from .gate import GateError, GateSlot, ILoraError, LinearGate
from .layer import ILoraLinear, MergeError
from .model import AdapterKeysError, ILoraModel, frozen_base
from .registration import register

__all__ = [
    "DEFAULT_TARGET_MODULES",
    "AdapterKeysError",
    "GateError",
    "GateSlot",
    "ILoraConfig",
    "ILoraError",
    "ILoraLinear",
    "ILoraModel",
    "LinearGate",
    "MergeError",
    "frozen_base",
    "register",
]

register()
