"""Random numbers by counting: a hash of arrays of 64-bit words."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["mixed_words"]


def mixed_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter words of any shape: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, Stafford's 13).

    Every bit depends on all bits. Counting in, random numbers out, so that any of them is found without those before.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
