"""Random numbers as functions of seed, step and process, so that resumed runs reproduce uninterrupted ones."""

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["derived_seed", "mixed_words", "random_state", "random_words", "seed_everything"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, odd


def derived_seed(*parts: int | str) -> int:
    """A seed in ``[0, 2**63)`` that depends on all ``parts``, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed Python, NumPy and torch (all devices) from ``parts``."""
    import random

    import torch

    seed = derived_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same numbers, without the overhead of `torch.manual_seed` for devices that are not initialised
        torch.default_generator.manual_seed(seed)


def random_state() -> Callable[[], None]:
    """Save the state of Python's, NumPy's and torch's generators (this process's device); returns its restore."""
    import random

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


def mixed_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash words of any shape with the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014; Stafford's mix 13).

    Every bit of the result depends on all bits of the word.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def random_words(key: np.uint64 | NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Uniform 64-bit words: SplitMix64 with seed ``key``, evaluated at ``counters`` only.

    Args:
        key: One key, or keys that broadcast against ``counters``.
        counters: Positions from 0, of any shape.
    """
    return mixed_words(key + (counters + np.uint64(1)) * _GOLDEN)
