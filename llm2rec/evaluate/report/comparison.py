"""Compare scored runs: group seeds into entries, test entries against a baseline, and sum up in sentences."""

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
from llm2rec.evaluate.labels import MODEL_SETTINGS, labels_of, without_seed
from llm2rec.evaluate.report.findings import Comparison, Entry, Group, SliceMetrics
from llm2rec.evaluate.scoring.scoring import Scored
from llm2rec.evaluate.scoring.slices import Slice

__all__ = [
    "ALPHA",
    "POPULARITY",
    "Contender",
    "RunScores",
    "baseline_of",
    "check_baseline",
    "compare",
    "conclusions",
    "contenders",
    "gains_by",
    "headline",
    "interval",
    "of_slice",
    "p_value",
    "percent",
    "read_run",
    "relative",
]

ALPHA = 0.05  # significance level
POPULARITY = "popularity"
_GROUPS = 4


@dataclass(frozen=True)
class RunScores:
    """A scored run with the contents of its folder.

    Attributes:
        scored: Its scores.
        folder: Its folder; None for popularity.
        ranks: 0-based ranks of the test targets, shape ``(M,)``.
        record: Its ``run.json``.
        config: Its resolved configuration; empty if there is none.
        command: The command that started it; None if unknown.
    """

    scored: Scored
    folder: Path | None
    ranks: NDArray[np.int64] = field(repr=False)
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    command: str | None = None

    @property
    def stage(self) -> str:
        """``student``, ``distill``, ``teacher`` or ``ensemble``; ``popularity`` if there is no run."""
        return str(self.record.get("stage", POPULARITY))

    @property
    def name(self) -> str:
        """The folder's name, preceded by that of its multirun."""
        if self.folder is None:
            return POPULARITY
        name = self.folder.name
        return name if name.startswith("result_") else f"{self.folder.parent.name}/{name}"


@dataclass(frozen=True)
class Contender:
    """An entry with its runs.

    Attributes:
        entry: The entry.
        runs: Its runs.
        by_run: The headline metric by run and row, shape ``(runs, M)``.
    """

    entry: Entry
    runs: tuple[RunScores, ...]
    by_run: NDArray[np.float64] = field(repr=False)

    @property
    def values(self) -> NDArray[np.float64]:
        """The headline metric of each row, mean over runs, shape ``(M,)``."""
        return self.by_run.mean(axis=0)


def headline(ks: Sequence[int]) -> str:
    """The metric of the report: NDCG@10, or NDCG at the largest cut-off if 10 is not among ``ks``."""
    return f"ndcg@{10 if 10 in ks else max(ks)}"


def read_run(scored: Scored, folder: Path, command: str | None) -> RunScores:
    """Read ranks, record and configuration of a scored run.

    Raises:
        CheckpointError: If the ranks stored with the scores are missing or do not match them.
        DataError: If its configuration is damaged.
    """
    remedy = f"delete {folder / 'metrics' / 'test.json'}: the run is then scored again."
    try:
        ranks = np.load(folder / "metrics" / "test_ranks.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{folder.name} holds no readable ranks ({error}); {remedy}") from error
    for metric in (name for name in scored.metrics if name.startswith(("hr@", "ndcg@"))):
        found = float(row_values(ranks, metric).mean()) if ranks.ndim == 1 and len(ranks) else float("nan")
        if not abs(found - scored.metrics[metric]) < 1e-9:
            raise CheckpointError(
                f"the stored {metric} of {folder.name} is {scored.metrics[metric]:.6f}, but its ranks give "
                f"{found:.6f}; {remedy}"
            )
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    return RunScores(scored, folder, ranks, read_record(folder), config, command)


def contenders(runs: Sequence[RunScores], ks: Sequence[int]) -> list[Contender]:
    """Group runs that differ only in their seed.

    Args:
        runs: All scored runs, popularity among them.
        ks: Cut-offs.

    Returns:
        One contender per entry, in the order of their first runs.
    """
    alike: dict[tuple[str, str, str], list[RunScores]] = {}
    for run in runs:
        settings = {name: without_seed(run.config.get(name)) for name in MODEL_SETTINGS.get(run.stage, ())}
        settings["ended_early"] = run.record.get("ended_early", False)
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
    return Contender(entry, tuple(members), np.stack([row_values(each.ranks, headline(ks)) for each in members]))


def check_baseline(wanted: str | None, folders: Sequence[Path]) -> None:
    """Reject a baseline that is not among the runs, before they are scored.

    Raises:
        ConfigError: If it is not.
    """
    if wanted is None:
        return
    plain = [str(read_record(folder).get("label", folder.name)) for folder in folders]
    labels = [POPULARITY, *labels_of(folders)]
    if wanted not in [*labels, *plain] and not any(_ends_with(folder, wanted) for folder in folders):
        raise ConfigError(
            f"`report.baseline` is {wanted!r}, expected a label or the folder of a run that is compared; labels are "
            f"{', '.join(map(repr, dict.fromkeys(labels)))}."
        )


def baseline_of(found: Sequence[Contender], wanted: str | None) -> Contender:
    """The contender that others are compared with.

    Args:
        found: All contenders, popularity first.
        wanted: Its label, or the folder of one of its runs; None for the first that is not popularity, or popularity
            if there is only one other.

    Returns:
        The contender; the first one if several share the label.
    """
    if wanted is None:
        trained = [each for each in found if each.entry.stage != POPULARITY]
        return trained[0] if len(trained) > 1 else found[0]
    first = [(each, each.runs[0]) for each in found]
    labelled = [each for each, run in first if wanted == run.scored.label]
    labelled += [each for each, run in first if wanted == run.record.get("label")]
    named = [each for each in found for run in each.runs if run.folder is not None and _ends_with(run.folder, wanted)]
    return (labelled + named)[0]


def _ends_with(folder: Path, wanted: str) -> bool:
    """Whether ``wanted`` is a folder's path or its last parts."""
    names = Path(wanted).parts
    return len(names) > 0 and folder.parts[-len(names) :] == names


def compare(found: Sequence[Contender], baseline: Contender) -> list[Comparison]:
    """Compare each trained contender with the baseline; p-values are corrected for their number."""
    others = [each for each in found if each is not baseline and each.entry.stage != POPULARITY]
    differences = [paired_difference(each.by_run, baseline.by_run) for each in others]
    return [
        Comparison(each.entry.name, difference, p, difference.relative)
        for each, difference, p in zip(others, differences, holm([each.p for each in differences]), strict=True)
    ]


def gains_by(numbers: NDArray[np.int64], found: Sequence[Contender], baseline: Contender) -> list[Group]:
    """Gains over the baseline in quarters of the rows.

    Args:
        numbers: The number to group rows by, shape ``(M,)``.
        found: All contenders.
        baseline: The one to compare with.

    Returns:
        Groups by ascending numbers; fewer than four if many rows have the same number.
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


def of_slice(part: Slice, found: Sequence[Contender], metric: str) -> SliceMetrics:
    """Metrics of a slice of the test rows.

    Args:
        part: The slice.
        found: All contenders.
        metric: The headline metric, NDCG, which HR at the same cut-off goes with.
    """
    names = (metric, f"hr@{metric.partition('@')[2]}")
    metrics = {
        each.entry.name: {
            name: estimate(np.stack([row_values(run.ranks[part.rows], name) for run in each.runs])) for name in names
        }
        for each in found
    }
    n_rows = len(part.rows)
    return SliceMetrics(part.name, part.title, part.note, n_rows, n_rows / len(found[0].values), metrics)


def percent(value: float, *, signed: bool = False) -> str:
    """A share in percent, without the percent sign."""
    return f"{100 * value:{'+' if signed else ''}.2f}".replace("-", "\u2212")


def interval(value: Estimate, *, signed: bool = False) -> str:
    """A mean in percent with its interval."""
    mean, low, high = (percent(each, signed=signed) for each in (value.mean, value.low, value.high))
    return f"{mean} [{low},\u00a0{high}]"


def p_value(p: float, *, is_bound: bool = False) -> str:
    """A p-value, with "≤" if it is a bound: the smallest that random signs can give, perhaps corrected."""
    return "< 0.001" if p < 0.001 else f"{'≤ ' if is_bound else ''}{p:.3f}"


def relative(difference: Difference) -> str:
    """A relative difference in percent with its interval; empty if there is none."""
    if difference.relative is None:
        return ""
    shown = [difference.relative, difference.ratio_low or 0.0, difference.ratio_high or 0.0]
    mean, low, high = (f"{100 * each:+.1f}".replace("-", "\u2212") for each in shown)
    return f"{mean} [{low},\u00a0{high}]"


def conclusions(
    found: Sequence[Contender], baseline: Contender, comparisons: Sequence[Comparison], metric: str
) -> list[str]:
    """Sum up: the best entry and its lead, the comparison with the baseline, and what the seeds show.

    Args:
        found: All contenders, popularity among them.
        baseline: The one that others were compared with.
        comparisons: The comparisons.
        metric: The headline metric.

    Returns:
        Paragraphs.
    """
    ordered = sorted(found, key=lambda each: -each.entry.metrics[metric].mean)
    best, second = ordered[0], ordered[1]
    paragraphs = [_best(best, second, paired_difference(best.by_run, second.by_run), metric)]
    if comparisons:
        paragraphs.append(_against_baseline(baseline, comparisons, metric))
    paragraphs.append(_seeds(best, second, found, metric))
    return paragraphs


def _best(best: Contender, second: Contender, lead: Difference, metric: str) -> str:
    mean = best.entry.metrics[metric]
    text = (
        f"{best.entry.name} is best: its {metric.upper()} is {percent(mean.mean)} % (95 % interval {percent(mean.low)} "
        f"to {percent(mean.high)}), {percent(lead.mean)} points above the second, {second.entry.name}."
    )
    ends = f"95 % interval of the lead {percent(lead.low, signed=True)} to {percent(lead.high, signed=True)} points"
    test = f"{ends}, p = {p_value(lead.p, is_bound=lead.p_is_bound)}".replace("= <", "<").replace("= ≤", "≤")
    if lead.p < ALPHA and lead.low > 0:
        return f"{text} The lead is significant over the test rows ({test})."
    return f"{text} The lead is not significant ({test}): these test rows do not separate the two."


def _against_baseline(baseline: Contender, comparisons: Sequence[Comparison], metric: str) -> str:
    significant = [each for each in comparisons if each.p_holm < ALPHA]
    better, worse = ([each.name for each in significant if each.difference.mean * sign > 0] for sign in (1, -1))
    undecided = [each.name for each in comparisons if each not in significant]
    parts = [
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {verdict}"
        for names, verdict in (
            (better, "significantly better"),
            (worse, "significantly worse"),
            (undecided, "not significantly different"),
        )
        if names
    ]
    several = f", corrected for {len(comparisons)} comparisons (Holm)" if len(comparisons) > 1 else ""
    return f"Against {baseline.entry.name} by {metric.upper()}{several}: {'; '.join(parts)}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _seeds(best: Contender, second: Contender, found: Sequence[Contender], metric: str) -> str:
    trained = [each for each in found if each.runs[0].folder is not None]
    if all(len(each.runs) == 1 for each in trained):
        return (
            "Each model was trained with one seed. The intervals cover the choice of test rows, not the training seed; "
            "train the closest models with several seeds before you rely on a small lead."
        )
    first, next_best = best.entry.metrics[metric], second.entry.metrics[metric]
    text = (
        "Intervals of means are over test rows, of the mean over seeds; intervals of differences between models with "
        "several seeds each are over rows and seeds."
    )
    if min(len(first.runs), len(next_best.runs)) > 1:
        separate = min(first.runs) > max(next_best.runs)
        text += f" {'Every' if separate else 'Not every'} seed of the best model is above every seed of the second."
    single = [each.entry.name for each in trained if len(each.runs) == 1]
    return text + (f" Trained with one seed only: {_listed(single)}." if single else "")
