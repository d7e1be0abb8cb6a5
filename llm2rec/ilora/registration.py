"""Makes PEFT know iLoRA. The only place that writes to PEFT's internals.

``peft.utils.register_peft_method`` takes only names of the closed enum ``PeftType``. PEFT looks methods up in three
dictionaries, though, and a plain string in them saves and loads like any other; a process that has not registered it
fails with ``KeyError: 'ILORA'``. ``tests/ilora/test_ilora_registration.py`` fails when these internals move.
"""

from __future__ import annotations

from typing import Any

from peft import mapping

from .config import PEFT_TYPE, ILoraConfig
from .model import ILoraModel

__all__ = ["register"]


def register() -> None:
    """Enter iLoRA into PEFT's tables; a second call changes nothing.

    Raises:
        RuntimeError: If something else already goes by the same name or prefix.
    """
    taken = {kind: prefix for kind, prefix in mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items() if kind != PEFT_TYPE}
    if ILoraModel.prefix in taken.values():
        raise RuntimeError(
            f"another PEFT method already uses the prefix {ILoraModel.prefix!r}; it cannot be told apart."
        )
    entries: list[tuple[dict[Any, Any], object]] = [
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, ILoraConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, ILoraModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, ILoraModel.prefix),
    ]
    for table, entry in entries:
        if table.setdefault(PEFT_TYPE, entry) != entry:
            raise RuntimeError(f"PEFT already has another method called {PEFT_TYPE}: {table[PEFT_TYPE]}.")
