"""What the plan can be told; Hydra schemas and plain values at once."""

from dataclasses import dataclass

from llm2rec.core.errors import ConfigError
from llm2rec.plan.cards import CARDS, CPU

__all__ = ["DIVIDED", "LAUNCHES", "PlanSettings", "check_plan"]

LAUNCHES = ("ddp", "zero2", "zero2_offload", "zero3", "fsdp2")
"""Launch configurations, ``accelerate_configs/multi_gpu_<name>.yaml``; one GPU is ``ddp`` with nothing to exchange."""

DIVIDED = ("zero3", "fsdp2")
"""Those that divide the frozen weights, so that all GPUs have to go through the same passes."""


@dataclass
class PlanSettings:
    """What is to be planned for, and what is known of it.

    Attributes:
        card: Kind of GPU, of `llm2rec.plan.cards.CARDS`, or ``cpu``: this machine.
        utilisation: Share of the card's rate that training reaches; None for what is usual with the precision.
        launch: How GPUs share the work, of `LAUNCHES`: ``ddp`` (each holds all), DeepSpeed's ``zero2``,
            ``zero2_offload`` (its optimizer on the host) and ``zero3``, or PyTorch's ``fsdp2``; ``auto`` is ``zero2``
            on several.
        n_items: Items of the catalogue, in place of the dataset's.
        n_rows: Training rows, in place of the dataset's: about one for each interaction.
        prompt_tokens: Tokens of every prompt, in place of what the dataset's titles make.
        characters_per_token: For prompts whose tokenizer is not at hand.
    """

    card: str = "a100_80gb"
    utilisation: float | None = None
    launch: str = "auto"
    n_items: int | None = None
    n_rows: int | None = None
    prompt_tokens: int | None = None
    characters_per_token: float = 3.0

    def __post_init__(self) -> None:
        cards = (*CARDS, CPU)
        if self.card not in cards:
            raise ConfigError(f"plan.card is {self.card!r}, expected one of {', '.join(cards)}.")
        if self.utilisation is not None and not 0 < self.utilisation <= 1:
            raise ConfigError(
                f"plan.utilisation is {self.utilisation}, expected a share above 0 and up to 1, or null for the usual."
            )
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
    """Refuse what cannot be launched, and settle how GPUs share the work.

    Args:
        settings: The plan's settings.
        gpus: How many GPUs.
        precision: The teacher's number format.

    Returns:
        One of `LAUNCHES`.

    Raises:
        ConfigError: If the combination cannot work.
    """
    if gpus < 1:
        raise ConfigError(f"gpus is {gpus}, expected at least 1; for this machine's processor take plan.card=cpu.")
    launch = settings.launch
    if launch == "auto":
        launch = "ddp" if gpus == 1 else "zero2"
    if settings.card == CPU and (gpus > 1 or launch != "ddp"):
        raise ConfigError(
            f"plan.card is 'cpu', gpus {gpus} and plan.launch {settings.launch!r}, expected one process that holds "
            "all; leave gpus at 1 and plan.launch at auto, or choose a GPU with plan.card."
        )
    if launch in DIVIDED and precision in ("int8", "int4"):
        raise ConfigError(
            f"teacher.precision is {precision!r} and plan.launch {launch!r}, which divides weights among GPUs, and "
            "quantised ones cannot be divided; take plan.launch=ddp, which leaves each GPU all of them, or "
            "teacher.precision=bfloat16."
        )
    return launch
