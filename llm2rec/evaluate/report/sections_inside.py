"""The parts of the report that look inside: learning curves, teacher and students, experts, recommendations."""

from collections.abc import Sequence
from math import log

from llm2rec.evaluate.report.charts import Dot, Line, forest, grouped, lines
from llm2rec.evaluate.report.conclusions import percent
from llm2rec.evaluate.report.document import Block, Figure, Table, Text
from llm2rec.evaluate.report.evidence import Curve, GateUse, Labelling, Overlap, Sample
from llm2rec.evaluate.report.gathering import Findings

__all__ = ["curve_blocks", "gate_blocks", "overlap_blocks", "sample_blocks"]


def _notes(findings: Findings, part: str) -> list[Block]:
    return [Text(each, is_note=True) for each in findings.notes[part]]


def curve_blocks(findings: Findings, slots: dict[str, int]) -> list[Block]:
    """Validation histories, one figure for each kind of run, since their steps are of different sizes."""
    kinds = dict.fromkeys((each.kind, each.metric) for each in findings.curves)
    figures: list[Block] = [
        _curves(kind, metric, [each for each in findings.curves if (each.kind, each.metric) == (kind, metric)], slots)
        for kind, metric in kinds
    ]
    if not figures:
        figures = [Text("No run has a validation history.", is_note=True)]
    return figures + _notes(findings, "curves")


def _curves(kind: str, metric: str, curves: Sequence[Curve], slots: dict[str, int]) -> Figure:
    title = f"Validation {metric.upper()} of {kind} in training"
    among = ", among the candidates of validation" if kind == "teachers that write titles" else ""
    description = f"By optimizer steps{among}; a ring marks the step whose weights were kept. " + " ".join(
        f"{each.name} was best at step {each.best_step:,}." for each in curves
    )
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
    axes = {"x_axis": "optimizer steps", "y_axis": f"validation {metric.upper()} (%)"}
    return Figure(
        title,
        description,
        lambda width: lines(drawn, **axes, title=title, description=description, width=width),
        Table(title, ["run", "steps", "best step", f"best {metric.upper()}, %"], rows),
    )


def overlap_blocks(findings: Findings, slots: dict[str, int]) -> list[Block]:
    """Shared best items of students and the teachers they were distilled from, and what those teachers' labels cost."""
    figures: list[Block] = [_overlap(each, slots) for each in findings.overlaps]
    if not figures and not findings.notes["overlap"]:
        figures = [Text("No run was distilled from a teacher.", is_note=True)]
    return figures + _notes(findings, "overlap") + _labels(findings.labellings)


def _labels(labellings: Sequence[Labelling]) -> list[Block]:
    if not labellings:
        return []
    rows = [
        [each.name, f"{each.labelled:,} of {each.train_rows:,}", f"{each.seconds:,.1f}", f"{each.seconds_saved:,.1f}"]
        for each in labellings
    ]
    note = (
        "Saved: what labelling the other training rows would have taken at the same speed; a selection policy with a "
        "budget (`active`) told the teacher to leave them out."
    )
    header = ["run", "training rows labelled", "seconds", "seconds saved"]
    return [Table("What the teachers' labels cost", header, rows), Text(note, is_note=True)]


def _overlap(overlap: Overlap, slots: dict[str, int]) -> Figure:
    k, students = overlap.top_k, overlap.students
    title = f"How many of the {k} best items students share with {overlap.teacher}"
    without = ", items of the history left out as the teacher leaves them out" if overlap.without_history else ""
    description = (
        f"Share of the teacher's first {k} that are among a student's first {k}, in {overlap.rows:,} training rows"
        f"{without}; a random choice would share {100 * overlap.chance:.2g} %. Distilled from it: "
        f"{', '.join(overlap.taught)}. The teacher's outputs are those of run {overlap.run}, as they are now."
    )
    dots = [Dot(name, 100 * each.mean, 100 * each.low, 100 * each.high, slots[name]) for name, each in students.items()]
    axis = f"shared items of the first {k} (%)"
    rows = [[name, percent(each.mean), percent(each.low), percent(each.high)] for name, each in students.items()]
    return Figure(
        title,
        description,
        lambda width: forest(dots, axis=axis, title=title, description=description, zero=True, form=".1f", width=width),
        Table(title, ["run", "shared, %", "lower end", "upper end"], rows),
    )


def gate_blocks(findings: Findings) -> list[Block]:
    """How teachers use their experts."""
    figures: list[Block] = [_gates(each) for each in findings.gates]
    if not figures and not findings.notes["gates"]:
        figures = [Text("No teacher is among the runs.", is_note=True)]
    return figures + _notes(findings, "gates")


def _gates(use: GateUse) -> Figure:
    n_experts = len(use.groups[0][3])
    title = f"Mean gates of {use.name} by length of the history"
    description = (
        f"Test rows in quarters by how many interactions the user had before. An even mixture gives each of "
        f"{n_experts} experts {100 / n_experts:.3g} %. A row's gates have {use.entropy:.3f} nats of entropy (even: "
        f"{log(n_experts):.3f}), and tell {use.information:.4f} nats of which row it is (0: all share one mixture)."
    )
    named = [
        (f"{low:,}" if low == high else f"{low:,} to {high:,}", n_rows, gates)
        for low, high, n_rows, gates in use.groups
    ]
    dots = [
        (
            f"{name} interactions before, {n_rows:,} rows",
            [Dot(f"expert {e + 1}", 100 * gate, slot=e + e // 7) for e, gate in enumerate(gates)],
        )
        for name, n_rows, gates in named
    ]
    header = ["interactions before", "rows", *[f"expert {e + 1}, %" for e in range(n_experts)]]
    rows = [[name, f"{n_rows:,}", *[f"{100 * gate:.1f}" for gate in gates]] for name, n_rows, gates in named]
    return Figure(
        title,
        description,
        lambda width: grouped(
            dots, axis="mean gate (%)", title=title, description=description, form=".1f", width=width
        ),
        Table(title, header, rows),
    )


def sample_blocks(findings: Findings) -> list[Block]:
    """What students recommend to a few users."""
    if not findings.samples or not findings.samples[0].answers:
        none = "No student is among the runs that could be asked."
        return [Text(none, is_note=True), *_notes(findings, "samples")]
    intro = (
        "Test users evenly spaced over the split, not chosen by what came out, with the last items of their histories. "
        "A tick marks the item that came next; its place is the one among all items."
    )
    return [Text(intro, is_note=True), *map(_sample, findings.samples), *_notes(findings, "samples")]


def _sample(sample: Sample) -> Table:
    rows = [
        [
            name,
            "; ".join(
                f"{place}. {chr(0x2713) + ' ' if hit else ''}{title}" for place, (title, hit) in enumerate(answer, 1)
            ),
            f"{sample.places[name]:,}",
        ]
        for name, answer in sample.answers.items()
    ]
    history = " \u2192 ".join(sample.history)
    caption = f"User {sample.user} had, oldest first: {history}. Then came: {sample.target}."
    return Table(caption, ["run", "recommends", "place of next"], rows, is_text=True)
