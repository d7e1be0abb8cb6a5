"""What a reader should conclude, in sentences that are computed from the numbers."""

from collections.abc import Sequence

from llm2rec.core.statistics import Difference, paired_difference
from llm2rec.evaluate.report.findings import Comparison, Contender

__all__ = ["ALPHA", "conclusions", "named_p", "percent"]

ALPHA = 0.05


def percent(value: float, *, signed: bool = False) -> str:
    """A part as percent, without the sign for it."""
    return f"{100 * value:{'+' if signed else ''}.2f}".replace("-", "\u2212")


def named_p(p: float) -> str:
    """A p-value, or that it is below what the resamples could tell."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def conclusions(
    found: Sequence[Contender], baseline: Contender, comparisons: Sequence[Comparison], metric: str
) -> list[str]:
    """Say what is best, by how much, whether that is more than chance, and what is not known.

    Args:
        found: All contenders, popularity among them.
        baseline: What they were compared with.
        comparisons: The comparisons.
        metric: The metric of all this.

    Returns:
        Sentences, each a paragraph.
    """
    ordered = sorted(found, key=lambda each: -each.entry.metrics[metric].mean)
    best, second = ordered[0], ordered[1]
    lead = paired_difference(best.values, second.values)
    told = [_of_the_best(best, second, lead, metric)]
    if comparisons:
        told.append(_against_baseline(baseline, comparisons, metric))
    told.append(_of_seeds(best, second, found, metric))
    return told


def _of_the_best(best: Contender, second: Contender, lead: Difference, metric: str) -> str:
    mean = best.entry.metrics[metric]
    told = (
        f"{best.entry.name} is best: its {metric.upper()} is {percent(mean.mean)} % (95 % interval {percent(mean.low)} "
        f"to {percent(mean.high)}), {percent(lead.mean)} points above the next, {second.entry.name}."
    )
    ends = f"95 % interval of the lead {percent(lead.low, signed=True)} to {percent(lead.high, signed=True)} points"
    test = f"{ends}, p = {named_p(lead.p)}".replace("= <", "<")
    if lead.p < ALPHA and lead.low > 0:
        return f"{told} The lead is larger than chance among the test rows explains ({test})."
    return f"{told} The lead does not exceed the uncertainty ({test}): these test rows cannot tell the two apart."


def _against_baseline(baseline: Contender, comparisons: Sequence[Comparison], metric: str) -> str:
    sure = [each for each in comparisons if each.p_holm < ALPHA]
    better, worse = ([each.name for each in sure if each.difference.mean * sign > 0] for sign in (1, -1))
    open_ones = [each.name for each in comparisons if each not in sure]
    parts = [
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {verdict}"
        for names, verdict in (
            (better, "better"),
            (worse, "worse"),
            (open_ones, "neither shown to be better nor to be worse"),
        )
        if names
    ]
    several = f", corrected for {len(comparisons)} comparisons (Holm)" if len(comparisons) > 1 else ""
    return f"Against {baseline.entry.name}{several}, by {metric.upper()}: {'; '.join(parts)}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _of_seeds(best: Contender, second: Contender, found: Sequence[Contender], metric: str) -> str:
    trained = [each for each in found if each.runs[0].folder is not None]
    if all(len(each.runs) == 1 for each in trained):
        return (
            "Each was trained once. The intervals tell what other test rows would have changed, not what another "
            "training seed would; train the closest ones with several seeds before relying on a small lead."
        )
    ours, theirs = best.entry.metrics[metric], second.entry.metrics[metric]
    told = "Intervals are over test rows, of the mean over seeds; the spread over seeds is given beside them."
    if min(len(ours.runs), len(theirs.runs)) > 1:
        apart = min(ours.runs) > max(theirs.runs)
        told += (
            f" Of the two in front, {'every' if apart else 'not every'} seed of the first is above every seed of the "
            "second."
        )
    single = [each.entry.name for each in trained if len(each.runs) == 1]
    return told + (f" Trained with one seed only: {_listed(single)}." if single else "")
