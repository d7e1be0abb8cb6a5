"""What the numbers of several runs say: entries with intervals, comparisons with a baseline, gains by group of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import read_object
from llm2rec.core.run import read_record
from llm2rec.core.statistics import (
    Difference,
    Estimate,
    estimate,
    holm,
    paired_difference,
    quantile_groups,
    row_values,
)
from llm2rec.evaluate.scoring.scoring import Scored

__all__ = [
    "Comparison",
    "Contender",
    "Entry",
    "Group",
    "RunScores",
    "baseline_of",
    "check_baseline",
    "compare",
    "contenders",
    "gains_by",
    "headline",
    "read_run",
]

POPULARITY = "popularity"
_GROUPS = 4
# What of a configuration decides the model that a stage trains, besides the seed.
_SETTINGS = {
    "student": ("dataset", "student", "metrics"),
    "distill": ("dataset", "student", "distill", "active", "metrics"),
    "teacher": ("dataset", "llm", "teacher", "metrics"),
    "ensemble": ("dataset", "ensemble", "runs", "metrics"),
}


@dataclass(frozen=True)
class RunScores:
    """One scored run with what its folder tells.

    Attributes:
        scored: Its row of the comparison.
        folder: Its folder; None for popularity.
        ranks: 0-based ranks of the test targets, shape ``(M,)``.
        record: Its ``run.json``.
        config: Its resolved configuration; empty where there is none.
        command: The command that made it, as far as it is recorded.
    """

    scored: Scored
    folder: Path | None
    ranks: NDArray[np.int64] = field(repr=False)
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    command: str | None = None

    @property
    def stage(self) -> str:
        """``student``, ``distill``, ``teacher`` or ``ensemble``; ``popularity`` for what has no run."""
        return str(self.record.get("stage", POPULARITY))

    @property
    def name(self) -> str:
        """The folder's name, with that of its multirun."""
        if self.folder is None:
            return POPULARITY
        name = self.folder.name
        return name if name.startswith("result_") else f"{self.folder.parent.name}/{name}"


@dataclass(frozen=True)
class Entry:
    """A line of the report: the runs that differ in their seed alone.

    Attributes:
        name: Its label, with the run's name where several entries have that label.
        stage: ``student``, ``distill``, ``teacher``, ``ensemble`` or ``popularity``.
        runs: Names of its runs.
        seeds: Their seeds.
        parameters: Parameters that answering needs.
        milliseconds: Median time of an answer, of the first run.
        metrics: Estimates by metric.
    """

    name: str
    stage: str
    runs: tuple[str, ...]
    seeds: tuple[int | None, ...]
    parameters: int
    milliseconds: float | None
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class Contender:
    """An entry with what it was made of.

    Attributes:
        entry: The entry.
        runs: Its runs.
        values: The headline metric of each row, mean over runs, shape ``(M,)``.
    """

    entry: Entry
    runs: tuple[RunScores, ...]
    values: NDArray[np.float64] = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """An entry against the baseline.

    Attributes:
        name: The entry.
        difference: Of the headline metric, entry minus baseline.
        p_holm: The p-value, corrected for the number of entries compared.
        relative: The difference as a part of the baseline's mean; None where that is 0.
    """

    name: str
    difference: Difference
    p_holm: float
    relative: float | None


@dataclass(frozen=True)
class Group:
    """Rows that are alike in some number.

    Attributes:
        low: Smallest number in the group.
        high: Largest.
        rows: Rows.
        gains: Mean difference to the baseline by entry.
    """

    low: int
    high: int
    rows: int
    gains: dict[str, Estimate]


def headline(ks: Sequence[int]) -> str:
    """The metric that the report is about: NDCG@10, or at the largest cut-off if 10 is none of them."""
    return f"ndcg@{10 if 10 in ks else max(ks)}"


def read_run(scored: Scored, folder: Path, command: str | None) -> RunScores:
    """Read what a scored run's folder tells.

    Raises:
        CheckpointError: If the ranks that were stored with the scores are missing, or are others.
        DataError: If its configuration is damaged.
    """
    remedy = f"delete {folder / 'metrics' / 'test.json'}: the run is then scored again."
    try:
        ranks = np.load(folder / "metrics" / "test_ranks.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{folder.name} holds no ranks that can be read ({error}); {remedy}") from error
    for metric in (name for name in scored.metrics if name.startswith(("hr@", "ndcg@"))):
        found = float(row_values(ranks, metric).mean()) if ranks.ndim == 1 and len(ranks) else float("nan")
        if not abs(found - scored.metrics[metric]) < 1e-9:
            told = f"{metric} {scored.metrics[metric]:.6f}, its ranks give {found:.6f}"
            raise CheckpointError(f"{folder.name} was scored with {told}; {remedy}")
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    return RunScores(scored, folder, ranks, read_record(folder), config, command)


def contenders(runs: Sequence[RunScores], ks: Sequence[int]) -> list[Contender]:
    """Put runs that differ in their seed alone together.

    Args:
        runs: All scored runs, popularity among them.
        ks: Cut-offs.

    Returns:
        One contender an entry, in the order of their first runs.
    """
    alike: dict[tuple[str, str, str], list[RunScores]] = {}
    for run in runs:
        settings = {name: _without_seed(run.config.get(name)) for name in _SETTINGS.get(run.stage, ())}
        alike.setdefault((run.scored.label, run.stage, repr(settings)), []).append(run)
    labels = [label for label, _, _ in alike]
    return [
        _contender(members, ks, label if labels.count(label) == 1 else f"{label} ({members[0].name})")
        for (label, _, _), members in alike.items()
    ]


def _contender(members: Sequence[RunScores], ks: Sequence[int], name: str) -> Contender:
    first = members[0].scored
    entry = Entry(
        name=name,
        stage=members[0].stage,
        runs=tuple(each.name for each in members),
        seeds=tuple(each.scored.seed for each in members),
        parameters=first.parameters,
        milliseconds=first.milliseconds,
        metrics={
            metric: estimate(np.stack([row_values(each.ranks, metric) for each in members]))
            for metric in (f"{kind}@{k}" for k in ks for kind in ("hr", "ndcg", "mrr"))
        },
    )
    values = np.stack([row_values(each.ranks, headline(ks)) for each in members]).mean(axis=0)
    return Contender(entry, tuple(members), values)


def _without_seed(settings: Any) -> Any:
    """Settings without seeds, which a policy and an adapter may hold too."""
    if not isinstance(settings, Mapping):
        return settings
    return {key: _without_seed(each) for key, each in settings.items() if key != "seed"}


def check_baseline(wanted: str | None, folders: Sequence[Path]) -> None:
    """Refuse a baseline that is none of the runs, before these are scored.

    Raises:
        ConfigError: If it is not.
    """
    if wanted is None:
        return
    labels = [POPULARITY, *[str(read_record(folder).get("label", folder.name)) for folder in folders]]
    if wanted not in labels and not any(_is_called(folder, wanted) for folder in folders):
        raise ConfigError(
            f"`report.baseline` is {wanted!r}, expected a label or the folder of a run that is compared; labels are "
            f"{', '.join(map(repr, dict.fromkeys(labels)))}."
        )


def baseline_of(found: Sequence[Contender], wanted: str | None) -> Contender:
    """The contender that others are compared with.

    Args:
        found: All contenders, popularity first.
        wanted: Its label, or the folder of one of its runs; None for the first that is not popularity, or popularity
            where it is the only one.

    Returns:
        The contender; of several with one label the first.
    """
    if wanted is None:
        trained = [each for each in found if each.entry.stage != POPULARITY]
        return trained[0] if len(trained) > 1 else found[0]
    labelled = [each for each in found if wanted == each.runs[0].scored.label]
    named = [each for each in found for run in each.runs if run.folder is not None and _is_called(run.folder, wanted)]
    return (labelled + named)[0]


def _is_called(folder: Path, wanted: str) -> bool:
    """Whether ``wanted`` is a folder's path, or the end of it, in whole names."""
    names = Path(wanted).parts
    return len(names) > 0 and folder.parts[-len(names) :] == names


def compare(found: Sequence[Contender], baseline: Contender) -> list[Comparison]:
    """Compare each trained contender with the baseline, p-values corrected for their number."""
    others = [each for each in found if each is not baseline and each.entry.stage != POPULARITY]
    differences = [paired_difference(each.values, baseline.values) for each in others]
    mean = float(baseline.values.mean())
    return [
        Comparison(each.entry.name, difference, p, difference.mean / mean if mean > 0 else None)
        for each, difference, p in zip(others, differences, holm([each.p for each in differences]), strict=True)
    ]


def gains_by(numbers: NDArray[np.int64], found: Sequence[Contender], baseline: Contender) -> list[Group]:
    """Gains over the baseline in quarters of the rows.

    Args:
        numbers: What the rows are divided by, shape ``(M,)``.
        found: All contenders.
        baseline: Which of them is compared with.

    Returns:
        Groups by ascending numbers; fewer than four where many rows have the same number.
    """
    others = [each for each in found if each is not baseline and each.entry.stage != POPULARITY]
    return [
        Group(
            int(numbers[rows].min()),
            int(numbers[rows].max()),
            len(rows),
            {each.entry.name: estimate((each.values - baseline.values)[None, rows]) for each in others},
        )
        for rows in quantile_groups(numbers, _GROUPS)
    ]
