"""Jobs of sweeps as a table with one row per combination of options."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from llm2rec.core.files import replaced_file, write_json
from llm2rec.core.run import Job
from llm2rec.evaluate.scoring.scoring import Scored
from llm2rec.evaluate.table import aligned

__all__ = ["Combination", "combine", "format_sweep", "write_sweep"]


@dataclass(frozen=True)
class Combination:
    """Jobs that differ only in their seed.

    Attributes:
        label: Their label, as in the table of all runs.
        options: Their options, without those that all jobs of the label share.
        seeds: Their seeds.
        runs: Their run folders, as ``<sweep>/<number>``.
        metrics: For each metric the mean, the sample standard deviation over the jobs (None for a single job), and
            the values in the order of ``seeds``.
    """

    label: str
    options: dict[str, str]
    seeds: list[int | None]
    runs: list[str]
    metrics: dict[str, dict[str, Any]]


def combine(jobs: Sequence[Job], scored: Mapping[Path, Scored]) -> list[Combination]:
    """Group jobs that differ only in their seed.

    Args:
        jobs: Jobs of one or more sweeps; unfinished ones are left out.
        scored: Scores by run folder.

    Returns:
        Combinations by label, each in the order of their first jobs.
    """
    labelled: dict[str, list[Job]] = {}
    for job in jobs:
        if job.is_finished:
            labelled.setdefault(scored[job.folder].label, []).append(job)
    alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[Job]] = {}
    for label, members in labelled.items():
        common = set.intersection(*(set(job.options.items()) for job in members))
        for job in members:
            options = tuple(option for option in job.options.items() if option not in common)
            alike.setdefault((label, options), []).append(job)
    return [
        Combination(
            label,
            dict(options),
            [scored[job.folder].seed for job in members],
            [job.name for job in members],
            _spreads([scored[job.folder].metrics for job in members]),
        )
        for (label, options), members in alike.items()
    ]


def _spreads(metrics: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    spreads = {}
    for name in metrics[0]:
        values = [each[name] for each in metrics if name in each]
        if len(values) == len(metrics):
            spreads[name] = {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": values}
    return spreads


def format_sweep(combinations: Sequence[Combination], ks: Sequence[int]) -> str:
    """A text table with one row per combination: mean ± standard deviation over its jobs, in percent."""
    names = [f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in ks if (name, k) not in (("ndcg", 1), ("mrr", 1))]
    body = [
        [
            " ".join([each.label, *(f"{key}={value}" for key, value in each.options.items())]),
            str(len(each.runs)),
            *(_cell(each.metrics.get(name)) for name in names),
        ]
        for each in combinations
    ]
    return aligned(["options", "jobs", *(name.upper() for name in names)], body)


def _cell(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return ""
    text = f"{100 * spread['mean']:.2f}"
    return text if spread["std"] is None else f"{text} ± {100 * spread['std']:.2f}"


def write_sweep(
    folder: Path, jobs: Sequence[Job], scored: Mapping[Path, Scored], ks: Sequence[int], about: Mapping[str, Any]
) -> str:
    """Write ``sweep.txt`` and ``sweep.json``.

    Args:
        folder: Run folder of the evaluation.
        jobs: Jobs of the sweeps.
        scored: Scores by run folder.
        ks: Cut-offs.
        about: Dataset and protocol, for the JSON file.

    Returns:
        The table.
    """
    combinations, missing = combine(jobs, scored), [job for job in jobs if not job.is_finished]
    past = "left out of" if about["mask_seen"] else "kept in"
    text = (
        "sweep: mean ± standard deviation over the jobs of each combination of options, in percent; items in the "
        f"user's past are {past} the rankings\n"
        f"{format_sweep(combinations, ks)}\n"
    )
    if missing:
        text += f"not finished and not in the table: {', '.join(job.name for job in missing)}\n"
    with replaced_file(folder / "sweep.txt") as aside:
        aside.write_text(text, encoding="utf-8")
    content = {"combinations": [asdict(each) for each in combinations], "not_finished": [job.name for job in missing]}
    write_json(folder / "sweep.json", {**about, **content})
    return text
