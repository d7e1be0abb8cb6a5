"""The comparison as text, JSON and a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm2rec.core.files import replaced_file, write_json
from llm2rec.evaluate.candidates import CANDIDATES_HR
from llm2rec.evaluate.scoring import Scored

__all__ = ["draw", "format_table", "write_report"]


def format_table(rows: Sequence[Scored], ks: Sequence[int], n_candidates: int = 0) -> str:
    """A table for a terminal: one row per scored run, metrics in percent, candidates with their interval if any."""
    names = [f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in ks if (name, k) not in (("ndcg", 1), ("mrr", 1))]
    among = [f"HR@1 of {n_candidates}", "95 %"] if n_candidates else []
    header = ["run", *[name.upper() for name in names], *among, "parameters", "ms/user"]
    body = [
        [
            row.label if row.seed is None else f"{row.label} [{row.seed}]",
            *[f"{100 * row.metrics[name]:.2f}" for name in names],
            *(_among_candidates(row) if n_candidates else []),
            f"{row.parameters:,}",
            "" if row.milliseconds is None else f"{row.milliseconds:.3g}",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])

    return "\n".join([line(header), "-" * len(line(header)), *map(line, body)])


def _among_candidates(row: Scored) -> list[str]:
    low, high = row.intervals[CANDIDATES_HR]
    return [f"{100 * row.metrics[CANDIDATES_HR]:.2f}", f"{100 * low:.2f}-{100 * high:.2f}"]


def write_report(folder: Path, rows: Sequence[Scored], ks: Sequence[int], about: dict[str, Any]) -> str:
    """Write ``comparison.txt``, ``comparison.json`` and ``comparison.png``.

    Args:
        folder: Run folder of the evaluation.
        rows: What was scored.
        ks: Cut-offs.
        about: Dataset and protocol, for the JSON file and the caption.

    Returns:
        The table.
    """
    caption = (
        f"{about['dataset']}, test split, {about['rows']:,} rows, full ranking of {about['n_items']:,} items"
        + (" without items seen before" if about["mask_seen"] else "")
        + "; metrics in percent, HR@1 = NDCG@1 = MRR@1; [seed]"
    )
    if about["n_candidates"]:
        caption += (
            f"; HR@1 of {about['n_candidates']}: among the target and {about['n_candidates'] - 1} items that the row "
            f"does not show (seed {about['candidates_seed']}), with its 95 % bootstrap interval over rows"
        )
    table = f"{caption}\n{format_table(rows, ks, about['n_candidates'])}\n"
    with replaced_file(folder / "comparison.txt") as aside:
        aside.write_text(table, encoding="utf-8")
    write_json(folder / "comparison.json", {**about, "rows_scored": [asdict(row) for row in rows]})
    draw(folder / "comparison.png", rows, ks, caption)
    return table


def draw(file: Path, rows: Sequence[Scored], ks: Sequence[int], caption: str) -> None:
    """Draw HR and NDCG at each cut-off, one group of bars per cut-off, one bar per run."""
    import matplotlib.pyplot as plt  # half a second to import, which the other stages need not pay

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    colours = plt.get_cmap("tab10")
    height = 0.8 / len(rows)
    for axis, name in zip(axes, ("hr", "ndcg"), strict=True):
        shown = [k for k in ks if k > 1 or name == "hr"]
        for number, row in enumerate(rows):
            label = row.label if row.seed is None else f"{row.label} [{row.seed}]"
            positions = [group + (number - (len(rows) - 1) / 2) * height for group in range(len(shown))]
            values = [100 * row.metrics[f"{name}@{k}"] for k in shown]
            axis.bar(positions, values, width=height * 0.9, color=colours(number % 10), label=label)
        axis.set_xticks(range(len(shown)), [f"{name.upper()}@{k}" for k in shown])
        axis.set_ylabel("percent")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(rows)), frameon=False
    )
    figure.suptitle(caption.split(";")[0], fontsize=10)
    with replaced_file(file) as aside:
        figure.savefig(aside, format="png", dpi=130)
    plt.close(figure)
