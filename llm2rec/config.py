"""The configuration as types: what `conf/` may say, checked when Hydra composes it.

Every group of `conf/` has a schema here, so a misspelt key or a wrong type fails before anything starts. Only the
stages' ``__main__`` modules read a `Config`; everything below takes plain values.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from llm2rec.core.errors import ConfigError
from llm2rec.core.metrics import CUTOFFS, metric_names
from llm2rec.core.paths import run_folder
from llm2rec.data import SCHEMAS as DATASET_SCHEMAS
from llm2rec.data import DatasetSpec
from llm2rec.distill.settings import DistillSettings, DLLM2RecCodeSettings
from llm2rec.ensemble.settings import EnsembleSettings
from llm2rec.evaluate.settings import ReportSettings
from llm2rec.plan.settings import PlanSettings
from llm2rec.recommend.settings import RecommendSettings
from llm2rec.share.settings import ShareSettings
from llm2rec.student.settings import CaserStudent, GRU4RecStudent, SASRecStudent, StudentSettings
from llm2rec.teacher.settings import LLMSettings, TeacherSettings, TinyRandomSettings

__all__ = ["Config", "MetricsConfig", "register"]


@dataclass
class PathsConfig:
    """Where things lie; relative paths count from the folder the command was typed in.

    Attributes:
        root: That folder.
        raw_dir: Downloads.
        processed_dir: Prepared datasets.
        llm_dir: Language models made here, and what they computed that can be used again.
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
    """What is told while a stage runs.

    Attributes:
        tensorboard: Whether to write TensorBoard events into the run folder.
        progress: Whether to show progress.
    """

    tensorboard: bool = True
    progress: bool = True


@dataclass
class MetricsConfig:
    """How rankings are measured.

    Attributes:
        ks: Cut-offs.
        select_on: Validation metric for early stopping and the choice of weights.
        mask_seen: Whether items the user had before are taken out of the rankings.
        n_candidates: Items among which `llm2rec.evaluate` measures HR@1 besides, the target included; 0 for none.
        candidates_seed: Seed of those candidates.
    """

    ks: list[int] = field(default_factory=lambda: list(CUTOFFS))
    select_on: str = "ndcg@10"
    mask_seen: bool = False
    n_candidates: int = 0
    candidates_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse metrics that no evaluation will give."""
        if not self.ks or min(self.ks) < 1:
            raise ConfigError(f"metrics.ks is {self.ks}, expected cut-offs of at least 1.")
        if self.select_on not in metric_names():
            raise ConfigError(f"metrics.select_on is {self.select_on!r}, expected one of {', '.join(metric_names())}.")
        if self.n_candidates != 0 and self.n_candidates < 2:
            raise ConfigError(
                f"metrics.n_candidates is {self.n_candidates}, expected 0 for none, or at least 2: the target and what "
                "it is picked from."
            )


@dataclass
class ActiveConfig:
    """Which rows are distilled; the class is named by ``_target_``."""

    _target_: str = MISSING


@dataclass
class BudgetedActiveConfig(ActiveConfig):
    """What every policy with a budget can be told; see `llm2rec.distill.selection_policy`."""

    budget: float = MISSING
    final_budget: float | None = None
    over_epochs: int = 10


@dataclass
class RandomActiveConfig(BudgetedActiveConfig):
    """Schema of ``conf/active/random.yaml``; see `SelectionPolicyRandom`."""

    seed: int = MISSING


@dataclass
class ChoosingActiveConfig(BudgetedActiveConfig):
    """What every policy can be told that chooses among labelled rows."""

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
    """Everything a stage may read.

    Attributes:
        dataset: Which interactions, and how they are split.
        llm: Which language model.
        teacher: How it is tuned and what it writes.
        student: Which student, and its training.
        distill: How the student learns from the teacher.
        active: From which rows.
        ensemble: Of what `llm2rec.ensemble` is made, besides ``runs``.
        metrics: How rankings are measured.
        report: What the report of an evaluation compares with.
        logging: What is told.
        paths: Where things lie.
        seed: Seed of initial weights, order and dropout.
        resume: Folder of an earlier run of the same stage and configuration to continue, or null.
        reuse: Whether a finished run of the same stage, configuration and data is taken for this one.
        runs: What to evaluate: ``latest`` (the newest finished run of each kind on this dataset) or a list of run
            folders, and of sweeps' folders, which stand for their finished jobs. `llm2rec.ensemble` takes a list too.
        plan: What `llm2rec.plan` plans for.
        gpus: On how many GPUs; `llm2rec.plan` reads it, the launcher decides.
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
    reuse: bool = False
    runs: Any = "latest"
    plan: PlanSettings = MISSING
    gpus: int = 1


def register(decide: Callable[..., str] = run_folder) -> None:
    """Make the schemas and the ``run_folder`` resolver known to Hydra; may be called again.

    Args:
        decide: What decides the run folder.
    """
    OmegaConf.register_new_resolver("run_folder", decide, use_cache=True, replace=True)
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config)
    store.store(name="base_recommend", node=RecommendSettings)
    store.store(name="base_share", node=ShareSettings)
    schemas: dict[str, dict[str, Any]] = {
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
    for group, nodes in schemas.items():
        for name, node in nodes.items():
            store.store(group=group, name=f"base_{name}", node=node)
