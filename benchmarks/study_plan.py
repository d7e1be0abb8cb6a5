"""What the study of distillation tries: datasets, students, teachers, arms, and the space each arm is searched in."""

import argparse
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_teacher import TEACHER as HYBRID_TRAINING
from ml100k import TEACHER as TEXT_TRAINING

__all__ = [
    "ARMS",
    "BASELINE",
    "PILOTS",
    "QUICK_ARMS",
    "STUDENTS",
    "Arm",
    "Budget",
    "Dataset",
    "datasets",
    "draw",
    "fitting",
    "further",
    "mixture_of",
    "teachers",
]

Config = Mapping[str, Any]
Space = Sequence[Sequence[Config]]

BASELINE = "baseline"
SELECT_ON = "ndcg@20"
STUDENTS = {
    "sasrec": ["student=sasrec", "student.examples=sequences", "student.model.positions=oldest"],
    "gru4rec": ["student=gru4rec", "student.examples=sequences"],
}
_TRAINING, _MODEL, _LOSS = "student.training", "student.model", "student.loss"
_RANKING, _EMBEDDING = "distill.ranking", "distill.embedding"


def shorter(training: Sequence[str]) -> list[str]:
    """The training of a teacher on 4,000 rows: minutes, not hours, without a GPU."""
    return [*(each for each in training if "train_rows" not in each), "teacher.train_rows=4000"]


@dataclass(frozen=True)
class Budget:
    """How much is run.

    Attributes:
        tries: Configurations of the baseline's search, of which the best is where all arms begin.
        more_tries: Configurations that each arm tries from there, the baseline too.
        seeds: Seeds of final runs; the first is that of all searches.
        members: Baselines in the ensemble that teaches, by seed.
        labelled: Part of the training rows that language models label.
        common: Overrides of all students.
        text: Training of the teacher that reads titles only.
        hybrid: Training of the teacher that is given a trained SASRec.
    """

    tries: int = 6
    more_tries: int = 4
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    members: tuple[int, ...] = (1, 2, 3)
    labelled: float = 0.1
    common: tuple[str, ...] = ("student.training.epochs=60",)
    text: tuple[str, ...] = (*shorter(TEXT_TRAINING), "teacher.validation_rows=1000")
    hybrid: tuple[str, ...] = (*shorter(HYBRID_TRAINING), "teacher.validation_rows=1000")


QUICK = Budget(
    tries=1,
    more_tries=1,
    seeds=(1,),
    members=(1,),
    labelled=0.5,
    common=("student.training.epochs=2",),
    text=("teacher.training.epochs=1", "teacher.train_rows=200"),
    hybrid=("teacher.training.epochs=1", "teacher.train_rows=200"),
)


@dataclass(frozen=True)
class Dataset:
    """Where a study takes place.

    Attributes:
        name: Its name in folders of prepared data.
        common: Overrides of all stages.
        paths: The same, with places on this machine.
        patience: Evaluations without improvement after which students stop: few where many validation rows decide.
    """

    name: str
    common: tuple[str, ...]
    paths: tuple[str, ...]
    patience: int


@dataclass(frozen=True)
class Arm:
    """One way to train a student.

    Attributes:
        name: Its name in the results.
        teacher: The teacher it learns from; None for none.
        space: One list of choices for each thing that is searched; an arm that is not searched has none.
        fixed: Options that all its configurations have, over those of the baseline, or of ``parent``.
        parent: The arm whose chosen configuration this one varies, for an ablation.
    """

    name: str
    teacher: str | None = None
    space: Space = ()
    fixed: Config = field(default_factory=dict)
    parent: str | None = None

    @property
    def reads_labels(self) -> bool:
        """Whether its students read what the teacher says of rows, and not its item vectors alone."""
        return self.fixed.get(f"{_RANKING}.weight") != 0


def datasets(options: argparse.Namespace) -> list[Dataset]:
    """The datasets whose folders were given; games come first."""
    if options.quick:
        toy = ("dataset=toy", "dataset.n_users=150", "dataset.n_items=120", "llm=tiny_random")
        return [Dataset("toy", toy, (), 2)]
    found = []
    llm = f"llm.path={Path(options.llm_path).resolve()}"
    if options.games_dir:
        files = {name: Path(options.games_dir).resolve() / f"{name}.csv" for name in ("interactions", "items")}
        games = ("dataset=csv", "dataset.name=games", "dataset.domain=game", "llm=minilm")
        found.append(Dataset("games", games, (*(f"dataset.{k}={file}" for k, file in files.items()), llm), 3))
    if options.raw_dir:
        movies = (f"dataset.raw_dir={Path(options.raw_dir).resolve()}", llm)
        found.append(Dataset("movielens", ("dataset=movielens", "llm=minilm"), movies, 5))
    return found


def options_of(name: str, *values: Any) -> list[Config]:
    """The choices of one option."""
    return [{name: value} for value in values]


# Searches ------------------------------------------------------------------------------------------------------------

BASELINE_SPACE: Space = (
    options_of(f"{_TRAINING}.learning_rate", 2e-3, 1e-3, 4e-3),
    options_of(f"{_MODEL}.dropout", 0.2, 0.1, 0.3, 0.5),
    options_of(f"{_MODEL}.width", 64, 128),
    options_of(f"{_TRAINING}.weight_decay", 0.0, 0.01, 0.1),
    [
        {f"{_LOSS}.name": "cross_entropy"},
        {f"{_LOSS}.name": "sampled_softmax", f"{_LOSS}.n_negatives": 1024, f"{_LOSS}.proposal": "popularity"},
    ],
)
# What is searched with the collaborative teacher was narrowed by pilots, of SASRec on validation of games. The baseline
# is owed as many there and more: single changes of its best. The one that it gained by is owed to all students there.
_GAINED: Config = {f"{_TRAINING}.learning_rate": 1e-3}
PILOTS: Mapping[tuple[str, str, str], Sequence[Config]] = {
    ("games", "sasrec", BASELINE): (
        {f"{_LOSS}.n_negatives": 4096},
        _GAINED,
        {f"{_MODEL}.dropout": 0.4},
        {f"{_TRAINING}.batch_size": 256},
        {f"{_LOSS}.name": "cross_entropy", f"{_LOSS}.n_negatives": "null", f"{_LOSS}.proposal": "null"},
    ),
    ("games", "sasrec", "collaborative"): (_GAINED,),
    ("games", "sasrec", "collaborative, paper's losses"): (_GAINED,),
    ("games", "sasrec", "collaborative, pairs"): (_GAINED,),
    ("games", "sasrec", "hybrid"): (_GAINED,),
    ("games", "sasrec", "vectors"): (_GAINED,),
}
LISTWISE_SPACE: Space = (
    options_of(f"{_RANKING}.weight", 3.0, 1.0, 10.0),
    options_of(f"{_MODEL}.dropout", 0.3, 0.1, 0.2, 0.5),  # soft labels regularise too
    options_of(f"{_RANKING}.temperature", 1.0, 2.0),
)
WEAK_TEACHER_SPACE: Space = (  # one that knows less than its student must not be followed far
    options_of(f"{_RANKING}.weight", 0.3, 0.1, 1.0, 0.03),
    options_of(f"{_MODEL}.dropout", 0.2, 0.3, 0.1, 0.5),
    options_of(f"{_RANKING}.temperature", 1.0, 2.0),
)
VECTORS_SPACE: Space = (
    [
        {f"{_EMBEDDING}.initialise": "whitened"},
        {f"{_EMBEDDING}.initialise": "pca"},
        {f"{_EMBEDDING}.alignment": "cosine", f"{_EMBEDDING}.alignment_weight": 0.3},
        {f"{_EMBEDDING}.alignment": "contrastive", f"{_EMBEDDING}.alignment_weight": 0.1},
        {f"{_EMBEDDING}.alignment": "contrastive", f"{_EMBEDDING}.alignment_weight": 1.0},
        {f"{_EMBEDDING}.fusion_scale": 0.3},
    ],
)
ALIGNED_SPACE: Space = (
    [
        {f"{_EMBEDDING}.alignment": kind, f"{_EMBEDDING}.alignment_weight": weight}
        for kind, weight in (("cosine", 0.3), ("contrastive", 0.1), ("cosine", 3.0), ("contrastive", 1.0))
    ],
)
PAPER_SPACE: Space = (
    options_of(f"{_RANKING}.weight", 0.5, 0.1, 0.3, 1.0),
    options_of(f"{_EMBEDDING}.fusion_scale", 0.3, 0.1, 1.0),
    [  # how candidates are weighed: as in the paper, or as in its program
        {f"{_RANKING}.confidence": "per_row", f"{_RANKING}.renormalise": "false"},
        {f"{_RANKING}.confidence": "per_candidate", f"{_RANKING}.renormalise": "true"},
    ],
)
PAIRS_SPACE: Space = (
    options_of(f"{_RANKING}.weight", 1.0, 0.3, 3.0, 0.1),
    options_of(f"{_MODEL}.dropout", 0.3, 0.1, 0.2, 0.5),
    options_of(f"{_RANKING}.loss", "ranknet", "margin"),
    options_of(f"{_RANKING}.negative", "ranked_last", "none"),
)
LISTWISE = {f"{_RANKING}.loss": "listwise", f"{_RANKING}.top_k": 50, f"{_EMBEDDING}.fusion_scale": 0.0}
# Teachers without a language model: what part of their distribution item neighbours have, and baselines the rest.
MIXTURES = {"collaborative": 0.5, "ensemble": 0.0, "neighbours": 1.0}
SHUFFLED = "text_shuffled"  # the text teacher with the item vectors of other items
PARTS_OF_THE_PAPER = {
    "position": {f"{_RANKING}.gamma_position": 0.0},
    "confidence": {f"{_RANKING}.gamma_confidence": 0.0},
    "consistency": {f"{_RANKING}.gamma_consistency": 0.0},
    "ranking": {f"{_RANKING}.weight": 0.0},
    "embedding": {f"{_EMBEDDING}.fusion_scale": 0.0},
}


def without_each_part(arm: str, teacher: str) -> list[Arm]:
    """Variations of an arm with the paper's losses, each without one of their parts."""
    return [Arm(f"{arm} without {part}", teacher, (), off, arm) for part, off in PARTS_OF_THE_PAPER.items()]


ARMS = (
    Arm(BASELINE, space=BASELINE_SPACE),
    Arm("collaborative", "collaborative", LISTWISE_SPACE, LISTWISE),
    Arm("vectors", "titles", VECTORS_SPACE, {f"{_RANKING}.weight": 0.0, f"{_EMBEDDING}.fusion_scale": 0.0}),
    Arm("vectors, aligned", "titles", ALIGNED_SPACE, {f"{_RANKING}.weight": 0.0, f"{_EMBEDDING}.fusion_scale": 0.0}),
    Arm("hybrid", "hybrid", WEAK_TEACHER_SPACE, LISTWISE),
    Arm("listwise", "text", WEAK_TEACHER_SPACE, LISTWISE),
    Arm("dllm2rec", "text", PAPER_SPACE),
    Arm("collaborative, paper's losses", "collaborative", PAPER_SPACE),
    Arm("collaborative, pairs", "collaborative", PAIRS_SPACE, {f"{_EMBEDDING}.fusion_scale": 0.0}),
    Arm("collaborative, neighbours only", "neighbours", parent="collaborative"),
    Arm("collaborative, ensemble only", "ensemble", parent="collaborative"),
    Arm("collaborative, item vectors too", "collaborative", (), {f"{_EMBEDDING}.fusion_scale": 0.3}, "collaborative"),
    Arm("collaborative, rows of the LLM", "collaborative_budget", parent="collaborative"),
    *without_each_part("collaborative, paper's losses", "collaborative"),
    *without_each_part("dllm2rec", "text"),
    Arm("dllm2rec, vectors shuffled", SHUFFLED, parent="dllm2rec"),
    Arm("dllm2rec with ranknet", "text", fixed={f"{_RANKING}.loss": "ranknet"}, parent="dllm2rec"),
    Arm("dllm2rec with margin", "text", fixed={f"{_RANKING}.loss": "margin"}, parent="dllm2rec"),
)
QUICK_ARMS = ("collaborative", "vectors", "dllm2rec", "collaborative, neighbours only", "dllm2rec without ranking")
LLM_ARMS = ("vectors", "vectors, aligned", "hybrid", "listwise", "dllm2rec")  # searched, and taught by a language model


def draw(space: Space, n: int, seed: str) -> list[dict[str, Any]]:
    """Draw configurations: the first choice of everything, then others at random, each choice about equally often.

    This is Latin hypercube sampling (McKay, Beckman and Conover, 1979), of choices: a few tries see all that there is.

    Args:
        space: One list of choices for each thing that is searched.
        n: Configurations wanted, all different; fewer where the space has fewer.
        seed: The same text draws the same configurations.
    """
    if n >= math.prod(map(len, space)):
        return [_joined(parts) for parts in itertools.product(*space)]
    generator = random.Random(seed)
    while True:
        columns = []
        for choices in space:
            first, *others = (choices[number % len(choices)] for number in range(n))
            columns.append([first, *generator.sample(others, n - 1)])
        drawn = [_joined(parts) for parts in zip(*columns, strict=True)]
        if all(each not in drawn[:number] for number, each in enumerate(drawn)):
            return drawn


def _joined(parts: Sequence[Config]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def fitting(config: Config) -> dict[str, Any]:
    """A configuration whose listwise loss normalises as the student's own loss does: over a sample, or over all."""
    if config.get(f"{_RANKING}.loss") != "listwise":
        return dict(config)
    return {**config, f"{_RANKING}.over": "catalogue" if config[f"{_LOSS}.name"] == "cross_entropy" else "sampled"}


def further(best: Config) -> Space:
    """The space around the baseline's best, for its tries beyond the first; the best itself comes first."""
    rate, dropout = best[f"{_TRAINING}.learning_rate"], best[f"{_MODEL}.dropout"]
    decay = best[f"{_TRAINING}.weight_decay"]
    return (
        options_of(f"{_TRAINING}.learning_rate", rate, *(round(rate * each, 6) for each in (0.5, 0.7, 1.5))),
        options_of(f"{_MODEL}.dropout", dropout, *(round(dropout * each, 2) for each in (0.6, 0.8, 1.3))),
        options_of(f"{_TRAINING}.weight_decay", decay, *(each for each in (0.0, 0.03, 0.3) if each != decay)),
        options_of(f"{_TRAINING}.batch_size", 512, 1024),
    )


# Teachers ------------------------------------------------------------------------------------------------------------


def active(share: float) -> list[str]:
    """A part of the rows, the same for the teacher that labels it and for every student, whatever its seed."""
    return ["active=random", f"active.budget={share}", "active.seed=0"]


def teachers(budget: Budget, recommender: str) -> dict[str, list[str]]:
    """Overrides of the teachers that are language models.

    Args:
        budget: How much is run.
        recommender: Folder of the trained SASRec that the hybrid teacher is given.
    """
    outputs, seed = "teacher.export.top_k=100", f"seed={budget.seeds[0]}"
    return {
        # Its item vectors are what is wanted: it hardly labels a row.
        "titles": ["teacher=zero_shot", "teacher.training.epochs=0", "teacher.export.top_k=1", seed],
        "text": [*budget.text, outputs, seed],
        "hybrid": ["teacher=ilora_hybrid", f"teacher.recommender_run={recommender}", *budget.hybrid, outputs, seed],
    }


def mixture_of(teacher: str) -> str | None:
    """Which mixture a teacher is, whatever rows of it are used; None for a language model."""
    name = teacher.removesuffix("_budget")
    return name if name in MIXTURES else None


def rows_of(teacher: str, budget: Budget) -> list[str]:
    """Which training rows a teacher labels, as overrides of its own stage and of those that read its labels."""
    if teacher in MIXTURES:
        return []
    return active(0.01 if teacher == "titles" else budget.labelled)
