"""What a GPU holds and how fast it is, from its vendor's data sheet."""

from dataclasses import dataclass

__all__ = ["CARDS", "CPU", "Card", "usual_utilisation"]

CPU = "cpu"
"""The card of a plan for this machine's processor; see `llm2rec.plan.pace.processor`."""

GPU_UTILISATION = {"float32": 0.4, "bfloat16": 0.4, "int8": 0.2, "int4": 0.3}
"""Shares of the data sheet's rate that training is taken to reach.

Published runs of large models reach 0.4 to 0.5 of the dense bfloat16 rate (arXiv 2204.02311, table 3; Llama 65B on A100
about 0.47, from arXiv 2302.13971); adapters add small products that reach less. 8-bit weights are multiplied in int8
with a float16 copy of their input, and 4-bit ones are unpacked for each product: one half and three quarters of the
rate, by our reading, not measured on a GPU. A measured rate of your own is better: ``plan.utilisation``.
"""

CPU_UTILISATION = 0.75
"""Share of a large product's rate that a step reaches on a CPU (`benchmarks/results/teacher_step.json`)."""


@dataclass(frozen=True)
class Card:
    """A GPU, or a processor.

    Attributes:
        name: What to call it.
        memory_bytes: What it holds. Data sheets say GB, taken as powers of ten: the 2 to 7 % by which some cards hold
            more are what the driver and the allocator's gaps take.
        tflops: Dense products in bfloat16 on tensor cores, summed in float32; 10^12 operations a second.
        float32_tflops: Products in float32, off the tensor cores.
        bandwidth: Bytes a second to and from its memory.
        source: Where the numbers are from.
    """

    name: str
    memory_bytes: float
    tflops: float
    float32_tflops: float
    bandwidth: float
    source: str


CARDS = {
    "a100_40gb": Card("A100 40 GB", 40e9, 312, 19.5, 1.555e12, "NVIDIA A100 data sheet, SXM"),
    "a100_80gb": Card("A100 80 GB", 80e9, 312, 19.5, 2.039e12, "NVIDIA A100 data sheet, SXM"),
    "h100": Card("H100 80 GB", 80e9, 989, 67, 3.35e12, "NVIDIA H100 data sheet, SXM, without sparsity"),
    "h200": Card("H200 141 GB", 141e9, 989, 67, 4.8e12, "NVIDIA H200 data sheet, SXM, without sparsity"),
    "l4": Card("L4 24 GB", 24e9, 121, 30.3, 0.3e12, "NVIDIA L4 data sheet, without sparsity"),
    "l40s": Card("L40S 48 GB", 48e9, 362, 91.6, 0.864e12, "NVIDIA L40S data sheet, without sparsity"),
    "rtx_4090": Card("RTX 4090 24 GB", 24e9, 165, 82.6, 1.008e12, "NVIDIA Ada GPU architecture paper, appendix A"),
}


def usual_utilisation(card: str, precision: str) -> float:
    """The share of a card's rate that is taken to be reached where none is given."""
    return CPU_UTILISATION if card == CPU else GPU_UTILISATION[precision]
