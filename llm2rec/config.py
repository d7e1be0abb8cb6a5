"""Hydra structured configs: a schema per group of `conf/`, so that misspelt keys and wrong types fail at composition.

The dataclasses hold the defaults; the files of `conf/` hold what differs from them. Only the stages' ``__main__``
modules read a `Config`; everything below takes plain values.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from llm2rec.command_help import help_text
from llm2rec.core.errors import ConfigError, Ignored, Llm2RecError
from llm2rec.core.metrics import CUTOFFS, metric_names
from llm2rec.core.paths import run_folder
from llm2rec.data import SCHEMAS as DATASET_SCHEMAS
from llm2rec.data import DatasetSpec
from llm2rec.distill.settings import DistillSettings, DLLM2RecCodeSettings
from llm2rec.ensemble.settings import EnsembleSettings
from llm2rec.evaluate.settings import ReportSettings
from llm2rec.overrides import text_options, texts_as_typed
from llm2rec.plan.settings import PlanSettings
from llm2rec.recommend.settings import RecommendSettings
from llm2rec.share.pushing import ShareSettings
from llm2rec.student.settings import CaserStudent, GRU4RecStudent, SASRecStudent, StudentSettings
from llm2rec.teacher.settings import LLMSettings, TeacherSettings, TinyRandomSettings
from llm2rec.tune.settings import TuneSettings

__all__ = [
    "Config",
    "MetricsConfig",
    "build",
    "built_object",
    "check_finite",
    "register",
    "schemas_of",
    "texts_of_command",
]

Settings = TypeVar("Settings")


@dataclass
class PathsConfig:
    """Folders; relative paths start at the folder that the command is launched from.

    Attributes:
        root: That folder.
        raw_dir: Downloads.
        processed_dir: Prepared datasets.
        llm_dir: Language models made here, and their cached outputs.
        teacher_outputs_dir: Teacher outputs, ``<dataset>/<name>/``.
        dllm2rec_dir: What `llm2rec.distill.export_dllm2rec` writes for the released DLLM2Rec program.
        result_dir: Run folders.
    """

    root: str = MISSING
    raw_dir: str = MISSING
    processed_dir: str = MISSING
    llm_dir: str = MISSING
    teacher_outputs_dir: str = MISSING
    dllm2rec_dir: str = MISSING
    result_dir: str = MISSING


@dataclass
class LoggingConfig:
    """Logging configuration.

    Attributes:
        tensorboard: Whether to write TensorBoard events into the run folder.
        progress: Whether to show progress.
    """

    tensorboard: bool = True
    progress: bool = True


@dataclass
class MetricsConfig:
    """Ranking metrics.

    Attributes:
        ks: Cut-offs.
        select_on: Validation metric for early stopping and the choice of weights.
        mask_seen: Whether rankings leave out the items of a user's past; None if users do not come back to items
            (`llm2rec.data.masking`).
        n_candidates: Items, the target included, among which `llm2rec.evaluate` also measures HR@1; 0 for none.
        candidates_seed: Seed of those candidates.
    """

    ks: list[int] = field(default_factory=lambda: list(CUTOFFS))
    select_on: str = "ndcg@10"
    mask_seen: bool | None = None
    n_candidates: int = 0
    candidates_seed: int = 0

    IGNORED: ClassVar[tuple[Ignored, ...]] = (Ignored(("candidates_seed",), "n_candidates", (0,)),)

    def __post_init__(self) -> None:
        """Check that the metrics exist."""
        if not self.ks or min(self.ks) < 1:
            raise ConfigError(f"metrics.ks is {self.ks}, expected cut-offs of at least 1.")
        if self.select_on not in metric_names():
            raise ConfigError(f"metrics.select_on is {self.select_on!r}, expected one of {', '.join(metric_names())}.")
        if self.n_candidates != 0 and self.n_candidates < 2:
            raise ConfigError(
                f"metrics.n_candidates is {self.n_candidates}, expected 0 for none, or at least 2: the target "
                "and one other item."
            )


@dataclass
class ActiveConfig:
    """Selection policy; ``_target_`` names its class."""

    _target_: str = MISSING


@dataclass
class BudgetedActiveConfig(ActiveConfig):
    """Options of all policies with a budget; see `llm2rec.distill.selection_policy`."""

    DOCUMENTED_IN: ClassVar = ("distill/selection_policy.py", "SelectionPolicyRandom")

    budget: float = MISSING
    final_budget: float | None = None
    over_epochs: int = 10

    IGNORED: ClassVar[tuple[Ignored, ...]] = (Ignored(("over_epochs",), "final_budget", (None,)),)


@dataclass
class RandomActiveConfig(BudgetedActiveConfig):
    """Schema of ``conf/active/random.yaml``; see `SelectionPolicyRandom`."""

    seed: int = MISSING


@dataclass
class ChoosingActiveConfig(BudgetedActiveConfig):
    """Options of all policies that choose among labelled rows."""

    DOCUMENTED_IN: ClassVar = ("distill/selection_policy.py", "_PoolBased")

    pool: float = 1.0
    seed: int = MISSING


@dataclass
class TeacherActiveConfig(ChoosingActiveConfig):
    """Schema of ``conf/active/confidence.yaml`` and ``uncertainty.yaml``; see `SelectionPolicyConfidence`."""

    measure: str = MISSING


@dataclass
class DisagreementActiveConfig(ChoosingActiveConfig):
    """Schema of ``conf/active/disagreement.yaml``; see `SelectionPolicyDisagreement`."""

    measure: str = MISSING
    top_k: int = MISSING
    refresh_epochs: int = MISSING


@dataclass
class MetaActiveConfig(ActiveConfig):
    """Schema of ``conf/active/meta.yaml``; see `SelectionPolicyMeta`."""

    refresh_epochs: int = MISSING


@dataclass
class CustomActiveConfig(ActiveConfig):
    """Schema of ``conf/active/custom.yaml``; see `policy_named`."""

    _convert_: str = "all"
    policy: str = MISSING
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Config:
    """Configuration of all stages.

    Attributes:
        dataset: Interactions and how they are split.
        llm: Language model.
        teacher: Adapter, training and exported outputs of the teacher.
        student: Model and training of the student.
        distill: How the student learns from the teacher.
        active: Training rows to distil on.
        ensemble: Options of `llm2rec.ensemble`; its students and LLM teachers are ``runs``.
        metrics: Ranking metrics.
        report: Options of the report of an evaluation.
        logging: TensorBoard and progress.
        paths: Folders.
        seed: Seed of initial weights, order and dropout.
        resume: Folder of an earlier run of the same stage and configuration to continue, or null.
        finish: Whether the resumed run ends its training where it is and goes on with its best weights.
        reuse: Whether to skip the run if there is a finished one of the same stage, configuration and data.
        runs: Runs to evaluate, or members of the ensemble: ``latest`` (the newest finished run of each kind on this
            dataset; for the ensemble students, and LLM teachers whose outputs are there) or a list of folders of runs
            and sweeps; a sweep means its finished jobs.
        plan: Options of `llm2rec.plan`.
        gpus: Number of GPUs for `llm2rec.plan`; a real launch takes it from the launcher.
    """

    dataset: DatasetSpec = MISSING
    llm: LLMSettings = MISSING
    teacher: TeacherSettings = MISSING
    student: StudentSettings = MISSING
    distill: DistillSettings = MISSING
    active: ActiveConfig = MISSING
    ensemble: EnsembleSettings = MISSING
    metrics: MetricsConfig = MISSING
    report: ReportSettings = MISSING
    logging: LoggingConfig = MISSING
    paths: PathsConfig = MISSING
    seed: int = 42
    resume: str | None = None
    finish: bool = False
    reuse: bool = False
    runs: Any = "latest"
    plan: PlanSettings = MISSING
    gpus: int = 1


_ROOTS: dict[str, type] = {
    "config": Config,
    "recommend": RecommendSettings,
    "share": ShareSettings,
    "tune": TuneSettings,
}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "dataset": dict(DATASET_SCHEMAS),
    "llm": {"pretrained": LLMSettings, "tiny_random": TinyRandomSettings},
    "teacher": {"ilora": TeacherSettings},
    "student": {
        "student": StudentSettings,
        "sasrec": SASRecStudent,
        "gru4rec": GRU4RecStudent,
        "caser": CaserStudent,
    },
    "distill": {"dllm2rec": DistillSettings, "dllm2rec_code": DLLM2RecCodeSettings},
    "active": {
        "all": ActiveConfig,
        "random": RandomActiveConfig,
        "confidence": TeacherActiveConfig,
        "uncertainty": TeacherActiveConfig,
        "disagreement": DisagreementActiveConfig,
        "meta": MetaActiveConfig,
        "custom": CustomActiveConfig,
    },
    "ensemble": {"ensemble": EnsembleSettings},
    "metrics": {"recsys": MetricsConfig},
    "report": {"report": ReportSettings},
    "logging": {"default": LoggingConfig},
    "paths": {"default": PathsConfig},
    "plan": {"plan": PlanSettings},
}


def texts_of_command(arguments: Sequence[str], name: str = "config") -> list[str]:
    """Arguments of a command whose texts are taken as typed; see `texts_as_typed`.

    Args:
        arguments: Of the command line.
        name: Name of the command's configuration.
    """
    kinds = {group: list(nodes.values()) for group, nodes in schemas_of(name).items()}
    return texts_as_typed([_share(each) for each in arguments], text_options(kinds))


def _share(argument: str) -> str:
    """``ensemble.neighbours=0.5`` is short for ``ensemble.neighbours.share=0.5``; other arguments stay as they are."""
    group, sign, value = argument.partition("=")
    is_member = group.lstrip("+") in {f"ensemble.{name}" for name in ("students", "neighbours", "titles", "teachers")}
    return f"{group}.share={value}" if is_member and sign and not value.startswith("{") else argument


def schemas_of(name: str = "config") -> dict[str, dict[str, Any]]:
    """The dataclasses of each group that a command reads by their names; the root is the group ``""``.

    Args:
        name: Name of the command's configuration.
    """
    return {"": {name: _ROOTS[name]}, **(_SCHEMAS if name == "config" else {})}


def register(decide: Callable[..., str] = run_folder, name: str = "", about: str = "") -> None:
    """Register the schemas and the resolvers of `conf/hydra` with Hydra; may be called again.

    Args:
        decide: Resolves ``run_folder``.
        name: Name of the command, for its ``--help``.
        about: What the command does.
    """
    OmegaConf.register_new_resolver("run_folder", decide, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("help", lambda *, _root_: help_text(_root_, name, about), replace=True)
    store = ConfigStore.instance()
    for root, kind in _ROOTS.items():
        store.store(name=f"base_{root}", node=kind)
    for group, nodes in _SCHEMAS.items():
        for each, node in nodes.items():
            store.store(group=group, name=f"base_{each}", node=node)


def build(node: Any, kind: type[Settings]) -> Settings:
    """Turn a configuration node into the settings object of its schema; the constructor checks the values.

    Raises:
        ConfigError: If a required value is missing or a value cannot work.
    """
    check_finite(node)
    try:
        settings = OmegaConf.to_object(node)
    except MissingMandatoryValue as error:
        missing = ", ".join(f"`{key}`" for key in sorted(OmegaConf.missing_keys(node)))
        raise ConfigError(f"{missing} must be given: add `{error.full_key}=VALUE` to the command.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    if not isinstance(settings, kind):
        raise TypeError(f"expected {kind.__name__}, the node holds {type(settings).__name__}.")
    return settings


def built_object(node: Any) -> Any:
    """Instantiate the class that ``_target_`` of a configuration node names, with the rest of the node as arguments.

    Raises:
        ConfigError: If the class is not in this library, or a value cannot work.
    """
    check_finite(node)
    if not str(node._target_).startswith("llm2rec."):
        raise ConfigError(
            f"`{node._get_full_key('_target_')}` is {node._target_!r}, expected a name of this library; to use a "
            "class of your own, set `active=custom active.policy=module.Class`."
        )
    try:
        return instantiate(node)
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, Llm2RecError):
            raise cause from error
        raise ConfigError(f"{node._target_} cannot be instantiated: {cause}") from error


def check_finite(node: Any) -> None:
    """Check that a node holds no NaN and no infinity, which most range checks let pass.

    Raises:
        ConfigError: Naming the option.
    """
    for key, value in _numbers(OmegaConf.to_container(node, resolve=False), node._get_full_key(None)):
        if not math.isfinite(value):
            raise ConfigError(f"`{key}` is {value}, expected a finite number.")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(each, f"{key}.{name}" if key else str(name))
