"""Options that a teacher of some kind does not read: refused where they are set, since they were meant to matter."""

from dataclasses import MISSING, fields
from operator import attrgetter
from typing import Any

from llm2rec.core.errors import ConfigError

__all__ = ["check_unread"]

_OF_EXPERTS = ("num_experts", "scaling")
_OF_GATES = (
    "gate",
    "gate_per_layer",
    "gate_temperature",
    "gate_top_k",
    "gate_hidden_size",
    "gate_noise",
    "gate_dropout",
)
_OF_ADAPTERS = ("r", "alpha", "dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
_OF_TITLES = (
    "n_candidates",
    "redraw_candidates",
    "mean_log_prob",
    "generation_beams",
    "search_beams",
    "ranking",
    "hit_rule",
)
_RULES: tuple[tuple[str, tuple[object, ...], tuple[str, ...]], ...] = (
    # While this option has one of these values, nothing reads those.
    (
        "tuning",
        ("lora", "none"),
        (
            "gate_input",
            "gate_learning_rate_ratio",
            "gate_weight_decay",
            "balance_loss",
            *(f"adapter.{name}" for name in _OF_EXPERTS + _OF_GATES),
        ),
    ),
    ("tuning", ("none",), ("item_refresh_steps", *(f"adapter.{name}" for name in _OF_ADAPTERS))),
    ("objective", ("title",), ("head", "logit_scale", "popularity_prior", "item_refresh_steps")),
    ("objective", ("item",), tuple(f"title.{name}" for name in _OF_TITLES)),
    ("prompts", ("text",), ("curriculum", "projector_learning_rate_ratio", "projector_weight_decay")),
    ("head", ("titles",), ("head_learning_rate_ratio",)),
    ("head", ("titles", "projected", "joined"), ("residual_dropout",)),
    ("title.n_candidates", (0,), ("title.redraw_candidates", "title.hit_rule")),
    ("title.ranking", ("grounding",), ("title.search_beams",)),
)


def check_unread(settings: Any) -> None:
    """Refuse options that differ from their defaults although nothing reads them.

    Args:
        settings: `llm2rec.teacher.settings.TeacherSettings`, each value in its range.

    Raises:
        ConfigError: If there are any; it names all that one choice leaves unread.
    """
    for decisive, values, names in _RULES:
        value = attrgetter(decisive)(settings)
        changed = {name: own for name in names if (own := attrgetter(name)(settings)) != _default(settings, name)}
        if value in values and changed:
            told = " and ".join(f"teacher.{name} is {own!r}" for name, own in changed.items())
            usual = " and ".join(repr(_default(settings, name)) for name in changed)
            raise ConfigError(
                f"{told}, which nothing reads while teacher.{decisive} is {value!r}; leave {_it(changed)} at {usual}, "
                f"or change teacher.{decisive}."
            )


def _it(names: dict[str, Any]) -> str:
    return "it" if len(names) == 1 else "them"


def _default(settings: Any, name: str) -> Any:
    """The default of an option, which may be one of a settings object inside."""
    *parents, last = name.split(".")
    owner = attrgetter(".".join(parents))(settings) if parents else settings
    field = next(each for each in fields(owner) if each.name == last)
    return field.default if field.default_factory is MISSING else field.default_factory()
