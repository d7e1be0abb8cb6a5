"""iLoRA as a PEFT method: a LoRA cut into experts that are mixed by gates of the instance (arXiv 2408.10159).

Importing this package registers the method, so PEFT's own functions work::

    model = get_peft_model(base, ILoraConfig(r=16, num_experts=4))
    with model.base_model.instance(gate_input):  # gate_input: (B, d)
        model(**batch).loss.backward()
    model.save_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder)
"""

from .config import DEFAULT_TARGET_MODULES, ILoraConfig
from .errors import AdapterKeysError, GateError, ILoraError, MergeError
from .folding import fold
from .frozen import frozen_base
from .gate import Gate
from .health import GateCollapseWarning, GateHealth, balance_loss, gate_health
from .layer import ILoraLinear
from .model import ILoraModel
from .registration import register
from .slot import segments_of

__all__ = [
    "DEFAULT_TARGET_MODULES",
    "AdapterKeysError",
    "Gate",
    "GateCollapseWarning",
    "GateError",
    "GateHealth",
    "ILoraConfig",
    "ILoraError",
    "ILoraLinear",
    "ILoraModel",
    "MergeError",
    "balance_loss",
    "fold",
    "frozen_base",
    "gate_health",
    "register",
    "segments_of",
]

register()
