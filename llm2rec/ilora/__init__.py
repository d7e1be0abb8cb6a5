"""iLoRA as a PEFT method: LoRA experts mixed by gates of each instance (arXiv 2408.10159).

Importing this package registers the method, so PEFT's own functions work::

    model = get_peft_model(base, ILoraConfig(r=16, num_experts=4))
    with model.base_model.use_gates(gate_input):  # gate_input: (B, d)
        model(**batch).loss.backward()
    model.save_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder)
"""

from typing import Any

from peft import mapping

from .config import DEFAULT_TARGET_MODULES, PEFT_TYPE, ILoraConfig
from .errors import AdapterKeysError, GateError, ILoraError, MergeError, RowAdaptersError
from .folding import fold
from .frozen import frozen_base
from .gate import Gate
from .health import GateCollapseWarning, GateHealth, balance_loss, gate_health
from .layer import ILoraLinear, check_parent
from .model import ILoraModel
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
    "RowAdaptersError",
    "balance_loss",
    "check_parent",
    "fold",
    "frozen_base",
    "gate_health",
    "register",
    "segments_of",
]


def register() -> None:
    """Register iLoRA with PEFT; a second call changes nothing.

    ``peft.utils.register_peft_method`` accepts only names of the closed enum ``PeftType``, so this function writes to
    PEFT's three tables itself (the only place that does). A process that has not registered iLoRA fails to load an
    adapter with ``KeyError: 'ILORA'``. ``tests/ilora/test_ilora_registration.py`` fails when these internals move.

    Raises:
        RuntimeError: If another method has the same name or prefix.
    """
    taken = {kind: prefix for kind, prefix in mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items() if kind != PEFT_TYPE}
    if ILoraModel.prefix in taken.values():
        raise RuntimeError(
            f"another PEFT method already uses the prefix {ILoraModel.prefix!r}; expected it to be free for iLoRA."
        )
    entries: list[tuple[dict[Any, Any], object]] = [
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, ILoraConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, ILoraModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, ILoraModel.prefix),
    ]
    for table, entry in entries:
        if table.setdefault(PEFT_TYPE, entry) != entry:
            raise RuntimeError(f"PEFT already has another method called {PEFT_TYPE}: {table[PEFT_TYPE]}.")


register()
