"""The report as a document: which parts it has, and their words, tables and figures."""

import shlex
from collections.abc import Sequence

from llm2rec.core.statistics import Estimate
from llm2rec.evaluate.report.charts import Dot, forest, grouped, scatter
from llm2rec.evaluate.report.conclusions import ALPHA, named_p, percent
from llm2rec.evaluate.report.document import Block, Code, Document, Facts, Figure, Section, Table, Text
from llm2rec.evaluate.report.findings import POPULARITY, Entry, Group
from llm2rec.evaluate.report.gathering import Findings
from llm2rec.evaluate.report.sections_inside import curve_blocks, gate_blocks, overlap_blocks, sample_blocks

__all__ = ["document_of"]


def document_of(findings: Findings) -> Document:
    """Put the findings into words, tables and figures."""
    about, slots = findings.about, slots_of(findings)
    commit = about["git"]["commit"]
    sections = [
        Section("conclusions", "In short", [Text(each) for each in findings.conclusions]),
        Section("setting", "What was compared", _setting(findings)),
        Section("results", "Results", _results(findings, slots)),
        Section("baseline", f"Against {findings.baseline}", _against(findings, slots)),
        Section("groups", "Who gains", _groups(findings, slots)),
        Section("latency", "Latency and quality", _latency(findings, slots)),
        Section("curves", "Learning curves", curve_blocks(findings, slots)),
        Section("overlap", "Teacher and students", overlap_blocks(findings, slots)),
        Section("gates", "Use of the experts", gate_blocks(findings)),
        Section("samples", "Recommendations", sample_blocks(findings)),
        Section("provenance", "How to do it again", _provenance(findings)),
    ]
    of_code = "" if commit is None else f", llm2rec {commit[:10]}{' with changes' if about['git']['dirty'] else ''}"
    return Document(f"Recommenders on {about['dataset']}", f"Evaluation of {_date(about['date'])}{of_code}", sections)


def slots_of(findings: Findings) -> dict[str, int]:
    """Colour and mark of each entry: grey for popularity, six colours for the others, each time with other marks."""
    trained = [entry.name for entry in findings.entries if entry.stage != POPULARITY]
    return {POPULARITY: 6} | {name: number + number // 6 for number, name in enumerate(trained)}


def _date(iso: str) -> str:
    return iso.replace("T", " ")[:16] + iso[16:]


def _setting(findings: Findings) -> list[Block]:
    about, metric = findings.about, findings.metric
    k = metric.partition("@")[2]
    leave_one_out = about["split"] == "leave_one_out"
    rows = (
        "each user's last interaction; the one before it chose the weights, the earlier ones trained them"
        if leave_one_out
        else "everybody's latest interactions; those before them chose the weights, the earlier ones trained them"
    )
    seen = "taken out of the ranking" if about["mask_seen"] else "left in the ranking"
    pairs = [
        ("Dataset", f"{about['dataset']} (fingerprint {about['fingerprint'][:12]})"),
        ("Test rows", f"{about['rows']:,}: {rows}"),
        (
            "Task",
            f"given a user's history, rank all {about['n_items']:,} items; the item that came next should be at the "
            "top. Items that score the same count against the model; no row is left out",
        ),
        ("Items the user had before", seen),
        (metric.upper(), f"1 / log2(place + 1) if that item is among the first {k}, else 0; the mean over rows"),
        (f"HR@{k}", f"the share of rows whose item is among the first {k}"),
    ]
    blocks: list[Block] = [Facts(pairs)]
    if any(len(entry.runs) > 1 for entry in findings.entries):
        blocks.append(Text("Runs that differ in their seed alone are one entry: their mean.", is_note=True))
    return blocks


def _interval(value: Estimate) -> str:
    return f"{percent(value.mean)} [{percent(value.low)},\u00a0{percent(value.high)}]"


def _results(findings: Findings, slots: dict[str, int]) -> list[Block]:
    metric, k = findings.metric, findings.metric.partition("@")[2]
    shown = [name for name in dict.fromkeys((metric, f"hr@{k}", "hr@1")) if name in findings.entries[0].metrics]
    ordered = sorted(findings.entries, key=lambda entry: -entry.metrics[metric].mean)
    several = any(len(entry.runs) > 1 for entry in ordered)
    header = [
        "run",
        *[f"{name.upper()}, %" for name in shown],
        *(["seeds", "spread, points"] if several else []),
        "parameters",
        "ms per user",
    ]
    rows = [
        [
            entry.name,
            *[_interval(entry.metrics[name]) for name in shown],
            *(_seeds(entry, metric) if several else []),
            f"{entry.parameters:,}",
            "" if entry.milliseconds is None else f"{entry.milliseconds:.3g}",
        ]
        for entry in ordered
    ]
    first, last = ((entry.name, percent(entry.metrics[metric].mean)) for entry in (ordered[0], ordered[-1]))
    dots = [_dot(entry.name, entry.metrics[metric], slots[entry.name]) for entry in ordered]
    title = f"{metric.upper()} of each run"
    description = (
        f"Mean over test rows with its 95 % bootstrap interval; higher is better. {first[0]} is first with "
        f"{first[1]} %, {last[0]} last with {last[1]} %."
    )
    axis = f"{metric.upper()} on the test split (%)"
    caption = (
        "Means in percent with 95 % bootstrap intervals over test rows"
        + (f"; spread: standard deviation of {metric.upper()} over seeds" if several else "")
        + ". More metrics are in comparison.txt and report.json."
    )
    figure = Figure(
        title,
        description,
        lambda width: forest(dots, axis=axis, title=title, description=description, zero=True, width=width),
        _numbers(title, "run", [(entry.name, entry.metrics[metric]) for entry in ordered], metric.upper()),
    )
    return [figure, Table(caption, header, rows)]


def _seeds(entry: Entry, metric: str) -> list[str]:
    spread = entry.metrics[metric].spread
    seeds = ", ".join(str(seed) for seed in entry.seeds if seed is not None)
    return [seeds, "" if spread is None else percent(spread)]


def _dot(name: str, value: Estimate, slot: int, x: float = 0.0) -> Dot:
    return Dot(name, 100 * value.mean, 100 * value.low, 100 * value.high, slot, x)


def _numbers(caption: str, first: str, values: Sequence[tuple[str, Estimate]], unit: str) -> Table:
    rows = [[name, percent(each.mean), percent(each.low), percent(each.high)] for name, each in values]
    return Table(caption, [first, unit, "lower end", "upper end"], rows)


def _against(findings: Findings, slots: dict[str, int]) -> list[Block]:
    if not findings.comparisons:
        return [Text("There is nothing to compare: one run alone was evaluated.", is_note=True)]
    metric, found = findings.metric.upper(), findings.comparisons
    rows = [
        [
            each.name,
            f"{percent(each.difference.mean, signed=True)} "
            f"[{percent(each.difference.low, signed=True)},\u00a0{percent(each.difference.high, signed=True)}]",
            "" if each.relative is None else f"{100 * each.relative:+.1f} %".replace("-", "\u2212"),
            f"{each.difference.better:,} / {each.difference.worse:,}",
            named_p(each.difference.p),
            named_p(each.p_holm),
        ]
        for each in found
    ]
    header = ["run", f"{metric}, points", "relative", "rows better / worse", "p", "p, corrected"]
    title = f"{metric} above {findings.baseline}"
    sure = [each.name for each in found if each.p_holm < ALPHA]
    description = "Difference on the same test rows with its 95 % bootstrap interval; the line is the baseline. " + (
        f"Surely different after correction: {', '.join(sure)}." if sure else "None is surely different."
    )
    axis = f"{metric} above the baseline (points)"
    values = [(e.name, Estimate(e.difference.mean, e.difference.low, e.difference.high)) for e in found]
    dots = [_dot(name, value, slots[name]) for name, value in values]
    figure = Figure(
        title,
        description,
        lambda width: forest(
            dots, axis=axis, title=title, description=description, zero=True, form="+.2f", width=width
        ),
        _numbers(title, "run", values, f"{metric}, points"),
    )
    correction = (
        f"corrected for the {len(found)} comparisons of this table by Holm's method, which keeps the chance of any "
        "false alarm among them at 5 %"
        if len(found) > 1
        else "with a single comparison there is nothing to correct"
    )
    how = (
        "p: paired permutation test, two-sided: 10,000 times the sign of each row's difference is drawn at random, and "
        "p is how often their sum is at least as far from 0 as that observed. Corrected p: " + correction + ". Rows "
        "that both rank alike are neither better nor worse. The test is over test rows, of the mean over seeds where "
        "there are several."
    )
    if findings.about["split"] != "leave_one_out":
        how += " A user may have several test rows, which are taken as independent; intervals are then too narrow."
    return [figure, Table(f"Each run against {findings.baseline}", header, rows), Text(how, is_note=True)]


def _groups(findings: Findings, slots: dict[str, int]) -> list[Block]:
    if not findings.comparisons:
        return [Text("There is no gain to divide: one run alone was evaluated.", is_note=True)]
    popular = _gains(
        findings,
        slots,
        findings.by_popularity,
        "by popularity of the item",
        "Test rows in quarters, by how often their item was interacted with in training, the rarest first.",
        "in training",
    )
    length = _gains(
        findings,
        slots,
        findings.by_length,
        "by length of the history",
        "Test rows in quarters, by how many interactions the user had before, the shortest first.",
        "before",
    )
    note = (
        "Intervals are those of each group by itself; with many groups a few will leave out 0 by chance. Groups are "
        "as even as equal numbers, which stay together, allow."
    )
    return [popular, length, Text(note, is_note=True)]


def _gains(
    findings: Findings, slots: dict[str, int], groups: Sequence[Group], how: str, description: str, unit: str
) -> Figure:
    metric = findings.metric.upper()
    title = f"{metric} above {findings.baseline}, {how}"
    named = [(_group_name(each.low, each.high, unit), each) for each in groups]
    dots = [
        (f"{name}, {group.rows:,} rows", [_dot(entry, gain, slots[entry]) for entry, gain in group.gains.items()])
        for name, group in named
    ]
    values = [(f"{name}: {entry}", gain) for name, group in named for entry, gain in group.gains.items()]
    axis = f"{metric} above the baseline (points)"
    told = f"{description} Dots right of the line are gains, with 95 % intervals over the rows of the group."
    return Figure(
        title,
        told,
        lambda width: grouped(dots, axis=axis, title=title, description=told, form="+.2f", width=width),
        _numbers(title, "group and run", values, f"{metric}, points"),
    )


def _group_name(low: int, high: int, unit: str) -> str:
    numbers = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{numbers} interaction{'' if low == high == 1 else 's'} {unit}"


def _latency(findings: Findings, slots: dict[str, int]) -> list[Block]:
    metric = findings.metric
    timed = [(entry, entry.milliseconds) for entry in findings.entries if entry.milliseconds]
    if not timed:
        return [Text("No run was timed.", is_note=True)]
    title = f"Milliseconds per user and {metric.upper()}"
    entry, quickest = min(timed, key=lambda each: each[1])
    slowest = max(each for _, each in timed)
    description = (
        "Up is better, left is faster; upright lines are 95 % intervals over test rows. "
        f"{entry.name} answers in {quickest:.3g} ms"
        + (f", {slowest / quickest:,.0f} times as fast as the slowest." if slowest > 1.5 * quickest else ".")
    )
    dots = [_dot(entry.name, entry.metrics[metric], slots[entry.name], x=each) for entry, each in timed]
    axes = {"x_axis": "median time of an answer (ms, logarithmic)", "y_axis": f"{metric.upper()} (%)"}
    rows = [[entry.name, f"{each:.3g}", percent(entry.metrics[metric].mean)] for entry, each in timed]
    figure = Figure(
        title,
        description,
        lambda width: scatter(dots, **axes, title=title, description=description, width=width),
        Table(title, ["run", "ms per user", f"{metric.upper()}, %"], rows),
    )
    note = (
        "Median over 50 answers for one user at a time, measured on the machine and with the threads that each run was "
        "scored with; runs scored on different machines cannot be compared by it."
    )
    return [figure, Text(note, is_note=True)]


def _provenance(findings: Findings) -> list[Block]:
    about = findings.about
    git, versions = about["git"], about["versions"]
    changed = ", with changes that are not committed" if git["dirty"] else ""
    commit = "not known" if git["commit"] is None else git["commit"] + changed
    header = ["run", "entry", "stage", "seed", "started", "commit"]
    rows = [
        [
            run.name,
            run.entry,
            run.stage,
            "" if run.seed is None else str(run.seed),
            "not recorded" if run.started is None else _date(run.started),
            run.commit or "not recorded",
        ]
        for run in findings.runs
    ]
    commands: list[Block] = [
        Code("This evaluation", shlex.join(["python", "-m", "llm2rec.evaluate", *about["overrides"]])),
        *[
            Code(f"{run.name}, {run.entry}", run.command)
            if run.command is not None
            else Text(f"{run.name}, {run.entry}: its command is not recorded.", is_note=True)
            for run in findings.runs
        ],
    ]
    launcher = (
        "Commands are given as for one process; a launcher, such as accelerate launch, is not recorded. A commit with "
        "+ had changes that were not committed. Each run's folder holds its whole configuration."
    )
    return [
        Facts([("Commit", commit), *[(name, version) for name, version in versions.items()]]),
        Table("Where the numbers come from", header, rows, is_text=True),
        *commands,
        Text(launcher, is_note=True),
    ]
