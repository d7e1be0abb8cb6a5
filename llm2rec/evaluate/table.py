"""The comparison as a table, JSON and a chart: ``comparison.txt``, ``.json`` and ``.png``."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm2rec.core.files import replaced_file, write_json
from llm2rec.evaluate.scoring.candidates import CANDIDATES_HR, GENERATED_HR, GENERATED_HR_VALID, VALID_RATIO
from llm2rec.evaluate.scoring.scoring import Scored

__all__ = ["aligned", "draw", "format_slice", "format_table", "format_titles", "write_comparison"]


def format_table(rows: Sequence[Scored], ks: Sequence[int], n_candidates: int = 0) -> str:
    """A text table with one row per run: metrics in percent, HR@1 among candidates with its interval."""
    names = [f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in ks if (name, k) not in (("ndcg", 1), ("mrr", 1))]
    among = [f"HR@1 of {n_candidates}", "95 %"] if n_candidates else []
    header = ["run", *[name.upper() for name in names], *among, "parameters", "ms/user"]
    body = [
        [
            _name(row),
            *[f"{100 * row.metrics[name]:.2f}" for name in names],
            *(_with_interval(row, CANDIDATES_HR) if n_candidates else []),
            "" if row.parameters is None else f"{row.parameters:,}",
            "" if row.milliseconds is None else f"{row.milliseconds:.3g}",
        ]
        for row in rows
    ]
    return aligned(header, body)


def format_titles(rows: Sequence[Scored]) -> str:
    """A text table of the title teachers among ``rows``, with intervals; empty if there are none."""
    shown = {
        "likeliest: HR@1": CANDIDATES_HR,
        "MRR": "candidates_mrr",
        "generated: HR@1 of all rows": GENERATED_HR,
        "HR@1 of valid rows": GENERATED_HR_VALID,
        "valid ratio": VALID_RATIO,
    }
    of_titles = [row for row in rows if row.n_titles]
    if not of_titles:
        return ""
    header = ["run", "of", *[cell for name in shown for cell in (name, "95 %")]]
    return aligned(
        header,
        [
            [_name(row), str(row.n_titles), *[cell for name in shown.values() for cell in _with_interval(row, name)]]
            for row in of_titles
        ],
    )


def format_slice(rows: Sequence[Scored], name: str, ks: Sequence[int]) -> str:
    """A text table of the metrics of one slice of the test rows."""
    metrics = [f"{metric}@{k}" for metric in ("hr", "ndcg") for k in ks if (metric, k) != ("ndcg", 1)]
    body = [[_name(row), *(f"{100 * row.slices[name][metric]:.2f}" for metric in metrics)] for row in rows]
    return aligned(["run", *(metric.upper() for metric in metrics)], body)


def aligned(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A text table whose first column is left-aligned and the others right-aligned."""
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])

    return "\n".join([line(header), "-" * len(line(header)), *map(line, body)])


def _name(row: Scored) -> str:
    return row.label if row.seed is None else f"{row.label} [{row.seed}]"


def _with_interval(row: Scored, name: str) -> list[str]:
    """A metric and its interval in percent; blank if a run has none."""
    value = f"{100 * row.metrics[name]:.2f}" if name in row.metrics else ""
    if name not in row.intervals:
        return [value, ""]
    low, high = row.intervals[name]
    return [value, f"{100 * low:.2f}-{100 * high:.2f}"]


def write_comparison(folder: Path, rows: Sequence[Scored], ks: Sequence[int], about: dict[str, Any]) -> str:
    """Write ``comparison.txt``, ``comparison.json`` and ``comparison.png``.

    Args:
        folder: Run folder of the evaluation.
        rows: The scored runs.
        ks: Cut-offs.
        about: Dataset and protocol, for the JSON file and the caption.

    Returns:
        The table.
    """
    caption = (
        f"{about['dataset']}, test split, {about['rows']:,} rows, full ranking of {about['n_items']:,} items"
        + (" except items in the user's past" if about["mask_seen"] else ", items in the user's past included")
        + "; metrics in percent, HR@1 = NDCG@1 = MRR@1; [seed]"
    )
    if about["n_candidates"]:
        caption += (
            f"; HR@1 of {about['n_candidates']}: among the target and {about['n_candidates'] - 1} items outside "
            f"the history (seed {about['candidates_seed']}), with its 95 % bootstrap interval over rows"
        )
    table = f"{caption}\n{format_table(rows, ks, about['n_candidates'])}\n"
    if titles := format_titles(rows):
        table += (
            f"\ntitle teachers, among candidates (seed {about['candidates_seed']}) listed in the prompt: "
            "the likeliest candidate, and the generated title, which is valid if it names exactly one candidate (blank "
            "if prompts list none); in the table above, a target outside their best "
            f"{max(ks)} counts as missed\n{titles}\n"
        )
    for name, part in about.get("slices", {}).items():
        share = 100 * part["rows"] / about["rows"]
        table += f"\n{part['title']}, {part['rows']:,} rows ({share:.1f} %)\n{format_slice(rows, name, ks)}\n"
    table += "".join(f"\n{sentence}\n" for sentence in about.get("unlike", ()))
    with replaced_file(folder / "comparison.txt") as aside:
        aside.write_text(table, encoding="utf-8")
    write_json(folder / "comparison.json", {**about, "rows_scored": [asdict(row) for row in rows]})
    draw(folder / "comparison.png", rows, ks, caption)
    return table


def draw(file: Path, rows: Sequence[Scored], ks: Sequence[int], caption: str) -> None:
    """Draw HR and NDCG as one group of bars per cut-off, with one bar per run."""
    from matplotlib import colormaps  # takes half a second to import
    from matplotlib.figure import Figure  # without pyplot, whose backend is the caller's

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes, colours = figure.subplots(1, 2), colormaps["tab10"]
    height = 0.8 / len(rows)
    for axis, name in zip(axes, ("hr", "ndcg"), strict=True):
        shown = [k for k in ks if k > 1 or name == "hr"]
        for number, row in enumerate(rows):
            positions = [group + (number - (len(rows) - 1) / 2) * height for group in range(len(shown))]
            values = [100 * row.metrics[f"{name}@{k}"] for k in shown]
            axis.bar(positions, values, width=height * 0.9, color=colours(number % 10), label=_name(row))
        axis.set_xticks(range(len(shown)), [f"{name.upper()}@{k}" for k in shown])
        axis.set_ylabel("percent")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(rows)), frameon=False
    )
    figure.suptitle(caption.split(";")[0], fontsize=10)
    with replaced_file(file) as aside:
        figure.savefig(aside, format="png", dpi=130)
