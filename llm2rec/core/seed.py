"""Random numbers as functions of seed, step and process, so that a resumed run draws what the unbroken one drew."""

import hashlib
from collections.abc import Callable

__all__ = ["derived_seed", "random_state", "seed_everything"]


def derived_seed(*parts: int | str) -> int:
    """A seed in ``[0, 2**63)`` that depends on all ``parts``, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed Python, NumPy and torch (all devices) from ``parts``."""
    import random

    import numpy as np
    import torch

    seed = derived_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same numbers; `torch.manual_seed` would format a stack for each kind of device that might still come
        torch.default_generator.manual_seed(seed)


def random_state() -> Callable[[], None]:
    """Note the state of Python's, NumPy's and torch's generators (this process's device); returns what restores it."""
    import random

    import numpy as np
    import torch

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)

    return restore
