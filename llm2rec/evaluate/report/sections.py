"""The sections of the report: words, tables and figures made from `Findings`."""

from collections.abc import Sequence
from functools import partial
from math import log

from llm2rec.core.statistics import Estimate
from llm2rec.evaluate.report.charts import Dot, Line, forest, grouped, lines, scatter
from llm2rec.evaluate.report.comparison import ALPHA, POPULARITY, interval, p_value, percent, relative
from llm2rec.evaluate.report.document import Block, Document, Facts, Figure, Note, Section, Table, Text
from llm2rec.evaluate.report.findings import Comparison, Curve, Findings, GateUse, Group, Labelling, Overlap, Sample
from llm2rec.evaluate.report.provenance import date_of, provenance

__all__ = ["document_of"]

_Slots = dict[str, int]  # colour and mark of each entry


def document_of(findings: Findings) -> Document:
    """Write the report of an evaluation as a document."""
    about, slots = findings.about, _slots(findings)
    commit = about["git"]["commit"]
    sections = [
        Section("conclusions", "In short", [Text(each) for each in findings.conclusions]),
        Section("setting", "What was compared", _setting(findings)),
        Section("results", "Results", _results(findings, slots)),
        Section("baseline", f"Against {findings.baseline}", _against(findings, slots)),
        Section("groups", "Who gains", _groups(findings, slots)),
        Section("latency", "Latency and quality", _latency(findings, slots)),
        Section("curves", "Learning curves", _curves(findings, slots)),
        Section("overlap", "Teacher and students", _overlaps(findings, slots)),
        Section("gates", "Use of the experts", _gates(findings)),
        Section("samples", "Recommendations", _samples(findings)),
        Section("provenance", "How to reproduce", provenance(findings)),
    ]
    code = "" if commit is None else f", llm2rec {commit[:10]}{' with changes' if about['git']['dirty'] else ''}"
    return Document(f"Recommenders on {about['dataset']}", f"Evaluation of {date_of(about['date'])}{code}", sections)


def _slots(findings: Findings) -> _Slots:
    """Grey for popularity, six colours for the others, with other marks each time the colours repeat."""
    trained = [entry.name for entry in findings.entries if entry.stage != POPULARITY]
    return {POPULARITY: 6} | {name: number + number // 6 for number, name in enumerate(trained)}


def _notes(findings: Findings, section: str) -> list[Block]:
    return [Note(each) for each in findings.notes[section]]


def _dot(name: str, value: Estimate, slot: int, x: float = 0.0) -> Dot:
    return Dot(name, 100 * value.mean, 100 * value.low, 100 * value.high, slot, x)


def _numbers(caption: str, first: str, values: Sequence[tuple[str, Estimate]], unit: str) -> Table:
    rows = [[name, percent(each.mean), percent(each.low), percent(each.high)] for name, each in values]
    return Table(caption, [first, unit, "lower end", "upper end"], rows)


def _forest(
    title: str, description: str, values: Sequence[tuple[str, Estimate]], slots: _Slots, unit: str, axis: str, form: str
) -> Figure:
    dots = [_dot(name, value, slots[name]) for name, value in values]
    draw = partial(forest, dots, axis=axis, zero=True, form=form)
    return Figure(title, description, draw, _numbers(title, "run", values, unit))


def _setting(findings: Findings) -> list[Block]:
    about, metric = findings.about, findings.metric
    k = metric.partition("@")[2]
    rows = "the latest interactions of all users; earlier ones are for validation, those before for training"
    if about["split"] == "leave_one_out":
        rows = "each user's last interaction; the one before it is for validation, the earlier ones for training"
    pairs = [
        ("Dataset", f"{about['dataset']} (fingerprint {about['fingerprint'][:12]})"),
        ("Test rows", f"{about['rows']:,}: {rows}"),
        (
            "Task",
            f"given a user's history, rank all {about['n_items']:,} items; the next item should be at the top. "
            "Items with the same score count against the model. No row is left out",
        ),
        ("Items in the user's past", "removed from the ranking" if about["mask_seen"] else "kept in the ranking"),
        (metric.upper(), f"1 / log2(rank + 1) if the next item is among the first {k}, else 0; mean over rows"),
        (f"HR@{k}", f"the share of rows whose next item is among the first {k}"),
    ]
    blocks: list[Block] = [Facts(pairs)]
    if any(len(entry.runs) > 1 for entry in findings.entries):
        blocks.append(Note("Runs that differ only in their seed form one entry: their mean."))
    return blocks + [Note(sentence) for sentence in about.get("unlike", ())]


def _results(findings: Findings, slots: _Slots) -> list[Block]:
    metric, k = findings.metric, findings.metric.partition("@")[2]
    shown = [name for name in dict.fromkeys((metric, f"hr@{k}", "hr@1")) if name in findings.entries[0].metrics]
    ordered = sorted(findings.entries, key=lambda entry: -entry.metrics[metric].mean)
    several = any(len(entry.runs) > 1 for entry in ordered)
    of_seeds = ["seeds", "spread, points"] if several else []
    header = ["run", *[f"{name.upper()}, %" for name in shown], *of_seeds, "parameters", "ms per user"]
    rows = []
    for entry in ordered:
        row = [entry.name, *[interval(entry.metrics[name]) for name in shown]]
        if several:
            spread = entry.metrics[metric].spread
            row.append(", ".join(str(seed) for seed in entry.seeds if seed is not None))
            row.append("" if spread is None else percent(spread))
        time = "" if entry.milliseconds is None else f"{entry.milliseconds:.3g}"
        rows.append([*row, "" if entry.parameters is None else f"{entry.parameters:,}", time])
    first, last = ((entry.name, percent(entry.metrics[metric].mean)) for entry in (ordered[0], ordered[-1]))
    caption = (
        "Means in percent with 95 % bootstrap intervals over test rows"
        + (f"; spread: standard deviation of {metric.upper()} over seeds" if several else "")
        + ". More metrics are in comparison.txt and report.json."
    )
    figure = _forest(
        f"{metric.upper()} of each run",
        f"Mean over test rows with its 95 % bootstrap interval; higher is better. The first is {first[0]} with "
        f"{first[1]} %, the last {last[0]} with {last[1]} %.",
        [(entry.name, entry.metrics[metric]) for entry in ordered],
        slots,
        metric.upper(),
        f"{metric.upper()} on the test split (%)",
        ".2f",
    )
    return [figure, Table(caption, header, rows)]


def _against(findings: Findings, slots: _Slots) -> list[Block]:
    if not findings.comparisons:
        return [Note("Only one run was evaluated, so there is nothing to compare.")]
    metric, found = findings.metric.upper(), findings.comparisons
    values = [(e.name, Estimate(e.difference.mean, e.difference.low, e.difference.high)) for e in found]
    rows = [
        [
            each.name,
            interval(value, signed=True),
            relative(each.difference),
            f"{each.difference.better:,} / {each.difference.worse:,}",
            *(p_value(p, is_bound=each.difference.p_is_bound) for p in (each.difference.p, each.p_holm)),
        ]
        for each, (_, value) in zip(found, values, strict=True)
    ]
    header = ["run", f"{metric}, points", "relative, %", "rows better / worse", "p", "p, corrected"]
    significant = [each.name for each in found if each.p_holm < ALPHA]
    figure = _forest(
        f"{metric} above {findings.baseline}",
        "Difference on the same test rows with its 95 % bootstrap interval; the line is the baseline. "
        f"Significant after correction: {', '.join(significant) or 'none'}.",
        values,
        slots,
        f"{metric}, points",
        f"{metric} above the baseline (points)",
        "+.2f",
    )
    how_to_read = Note(_how_to_read_p(found, findings.about["split"]))
    return [figure, Table(f"Each run against {findings.baseline}", header, rows), how_to_read]


def _how_to_read_p(found: Sequence[Comparison], split: str) -> str:
    several = f"corrected for the {len(found)} comparisons by Holm's method (5 % chance of any false positive)"
    text = (
        "p: two-sided paired permutation test. The sign of each row's difference is drawn at random 10,000 times; p is "
        "how often the sum is at least as far from 0 as the observed one. The last column is "
        f"{several if len(found) > 1 else 'the same, as there is only one comparison'}. Rows with equal ranks are "
        "neither better nor worse. The test is over test rows, on the mean over seeds if there are several."
    )
    if split != "leave_one_out":
        text += " A user may have several test rows, which the test takes as independent: intervals are too narrow."
    return text


def _groups(findings: Findings, slots: _Slots) -> list[Block]:
    if not findings.comparisons:
        return [Note("Only one run was evaluated, so there is no gain to show."), *_slices(findings)]
    popular = "Test rows in quarters by how often their item occurs in training, rarest first."
    length = "Test rows in quarters by how many earlier interactions the user has, fewest first."
    note = (
        "Each interval is for one group alone; with many groups a few exclude 0 by chance. Groups have about the same "
        "size; rows with equal numbers stay together."
    )
    return [
        _gains(findings, slots, findings.by_popularity, "by popularity of the item", popular, "in training"),
        _gains(findings, slots, findings.by_length, "by length of the history", length, "before"),
        Note(note),
        *_slices(findings),
    ]


def _slices(findings: Findings) -> list[Block]:
    """Metrics of the rows that are reported apart."""
    blocks: list[Block] = []
    for part in findings.slices:
        names = list(next(iter(part.metrics.values())))
        caption = (
            f"{part.title[0].upper()}{part.title[1:]}: {part.rows:,} test rows ({100 * part.share:.1f} %). {part.note} "
            "Means in percent with 95 % bootstrap intervals"
        )
        rows = [[entry, *(interval(found[name]) for name in names)] for entry, found in part.metrics.items()]
        blocks.append(Table(caption, ["run", *(f"{name.upper()}, %" for name in names)], rows))
    return blocks


def _gains(findings: Findings, slots: _Slots, groups: Sequence[Group], how: str, description: str, unit: str) -> Figure:
    metric = findings.metric.upper()
    title = f"{metric} above {findings.baseline}, {how}"
    named = [(f"{_range(each.low, each.high)} {unit}", each) for each in groups]
    dots = [
        (f"{name}, {group.rows:,} rows", [_dot(entry, gain, slots[entry]) for entry, gain in group.gains.items()])
        for name, group in named
    ]
    values = [(f"{name}: {entry}", gain) for name, group in named for entry, gain in group.gains.items()]
    return Figure(
        title,
        f"{description} Dots right of the line are gains, with 95 % intervals over the rows of the group.",
        partial(grouped, dots, axis=f"{metric} above the baseline (points)", form="+.2f"),
        _numbers(title, "group and run", values, f"{metric}, points"),
    )


def _range(low: int, high: int) -> str:
    numbers = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{numbers} interaction{'' if low == high == 1 else 's'}"


def _latency(findings: Findings, slots: _Slots) -> list[Block]:
    metric = findings.metric
    timed = [(entry, entry.milliseconds) for entry in findings.entries if entry.milliseconds]
    if not timed:
        return [Note("No run was timed.")]
    title = f"Milliseconds per user and {metric.upper()}"
    entry, fastest = min(timed, key=lambda each: each[1])
    slowest = max(each for _, each in timed)
    description = (
        "Up is better, left is faster; vertical lines are 95 % intervals over test rows. "
        f"The fastest is {entry.name} with {fastest:.3g} ms"
        + (f", {slowest / fastest:,.0f} times as fast as the slowest." if slowest > 1.5 * fastest else ".")
    )
    dots = [_dot(entry.name, entry.metrics[metric], slots[entry.name], x=each) for entry, each in timed]
    rows = [[entry.name, f"{each:.3g}", percent(entry.metrics[metric].mean)] for entry, each in timed]
    figure = Figure(
        title,
        description,
        partial(scatter, dots, x_axis="median time per user (ms, logarithmic)", y_axis=f"{metric.upper()} (%)"),
        Table(title, ["run", "ms per user", f"{metric.upper()}, %"], rows),
    )
    note = (
        "Median of 50 requests, one user at a time, on the machine and with the threads that each run was scored with. "
        "Do not compare the times of runs scored on different machines."
    )
    return [figure, Note(note)]


def _curves(findings: Findings, slots: _Slots) -> list[Block]:
    """One figure for each kind of run, since their steps have different sizes."""
    by_kind: dict[tuple[str, str], list[Curve]] = {}
    for each in findings.curves:
        by_kind.setdefault((each.kind, each.metric), []).append(each)
    figures: list[Block] = [_curve_figure(kind, metric, own, slots) for (kind, metric), own in by_kind.items()]
    return (figures or [Note("No run has a validation history.")]) + _notes(findings, "curves")


def _curve_figure(kind: str, metric: str, curves: Sequence[Curve], slots: _Slots) -> Figure:
    title = f"Validation {metric.upper()} of {kind} during training"
    among = ", among the validation candidates" if kind == "teachers that write titles" else ""
    best = " ".join(f"{each.name} is best at step {each.best_step:,}." for each in curves)
    drawn = [
        Line(
            each.entry,
            tuple((float(step), 100 * value) for step, value in each.points),
            float(each.best_step),
            slots[each.entry],
        )
        for each in curves
    ]
    rows = [
        [each.name, f"{each.points[-1][0]:,}", f"{each.best_step:,}", percent(max(v for _, v in each.points))]
        for each in curves
    ]
    return Figure(
        title,
        f"By optimizer steps{among}; a ring marks the step whose weights are kept. {best}",
        partial(lines, drawn, x_axis="optimizer steps", y_axis=f"validation {metric.upper()} (%)"),
        Table(title, ["run", "steps", "best step", f"best {metric.upper()}, %"], rows),
    )


def _overlaps(findings: Findings, slots: _Slots) -> list[Block]:
    figures: list[Block] = [_overlap_figure(each, slots) for each in findings.overlaps]
    if not figures and not findings.notes["overlap"]:
        figures = [Note("No run is distilled from a teacher.")]
    return figures + _notes(findings, "overlap") + _labelling_table(findings.labellings)


def _overlap_figure(overlap: Overlap, slots: _Slots) -> Figure:
    k, students = overlap.top_k, overlap.students
    title = f"Items among the first {k} that students share with {overlap.teacher}"
    without = ", without items of the history, as the teacher ranks them" if overlap.without_history else ""
    description = (
        f"Share of the teacher's first {k} items that are among a student's first {k}, over {overlap.rows:,} training "
        f"rows{without}; a random ranking would share {100 * overlap.chance:.2g} %. Distilled from this teacher: "
        f"{', '.join(overlap.taught)}. The teacher outputs are those of run {overlap.run}, as they are now."
    )
    axis = f"shared items among the first {k} (%)"
    return _forest(title, description, list(students.items()), slots, "shared, %", axis, ".1f")


def _labelling_table(labellings: Sequence[Labelling]) -> list[Block]:
    if not labellings:
        return []
    rows = [
        [each.name, f"{each.labelled:,} of {each.train_rows:,}", f"{each.seconds:,.1f}", f"{each.seconds_saved:,.1f}"]
        for each in labellings
    ]
    note = (
        "Seconds saved: estimated time for the training rows that a selection policy with a budget (`active`) left "
        "out, at the same speed."
    )
    header = ["run", "training rows labelled", "seconds", "seconds saved"]
    return [Table("Cost of the teachers' labels", header, rows), Note(note)]


def _gates(findings: Findings) -> list[Block]:
    figures: list[Block] = [_gate_figure(each) for each in findings.gates]
    if not figures and not findings.notes["gates"]:
        figures = [Note("No teacher is among the runs.")]
    return figures + _notes(findings, "gates")


def _gate_figure(use: GateUse) -> Figure:
    n_experts = len(use.groups[0][3])
    title = f"Mean gates of {use.name} by length of the history"
    description = (
        f"Test rows in quarters by how many earlier interactions the user has. Uniform gates give each of the "
        f"{n_experts} experts {100 / n_experts:.3g} %. The mean entropy of a row's gates is {use.entropy:.3f} nats "
        f"(uniform: {log(n_experts):.3f}); the mutual information of row and expert is {use.information:.4f} nats (0: "
        "the same gates for all rows)."
    )
    named = [(_range(low, high), n_rows, gates) for low, high, n_rows, gates in use.groups]
    dots = [
        (
            f"{name} before, {n_rows:,} rows",
            [Dot(f"expert {e + 1}", 100 * gate, slot=e + e // 7) for e, gate in enumerate(gates)],
        )
        for name, n_rows, gates in named
    ]
    header = ["history", "rows", *[f"expert {e + 1}, %" for e in range(n_experts)]]
    rows = [[name, f"{n_rows:,}", *[f"{100 * gate:.1f}" for gate in gates]] for name, n_rows, gates in named]
    return Figure(
        title, description, partial(grouped, dots, axis="mean gate (%)", form=".1f"), Table(title, header, rows)
    )


def _samples(findings: Findings) -> list[Block]:
    if not findings.samples or not findings.samples[0].answers:
        return [Note("No student among the runs can be loaded."), *_notes(findings, "samples")]
    intro = (
        "Test users evenly spaced over the split, chosen independently of the results, with the last items of their "
        "histories. A tick marks the next item; its rank is among all items."
    )
    return [Note(intro), *map(_sample_table, findings.samples), *_notes(findings, "samples")]


def _sample_table(sample: Sample) -> Table:
    rows = [
        [
            name,
            "; ".join(f"{rank}. {chr(0x2713) + ' ' if hit else ''}{title}" for rank, (title, hit) in enumerate(top, 1)),
            f"{sample.places[name]:,}",
        ]
        for name, top in sample.answers.items()
    ]
    caption = f"History of user {sample.user}, oldest first: {' → '.join(sample.history)}. Next item: {sample.target}."
    return Table(caption, ["run", "recommends", "rank of next"], rows, is_text=True)
