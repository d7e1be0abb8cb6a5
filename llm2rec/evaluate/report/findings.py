"""The content of the report, which is also the schema of ``report.json``."""

from dataclasses import dataclass
from typing import Any

from llm2rec.core.statistics import Difference, Estimate

__all__ = [
    "Comparison",
    "Curve",
    "Entry",
    "Findings",
    "GateUse",
    "Group",
    "Labelling",
    "Overlap",
    "RunNote",
    "Sample",
    "SliceMetrics",
]


@dataclass(frozen=True)
class Entry:
    """A line of the report: runs that differ only in their seed.

    Attributes:
        name: Its label, followed by the run's name if several entries share the label.
        stage: ``student``, ``distill``, ``teacher``, ``ensemble`` or ``popularity``.
        runs: Names of its runs.
        seeds: Their seeds.
        parameters: Parameters used at inference; None without a model.
        milliseconds: Median time per user of the first run.
        metrics: Estimates by metric.
    """

    name: str
    stage: str
    runs: tuple[str, ...]
    seeds: tuple[int | None, ...]
    parameters: int | None
    milliseconds: float | None
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class Comparison:
    """An entry against the baseline.

    Attributes:
        name: The entry.
        difference: Of the headline metric, entry minus baseline.
        p_holm: The p-value, corrected for the number of entries compared.
        relative: The difference divided by the baseline's mean; None if that is 0.
    """

    name: str
    difference: Difference
    p_holm: float
    relative: float | None


@dataclass(frozen=True)
class Group:
    """Rows with similar values of some number.

    Attributes:
        low: Smallest number in the group.
        high: Largest.
        rows: Number of rows.
        gains: Mean difference to the baseline by entry.
    """

    low: int
    high: int
    rows: int
    gains: dict[str, Estimate]


@dataclass(frozen=True)
class SliceMetrics:
    """Metrics of a slice of the test rows.

    Attributes:
        name: Its key.
        title: What the rows have in common.
        note: What to know about it.
        rows: Number of the rows.
        share: Their share of all test rows.
        metrics: Estimates by entry and metric.
    """

    name: str
    title: str
    note: str
    rows: int
    share: float
    metrics: dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class Curve:
    """The validation history of a run.

    Attributes:
        name: Entry and seed.
        entry: The entry.
        kind: ``students``, ``teachers``, or ``teachers that write titles``, which choose among few candidates.
        metric: The metric shown.
        best_step: Optimizer step whose weights were kept.
        points: Step and value of each evaluation.
    """

    name: str
    entry: str
    kind: str
    metric: str
    best_step: int
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Overlap:
    """The share of a teacher's best items that each student also ranks among its best.

    Attributes:
        teacher: Name of the teacher outputs.
        run: The run that wrote them, as their manifest says.
        top_k: Items compared.
        rows: Training rows compared.
        without_history: Whether items of the history are left out, as the teacher leaves them out.
        chance: The share of a random ranking.
        students: Mean share by entry.
        taught: Entries that were distilled from these outputs.
    """

    teacher: str
    run: str
    top_k: int
    rows: int
    without_history: bool
    chance: float
    students: dict[str, Estimate]
    taught: tuple[str, ...]


@dataclass(frozen=True)
class Labelling:
    """The cost of a teacher's labels, and what a budget saves.

    Attributes:
        name: The run, as its entry.
        labelled: Training rows labelled.
        train_rows: All training rows.
        seconds: Time for the labelled rows.
        seconds_saved: Estimated time for the others, at the same speed.
    """

    name: str
    labelled: int
    train_rows: int
    seconds: float
    seconds_saved: float


@dataclass(frozen=True)
class GateUse:
    """How a teacher uses its experts.

    Attributes:
        name: Entry and seed.
        entropy: Mean entropy of a row's gates, in nats.
        information: Mutual information of row and expert, in nats; 0 if all rows have the same gates.
        groups: Fewest and most interactions of a group of users, its rows, and the mean gate of each expert.
    """

    name: str
    entropy: float
    information: float
    groups: tuple[tuple[int, int, int, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Sample:
    """Recommendations of the students for one test user.

    Attributes:
        user: The user's id.
        history: Titles, oldest first, the last ones of the history.
        target: Title of the next item.
        answers: Best titles by entry, each with whether it is the target.
        places: 1-based rank of the target among all items, by entry.
    """

    user: str
    history: tuple[str, ...]
    target: str
    answers: dict[str, tuple[tuple[str, bool], ...]]
    places: dict[str, int]


@dataclass(frozen=True)
class RunNote:
    """Provenance of a run.

    Attributes:
        name: Its folder's name.
        entry: The entry it belongs to.
        stage: Its stage.
        seed: Its seed.
        started: Its start time; None if unknown.
        commit: The commit of its code, with ``+`` if there were uncommitted changes; None if unknown.
        command: The command, without its launcher; None if unknown.
    """

    name: str
    entry: str
    stage: str
    seed: int | None
    started: str | None
    commit: str | None
    command: str | None


@dataclass(frozen=True)
class Findings:
    """The whole content of a report.

    Attributes:
        about: Dataset, protocol, date, command, commit and versions of the evaluation.
        metric: The headline metric.
        baseline: The entry that others are compared with.
        conclusions: Sentences that sum up the comparison.
        entries: The entries, popularity first.
        comparisons: Each entry against the baseline.
        by_popularity: Gains by how often the target occurs in training.
        by_length: Gains by how many interactions the user had before the target.
        slices: Rows that are reported apart.
        curves: Validation histories.
        overlaps: Teachers and students.
        labellings: Cost of the teachers' labels.
        gates: Use of experts.
        samples: Recommendations.
        runs: Provenance.
        notes: Why something is missing, by section.
    """

    about: dict[str, Any]
    metric: str
    baseline: str
    conclusions: list[str]
    entries: list[Entry]
    comparisons: list[Comparison]
    by_popularity: list[Group]
    by_length: list[Group]
    slices: list[SliceMetrics]
    curves: list[Curve]
    overlaps: list[Overlap]
    labellings: list[Labelling]
    gates: list[GateUse]
    samples: list[Sample]
    runs: list[RunNote]
    notes: dict[str, list[str]]
