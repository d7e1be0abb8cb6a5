"""Plan configuration (Hydra structured config) and the known GPUs."""

from dataclasses import dataclass

from llm2rec.core.errors import ConfigError

__all__ = ["CARDS", "CPU", "LAUNCHES", "SHARDED", "Card", "PlanSettings", "check_plan", "default_utilisation"]

LAUNCHES = ("ddp", "zero2", "zero2_offload", "zero3", "fsdp2")
"""Launch configurations, ``accelerate_configs/multi_gpu_<name>.yaml``; one GPU is ``ddp``."""

SHARDED = ("zero3", "fsdp2")
"""Launches that shard the frozen weights, so that all GPUs read the same rows outside of training steps."""

CPU = "cpu"


@dataclass(frozen=True)
class Card:
    """A GPU, or this machine's CPU.

    Attributes:
        name: Display name.
        memory_bytes: Capacity; data sheets give GB as powers of ten.
        tflops: Dense bfloat16 products, 10^12 operations a second.
        float32_tflops: The same in float32, without tensor cores.
    """

    name: str
    memory_bytes: float
    tflops: float
    float32_tflops: float


CARDS = {
    "a100_40gb": Card("A100 40 GB", 40e9, 312, 19.5),
    "a100_80gb": Card("A100 80 GB", 80e9, 312, 19.5),
    "h100": Card("H100 80 GB", 80e9, 989, 67),
    "h200": Card("H200 141 GB", 141e9, 989, 67),
    "l4": Card("L4 24 GB", 24e9, 121, 30.3),
    "l40s": Card("L40S 48 GB", 48e9, 362, 91.6),
    "rtx_4090": Card("RTX 4090 24 GB", 24e9, 165, 82.6),
}
"""From NVIDIA's data sheets (SXM cards, without sparsity) and the Ada architecture paper, appendix A."""

_GPU_UTILISATION = {"float32": 0.4, "bfloat16": 0.4, "int8": 0.2, "int4": 0.3}


def default_utilisation(card: str, precision: str) -> float:
    """Assumed share of a card's peak rate.

    Large runs report 0.4 to 0.5 in bfloat16 (arXiv 2204.02311, table 3). The values of 8 and 4 bits are estimates, not
    measurements. On a CPU it is a share of a large product's rate (`benchmarks/results/teacher_step.json`).
    """
    return 0.75 if card == CPU else _GPU_UTILISATION[precision]


@dataclass
class PlanSettings:
    """What to plan for.

    Attributes:
        card: Kind of GPU, a key of `CARDS`, or ``cpu`` for this machine.
        utilisation: Share of the card's peak rate that training reaches; None for `default_utilisation`.
        launch: How GPUs share the work, one of `LAUNCHES`: ``ddp`` (each holds everything), DeepSpeed's ``zero2``,
            ``zero2_offload`` (optimizer on the host) and ``zero3``, or PyTorch's ``fsdp2``; ``auto`` is ``zero2`` on
            several GPUs.
        n_items: Items of the catalogue, instead of the dataset's.
        n_rows: Training rows, instead of the dataset's: about one per interaction.
        prompt_tokens: Tokens of every prompt, instead of those of the dataset's titles.
        characters_per_token: Used if the tokenizer is not available.
    """

    card: str = "a100_80gb"
    utilisation: float | None = None
    launch: str = "auto"
    n_items: int | None = None
    n_rows: int | None = None
    prompt_tokens: int | None = None
    characters_per_token: float = 3.0

    def __post_init__(self) -> None:
        """Reject invalid values."""
        cards = (*CARDS, CPU)
        if self.card not in cards:
            raise ConfigError(f"plan.card is {self.card!r}, expected one of {', '.join(cards)}.")
        if self.utilisation is not None and not 0 < self.utilisation <= 1:
            raise ConfigError(f"plan.utilisation is {self.utilisation}, expected above 0 and at most 1, or null.")
        if self.launch not in ("auto", *LAUNCHES):
            raise ConfigError(f"plan.launch is {self.launch!r}, expected one of {', '.join(('auto', *LAUNCHES))}.")
        for name in ("n_items", "n_rows", "prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"plan.{name} is {value}, expected at least 1, or null for the dataset's.")
        if not self.characters_per_token > 0:
            raise ConfigError(f"plan.characters_per_token is {self.characters_per_token}, expected a positive number.")

    @property
    def is_complete(self) -> bool:
        """Whether all sizes are given, so that no dataset is needed."""
        return None not in (self.n_items, self.n_rows, self.prompt_tokens)


def check_plan(settings: PlanSettings, gpus: int, precision: str) -> str:
    """Choose the launch, and reject combinations that cannot be launched.

    Args:
        settings: The plan's settings.
        gpus: Number of GPUs.
        precision: The teacher's precision.

    Returns:
        One of `LAUNCHES`.

    Raises:
        ConfigError: If the combination cannot be launched.
    """
    if gpus < 1:
        raise ConfigError(f"gpus is {gpus}, expected at least 1; use plan.card=cpu to plan for this machine's CPU.")
    launch = settings.launch
    if launch == "auto":
        launch = "ddp" if gpus == 1 else "zero2"
    if settings.card == CPU and (gpus > 1 or launch != "ddp"):
        raise ConfigError(
            f"plan.card is 'cpu', gpus {gpus} and plan.launch {settings.launch!r}, expected one process; leave gpus at "
            "1 and plan.launch at auto, or choose a GPU with plan.card."
        )
    if launch in SHARDED and precision in ("int8", "int4"):
        raise ConfigError(
            f"plan.launch {launch!r} shards the frozen weights, and teacher.precision {precision!r} cannot be sharded; "
            "use plan.launch=ddp or teacher.precision=bfloat16."
        )
    return launch
