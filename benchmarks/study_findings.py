"""What the study of distillation found on the test split: intervals, paired tests, groups of rows, tables, a figure."""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_earlier import Known, Rows
from study_plan import ARMS, BASELINE, LLM_ARMS, SELECT_ON, STUDENTS

from llm2rec.core.statistics import estimate, holm, paired_difference, row_values
from llm2rec.data import load
from llm2rec.evaluate.report.charts import Dot, grouped
from llm2rec.evaluate.report.comparison import Contender, gains_by
from llm2rec.evaluate.report.findings import Entry
from llm2rec.evaluate.scoring.scoring import popularity

__all__ = ["Findings", "brief", "figure", "headline", "tables"]

PARENTS = {arm.name: arm.parent for arm in ARMS if arm.parent is not None}
METRICS = [f"{kind}@{k}" for kind in ("hr", "ndcg") for k in (5, 10, 20)]
HEADLINE_NAMES = {"games": "games", "movielens": "ml100k", "toy": "toy"}
COLOURS = ("#0b62a4", "#c2571a", "#2b8a5a", "#8b4fa8", "#8a6d00", "#b8336a", "#4a5560", "#1a7f8e")
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.name{font-weight:600}.tick,.axis{fill:#666}"
    ".grid{stroke:#ddd}.zero{stroke:#888}.mark{fill:var(--c)}.whisker,.stalk{stroke:var(--c);stroke-width:2.4}"
    + "".join(f".s{number}{{--c:{colour}}}" for number, colour in enumerate(COLOURS))
)


class Findings:
    """Reads ranks of the test targets that scoring has left in the folders of runs.

    Args:
        folder: Where the stages of a dataset have run.
        prepared: Its prepared data.
        seeds: Seeds of final runs; an arm that lacks one is left out.
    """

    def __init__(self, folder: Path, prepared: Path, seeds: tuple[int, ...]) -> None:
        self.folder, self.prepared, self.seeds = folder, prepared, seeds

    def ranks(self, run: str) -> NDArray[np.int64] | None:
        """0-based ranks of the test targets, shape ``(M,)``; None for a run that has not been scored."""
        metrics = self.folder / "result" / run / "metrics"
        scored = (metrics / "test.json").is_file()
        return np.load(metrics / "test_ranks.npy", allow_pickle=False) if scored else None

    def test(
        self, runs: Mapping[str, Mapping[int, str]], teachers: Mapping[str, Mapping[int, str]], earlier: Known
    ) -> tuple[dict[str, Any], Rows]:
        """Compare the arms with the baseline row by row, each by its mean over seeds.

        Args:
            runs: Final runs by arm and seed.
            teachers: The same of the teachers, which are not tested against anything.
            earlier: What is known of arms that have not been run here.

        Returns:
            Empty where the test split has not been opened. Otherwise estimates by arm and metric; differences of
            NDCG@20 with p-values, of searched arms to the baseline and of variations to the arm that they vary
            (`p_holm` is corrected for the number of searched arms, or of that arm's variations; the interval is over
            rows, and `over_seeds` adds what it leaves out); and differences of all to the baseline by popularity of
            the target and by length of the history. Beside it, by arm, what each test row adds to NDCG@20, shape
            ``(M,)``.
        """
        scored = {name: self.scored(found) for name, found in runs.items() if set(found) >= set(self.seeds)}
        ranks = {name: found for name, found in scored.items() if found is not None}
        taught = {name: found for name, each in teachers.items() if (found := self.scored(each)) is not None}
        rows = {**earlier.rows, **{name: row_means(each).astype(np.float32) for name, each in ranks.items()}}
        if BASELINE not in rows:
            return dict(earlier.test), rows
        known = {key: earlier.test.get(key, {}) for key in ("metrics", "teachers", "gains", "variations", "groups")}
        values = {name: each.astype(np.float64) for name, each in rows.items()}
        searched = {name: each for name, each in values.items() if name not in PARENTS}
        # The gain of an arm whose rows are not at hand stands: the baseline's runs are the same.
        before = {name: gain for name, gain in known["gains"].items() if name not in PARENTS}
        gains = corrected({**before, **gains_over(BASELINE, searched)})
        variations = {}
        for parent in dict.fromkeys(PARENTS.values()):
            before = {name: gain for name, gain in known["variations"].items() if PARENTS[name] == parent}
            family = {name: each for name, each in values.items() if parent in (name, PARENTS.get(name))}
            variations |= corrected({**before, **(gains_over(parent, family) if parent in family else {})})
        groups = self.groups(values)
        for of, before in known["groups"].items():
            for group, known_group in zip(groups[of], before, strict=True):
                group["gains"] = {**known_group["gains"], **group["gains"]}
        metrics = {**known["metrics"], **{name: estimates(found) for name, found in ranks.items()}}
        return {
            "metrics": metrics,
            "teachers": {**known["teachers"], **{name: estimates(found) for name, found in taught.items()}},
            "gains": {name: {**gain, **over_seeds(gain, metrics, name, BASELINE)} for name, gain in gains.items()},
            "variations": {
                name: {**gain, **over_seeds(gain, metrics, name, PARENTS[name])} for name, gain in variations.items()
            },
            "groups": groups,
        }, rows

    def scored(self, found: Mapping[int, str]) -> NDArray[np.int64] | None:
        """Ranks of some runs, shape ``(runs, M)``; None unless all have been scored."""
        ranks = [self.ranks(run) for run in found.values()]
        known = [each for each in ranks if each is not None]
        return np.stack(known) if known and len(known) == len(ranks) else None

    def groups(self, values: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
        """Gains over the baseline in quarters of the test rows."""
        data = load(self.prepared)
        test = data.splits["test"].with_format("numpy")
        numbers = {
            "popularity": popularity(data)[np.asarray(test["target"][:])].astype(np.int64),
            "length": np.asarray(test["position"][:], np.int64),
        }
        found = {
            name: Contender(Entry(name, "student", (name,), (), 0, None, {}), (), each[None])
            for name, each in values.items()
        }
        baseline = found[BASELINE]
        return {
            of: [
                {
                    **asdict(group),
                    "baseline": float(values[BASELINE][(each >= group.low) & (each <= group.high)].mean()),
                }
                for group in gains_by(each, list(found.values()), baseline)
            ]
            for of, each in numbers.items()
        }


def gains_over(reference: str, values: Mapping[str, NDArray[np.float64]]) -> dict[str, dict[str, Any]]:
    """Differences of the others to one of the arms, row by row."""
    others = (name for name in values if name != reference)
    return {name: asdict(paired_difference(values[name], values[reference])) for name in others}


def corrected(gains: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same with p-values corrected for how many there are."""
    p_values = holm([gain["p"] for gain in gains.values()])
    return {name: {**gain, "p_holm": p} for (name, gain), p in zip(gains.items(), p_values, strict=True)}


def over_seeds(gain: Mapping[str, Any], metrics: Mapping[str, Any], arm: str, reference: str) -> dict[str, float]:
    """What training seeds add to the uncertainty of an arm's gain over another; empty for single runs.

    Args:
        gain: Their difference, with its interval over rows.
        metrics: Estimates by arm and metric.
        arm: The one.
        reference: The other.

    Returns:
        `seeds_error`, the standard error over seeds of `relative`, as of two independent means; and
        `relative_low` and `relative_high`, the 95 % interval of `relative` over rows and seeds, whose errors add in
        squares (`ratio_low` and `ratio_high` are over rows alone). What rows vary by holds a little of the seeds' noise
        already: it is too wide rather than too narrow.
    """
    both = [metrics[name][SELECT_ON]["runs"] for name in (arm, reference) if name in metrics]
    if len(both) < 2 or min(map(len, both)) < 2:
        return {}
    mean = statistics.mean(both[1])
    error = math.sqrt(sum(statistics.variance(runs) / len(runs) for runs in both)) / mean
    of_seeds = 1.96 * error
    of_rows = [
        (gain["mean"] - gain[end]) / mean for end in ("low", "high")
    ]  # results of before had no ratio's interval
    below, above = (
        off if gain.get(end) is None else gain["relative"] - gain[end]
        for off, end in zip(of_rows, ("ratio_low", "ratio_high"), strict=True)
    )
    return {
        "seeds_error": error,
        "relative_low": gain["relative"] - math.hypot(below, of_seeds),
        "relative_high": gain["relative"] + math.hypot(above, of_seeds),
    }


def compared(test: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All differences by arm; results from before variations were kept apart hold gains alone."""
    return {**test["gains"], **test.get("variations", {})}


def estimates(ranks: NDArray[np.int64]) -> dict[str, Any]:
    """Means, intervals over rows and spread over seeds by metric, of ranks of shape ``(runs, M)``."""
    return {metric: asdict(estimate(np.stack([row_values(run, metric) for run in ranks]))) for metric in METRICS}


def row_means(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each row adds to NDCG@20, mean over runs; shape ``(M,)``."""
    return np.stack([row_values(run, SELECT_ON) for run in ranks]).mean(axis=0)


def by_student(samples: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Dataset, student and findings, of all that there are."""
    for dataset, about in samples.items():
        for student in STUDENTS:
            if student in about:
                yield dataset, student, about[student]


def brief(value: Any) -> Any:
    """The same with six digits per number, and without MRR and cut-offs at 1, which nothing reads."""
    if isinstance(value, dict):
        return {
            name: brief(each) for name, each in value.items() if not (name.startswith("mrr") or name.endswith("@1"))
        }
    if isinstance(value, list | tuple):
        return [brief(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def headline(samples: Mapping[str, Any]) -> dict[str, float]:
    """Headline numbers, of SASRec where no student is named; those that have not been measured are left out.

    The gain is that of the distilled arm which has validated best, and `llm` that of the best among those that a
    language model teaches. Variations are not among them.
    """
    likeness = "likeness of titles that follow each other, standard errors"
    numbers = {
        f"{HEADLINE_NAMES[dataset]}: {likeness}": about["titles"]["errors"] for dataset, about in samples.items()
    }
    for dataset, student, found in by_student(samples):
        name = HEADLINE_NAMES[dataset]
        for arm, runs in found["validation"].items():
            numbers[f"{name} {student} {arm}: validation {SELECT_ON}"] = statistics.mean(runs.values())
        if not (test := found["test"]):
            continue
        if BASELINE in test["metrics"]:  # an earlier one's scores do not count where another has been chosen since
            numbers[f"{student}_{name}_ndcg10"] = test["metrics"][BASELINE]["ndcg@10"]["mean"]
        for arm, gain in compared(test).items():
            which = f"{name} {student} {arm}: gain" + (f" over {PARENTS[arm]}" if arm in PARENTS else "")
            numbers |= {which: gain["relative"], f"{name} {student} {arm}: p": gain["p_holm"]}
        searched = list(test["gains"])
        for prefix, arms in ((name, searched), (f"{name}_llm", [arm for arm in searched if arm in LLM_ARMS])):
            if arms and student == next(iter(STUDENTS)):
                chosen = max(arms, key=lambda arm: statistics.mean(found["validation"][arm].values()))
                gain = test["gains"][chosen]
                numbers |= {f"{prefix}_ndcg20_gain": gain["relative"], f"{prefix}_p": gain["p_holm"]}
    return numbers


def tables(samples: Mapping[str, Any]) -> str:
    """All that is known as Markdown."""
    lines: list[str] = []
    for dataset, student, found in by_student(samples):
        searches = {
            arm: max((each["validation"][SELECT_ON], len(tries)) for each in tries)
            for arm, tries in found["tries"].items()
            if tries
        }
        lines += [
            f"\n{dataset}, {student}, validation\n",
            f"| arm | tries | best {SELECT_ON} | mean of the best's seeds |",
        ]
        lines += ["|---|---|---|---|"]
        for arm, (score, tries) in searches.items():
            seeds = list(found["validation"].get(arm, {}).values())
            mean = f"{statistics.mean(seeds):.4f} ({len(seeds)})" if seeds else ""
            lines.append(f"| {arm} | {tries} | {score:.4f} | {mean} |")
        if found["test"]:
            lines += [f"\n{dataset}, {student}, test\n", *test_table(found["test"])]
    return "\n".join(lines)


def test_table(test: Mapping[str, Any]) -> Iterator[str]:
    """Lines of the table of test scores."""
    yield f"| arm | {' | '.join(METRICS)} | gain in {SELECT_ON} | p (Holm) |"
    yield "|---" * (len(METRICS) + 3) + "|"
    for arm, metrics in test["metrics"].items():
        scores = " | ".join(f"{metrics[metric]['mean']:.4f}" for metric in METRICS)
        gain = compared(test).get(arm)
        shown = "" if gain is None else f"{gain['relative']:+.1%} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
        if gain and "seeds_error" in gain:
            shown += f", with seeds [{gain['relative_low']:+.1%}, {gain['relative_high']:+.1%}]"
        shown += f" over {PARENTS[arm]}" if shown and arm in PARENTS else ""
        yield f"| {arm} | {scores} | {shown} | {'' if gain is None else p_value(gain)} |"
    for teacher, metrics in test["teachers"].items():
        scores = " | ".join(f"{metrics[metric]['mean']:.4f}" for metric in METRICS)
        yield f"| teacher: {teacher} | {scores} | | |"


def p_value(gain: Mapping[str, Any]) -> str:
    """The corrected p-value of a gain, with "≤" if no random signs reached the observed difference."""
    is_bound = gain.get("p_is_bound", gain["p"] * 10_001 < 1.5)  # results of before did not say so
    return f"{'≤ ' if is_bound else ''}{gain['p_holm']:.4f}"


def figure(samples: Mapping[str, Any]) -> str:
    """Gains in NDCG@20 over the tuned baseline with their intervals, as SVG. A line of text while there are none."""
    arms = [arm.name for arm in ARMS if arm.teacher and arm.parent is None]
    groups = []
    for dataset, student, found in by_student(samples):
        gains = found["test"].get("gains", {})
        mean = found["test"]["metrics"][BASELINE][SELECT_ON]["mean"] if gains else 1.0
        dots = [
            Dot(arm, *(100 * gains[arm][end] / mean for end in ("mean", "low", "high")), slot=arms.index(arm))
            for arm in arms
            if arm in gains
        ]
        groups += [(f"{dataset}, {student}", dots)] if dots else []
    if not groups:
        nothing = '<text y="24">The test split has not been opened.</text>'
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="400" height="40">{nothing}</svg>'
    drawn = grouped(
        groups,
        axis=f"Gain in {SELECT_ON.upper()} over the tuned baseline, %",
        title="What distillation adds",
        description="For each dataset and student, the gain of each arm over the baseline, with its 95 % interval.",
        form="+.1f",
        width=768,
    )
    start = drawn.index(">") + 1
    return f"{drawn[:start]}<style>{STYLE}</style>{drawn[start:]}"
