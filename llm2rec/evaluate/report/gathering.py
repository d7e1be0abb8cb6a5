"""All that a report says, gathered once: `Findings`, which is also its JSON form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2rec.data import RecData
from llm2rec.evaluate.report.conclusions import conclusions
from llm2rec.evaluate.report.evidence import (
    Curve,
    GateUse,
    Labelling,
    Overlap,
    Sample,
    curves,
    gate_use,
    labellings,
    overlaps,
    samples,
)
from llm2rec.evaluate.report.findings import (
    Comparison,
    Entry,
    Group,
    RunScores,
    baseline_of,
    compare,
    contenders,
    gains_by,
    headline,
)
from llm2rec.evaluate.scoring.scoring import Protocol, Scored, popularity, popularity_ranks

__all__ = ["Findings", "RunNote", "gather"]


@dataclass(frozen=True)
class RunNote:
    """Where a run's numbers come from.

    Attributes:
        name: Its folder's name.
        entry: The entry it belongs to.
        stage: Its stage.
        seed: Its seed.
        started: When it began; None if unknown.
        commit: The code it ran, with ``+`` where that had changes that were not committed; None if unknown.
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
    """All that a report says.

    Attributes:
        about: Dataset, protocol, date, command, commit and versions of the evaluation.
        metric: The metric that the report is about.
        baseline: The entry that others are compared with.
        conclusions: What a reader should conclude.
        entries: What is compared, popularity first.
        comparisons: Each against the baseline.
        by_popularity: Gains by how often the target occurs in training.
        by_length: Gains by how many interactions the user had before the target.
        curves: Validation histories.
        overlaps: Teachers and students.
        labellings: What the teachers' labels cost.
        gates: Use of experts.
        samples: Recommendations.
        runs: Where the numbers come from.
        notes: Why something is left out, by the name of the part.
    """

    about: dict[str, Any]
    metric: str
    baseline: str
    conclusions: list[str]
    entries: list[Entry]
    comparisons: list[Comparison]
    by_popularity: list[Group]
    by_length: list[Group]
    curves: list[Curve]
    overlaps: list[Overlap]
    labellings: list[Labelling]
    gates: list[GateUse]
    samples: list[Sample]
    runs: list[RunNote]
    notes: dict[str, list[str]]


def gather(
    scored_popularity: Scored,
    runs: Sequence[RunScores],
    data: RecData,
    protocol: Protocol,
    about: dict[str, Any],
    *,
    baseline: str | None,
    locate: Callable[[str], Path],
    device: torch.device,
) -> Findings:
    """Find out all that the report says. Nothing is ranked again, and no language model is loaded.

    Args:
        scored_popularity: What `score_popularity` returned.
        runs: The scored runs, at least one.
        data: The dataset.
        protocol: How they were scored.
        about: What to say of dataset, protocol and evaluation.
        baseline: Label or folder of the run that others are compared with; None for the first one.
        locate: Finds a folder that a configuration names.
        device: Where students recommend.
    """
    counts, test = popularity(data), data.splits["test"].with_format("numpy")
    ranks = popularity_ranks(data, counts, mask_seen=protocol.mask_seen).numpy()
    found = contenders([RunScores(scored_popularity, None, ranks), *runs], protocol.ks)
    reference, metric = baseline_of(found, baseline), headline(protocol.ks)
    comparisons = compare(found, reference)
    lengths = np.asarray(test["position"][:], np.int64)
    validation, no_curve = curves(found, metric)
    shared, no_overlap = overlaps(found, data, locate, device)
    costs, no_costs = labellings(found)
    gates, no_gates = gate_use(found, lengths)
    told, no_sample = samples(found, data, mask_seen=protocol.mask_seen, device=device)
    return Findings(
        about=about,
        metric=metric,
        baseline=reference.entry.name,
        conclusions=conclusions(found, reference, comparisons, metric),
        entries=[each.entry for each in found],
        comparisons=comparisons,
        by_popularity=gains_by(counts[np.asarray(test["target"][:])].astype(np.int64), found, reference),
        by_length=gains_by(lengths, found, reference),
        curves=validation,
        overlaps=shared,
        labellings=costs,
        gates=gates,
        samples=told,
        runs=[_note(run, each.entry.name) for each in found for run in each.runs if run.folder is not None],
        notes={"curves": no_curve, "overlap": no_overlap + no_costs, "gates": no_gates, "samples": no_sample},
    )


def _note(run: RunScores, entry: str) -> RunNote:
    git = run.record.get("git") or {}
    commit = git.get("commit")
    return RunNote(
        run.name,
        entry,
        run.stage,
        run.scored.seed,
        run.record.get("started"),
        None if commit is None else f"{commit[:10]}{'+' if git.get('dirty') else ''}",
        run.command,
    )
