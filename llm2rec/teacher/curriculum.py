"""When training shows text alone, and when text with item vectors: a pure function of the global step."""

from llm2rec.core.seed import derived_seed

__all__ = ["CURRICULA", "is_hybrid"]

CURRICULA = ("off", "linear", "two_stage")


def is_hybrid(curriculum: str, step: int, max_steps: int, seed: int) -> bool:
    """Whether the whole batch of an optimizer step is hybrid (LLaRA, arXiv 2312.02445, and iLoRA's program).

    It depends on nothing else, so every process and a resumed run decide alike.

    Args:
        curriculum: ``off`` (always hybrid), ``linear`` (with probability ``step / max_steps``) or ``two_stage`` (text
            in the first half of the steps).
        step: Global step, from 0.
        max_steps: Steps of the whole training.
        seed: Seed of the run.
    """
    if curriculum == "linear":
        return derived_seed(seed, "curriculum", step) / 2**63 < step / max_steps
    return curriculum == "off" or 2 * step >= max_steps
