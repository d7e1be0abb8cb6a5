"""The analyses behind the report: curves, teacher overlap, labelling cost, gate use and sample recommendations.

Each returns its results and notes on what is missing and why. Nothing is ranked again, and no language model is loaded.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llm2rec.core.errors import CheckpointError, DataError, TeacherOutputsError
from llm2rec.core.files import read_object
from llm2rec.core.ranking import Catalogue, Pairs, top_k_in_blocks
from llm2rec.core.run import read_record
from llm2rec.core.statistics import Estimate, estimate, quantile_groups
from llm2rec.data import RecData
from llm2rec.distill.data_bridge import TeacherOutputs, outputs_hash, read_outputs
from llm2rec.evaluate.report.comparison import (
    Contender,
    RunScores,
    baseline_of,
    compare,
    conclusions,
    contenders,
    gains_by,
    headline,
    of_slice,
)
from llm2rec.evaluate.report.findings import Curve, Findings, GateUse, Labelling, Overlap, RunNote, Sample
from llm2rec.evaluate.scoring.scoring import Protocol, Scored, popularity, popularity_ranks
from llm2rec.evaluate.scoring.slices import slices
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.models import load_student

__all__ = ["curves", "gate_use", "gather", "labellings", "overlaps", "samples", "top_items"]

_OVERLAP_ROWS = 1000
_TOP = 10
_SAMPLE_USERS, _SAMPLE_ITEMS, _SAMPLE_HISTORY = 5, 5, 6
_GATE_GROUPS = 4
_LABELLING = ("labelled", "train_rows", "seconds", "seconds_saved")


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
    """Gather the content of the report.

    Args:
        scored_popularity: What `score_popularity` returned.
        runs: The scored runs, at least one.
        data: The dataset.
        protocol: How they were scored.
        about: Facts on dataset, protocol and evaluation, passed on.
        baseline: Label or folder of the run that others are compared with; None for the first one.
        locate: Finds a folder that a configuration names.
        device: Where students run.
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
    recommended, no_sample = samples(found, data, mask_seen=protocol.mask_seen, device=device)
    return Findings(
        about=about,
        metric=metric,
        baseline=reference.entry.name,
        conclusions=conclusions(found, reference, comparisons, metric),
        entries=[each.entry for each in found],
        comparisons=comparisons,
        by_popularity=gains_by(counts[np.asarray(test["target"][:])].astype(np.int64), found, reference),
        by_length=gains_by(lengths, found, reference),
        slices=[of_slice(each, found, metric) for each in slices(data)],
        curves=validation,
        overlaps=shared,
        labellings=costs,
        gates=gates,
        samples=recommended,
        runs=[_provenance(run, each.entry.name) for each in found for run in each.runs if run.folder is not None],
        notes={"curves": no_curve, "overlap": no_overlap + no_costs, "gates": no_gates, "samples": no_sample},
    )


def _provenance(run: RunScores, entry: str) -> RunNote:
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


def _runs(found: Sequence[Contender], *stages: str) -> list[tuple[str, str, RunScores, Path]]:
    """Runs of some stages: name (the entry, with the seed if it has several), entry, run and folder."""
    return [
        (
            each.entry.name if len(each.runs) == 1 else f"{each.entry.name} [{run.scored.seed}]",
            each.entry.name,
            run,
            run.folder,
        )
        for each in found
        for run in each.runs
        if run.stage in stages and run.folder is not None
    ]


def labellings(found: Sequence[Contender]) -> tuple[list[Labelling], list[str]]:
    """Read the labelling cost of each run that exported teacher outputs.

    Returns:
        Costs, and notes on runs whose cost cannot be read.
    """
    costs, notes = [], []
    for name, _, _, folder in _runs(found, "teacher", "ensemble"):
        file = folder / "metrics" / "labelling.json"
        try:
            figures = read_object(file, *_LABELLING) if file.is_file() else None
        except DataError as error:
            notes.append(f"{name}: the cost of its labels is unknown: {error}")
            continue
        if figures is not None:
            costs.append(Labelling(name, *(figures[key] for key in _LABELLING)))
    return costs, notes


def curves(found: Sequence[Contender], metric: str) -> tuple[list[Curve], list[str]]:
    """Read the validation history of each run.

    Args:
        found: All contenders.
        metric: The metric to read; for runs that did not measure it, the metric that chose their weights.

    Returns:
        Curves, and notes on runs without one.
    """
    read, notes = [], []
    for name, entry, run, folder in _runs(found, "student", "distill", "teacher"):
        file = folder / "metrics" / "validation.json"
        try:
            validation = read_object(file, "select_on", "best_step", "history") if file.is_file() else {"history": []}
        except DataError as error:
            notes.append(f"{name}: {error}")
            continue
        history = validation["history"]
        if len(history) < 2:
            notes.append(f"{name}: no validation curve, as nothing was trained.")
            continue
        shown = metric if all(f"val/{metric}" in each for each in history) else validation["select_on"]
        points = tuple((int(each["step"]), float(each[f"val/{shown}"])) for each in history)
        kind = "students" if run.stage != "teacher" else "teachers"
        kind = "teachers that write titles" if run.scored.n_titles else kind
        read.append(Curve(name, entry, kind, shown, int(validation["best_step"]), points))
    return read, notes


def gate_use(found: Sequence[Contender], lengths: NDArray[np.int64]) -> tuple[list[GateUse], list[str]]:
    """Summarise the gates stored by scoring, by length of the history.

    Args:
        found: All contenders.
        lengths: Interactions of each test row's user before the target, shape ``(M,)``.

    Returns:
        Gate use of each teacher with experts, and notes on the other teachers.
    """
    read, notes = [], []
    for name, _, run, folder in _runs(found, "teacher"):
        file = folder / "metrics" / "test_gates.npy"
        if not file.is_file():
            notes.append(
                f"{name}: no gates are stored. It has no experts, or an older version scored it; to score it again, "
                f"delete {run.name}/metrics/test.json."
            )
            continue
        gates = _read_gates(file, len(lengths))
        if gates is None:
            notes.append(f"{name}: {run.name}/metrics/test_gates.npy does not hold the gates of these test rows.")
            continue
        # Imports PEFT, which takes seconds: most reports are of students alone.
        from llm2rec.ilora import gate_health

        health = gate_health(torch.from_numpy(gates))
        groups = tuple(
            (int(lengths[rows].min()), int(lengths[rows].max()), len(rows), tuple(gates[rows].mean(axis=0).tolist()))
            for rows in quantile_groups(lengths, _GATE_GROUPS)
        )
        read.append(GateUse(name, health.entropy, health.information, groups))
    return read, notes


def _read_gates(file: Path, n_rows: int) -> NDArray[np.float32] | None:
    """Gates ``(n_rows, E)`` from a file, or None if it holds anything else."""
    try:
        gates = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = gates.ndim == 2 and len(gates) == n_rows and gates.dtype == np.float32 and bool(np.isfinite(gates).all())
    return gates if fits else None


def top_items(
    folder: Path,
    data: RecData,
    split: str,
    rows: NDArray[np.int64],
    k: int,
    device: torch.device,
    seen: Pairs | None = None,
) -> NDArray[np.int64]:
    """Recommend items with a finished student.

    Args:
        folder: Its run folder.
        data: The dataset.
        split: Name of the split.
        rows: Rows to recommend for, shape ``(B,)``.
        k: Items per row.
        device: Where to run.
        seen: Items to exclude.

    Returns:
        Item ids of shape ``(B, k)``, best first; -1 if fewer are left.

    Raises:
        CheckpointError: If the folder has no student.
    """
    model = load_student(folder / "student").to(device)
    batch = Rows.of(data, split, model.max_length).batch(rows, device)
    with torch.inference_mode():
        users = model(batch.history, batch.lengths)
        _, items = top_k_in_blocks(users, Catalogue(model.output_items.vectors()), k, seen)
    return items.cpu().numpy()


def overlaps(
    found: Sequence[Contender], data: RecData, locate: Callable[[str], Path], device: torch.device
) -> tuple[list[Overlap], list[str]]:
    """Compare each student's best items with those of the teachers that students were distilled from.

    The rows are training rows, evenly spaced among the labelled ones, since these the teacher has ranked.

    Args:
        found: All contenders.
        data: The dataset.
        locate: Finds the folder of ``distill.teacher_outputs``.
        device: Where students run.

    Returns:
        One overlap per folder of teacher outputs, and notes on folders that cannot be compared.
    """
    taught: dict[str, list[Contender]] = {}
    for each in found:
        if each.entry.stage == "distill":
            folder = (each.runs[0].config.get("distill") or {}).get("teacher_outputs")
            taught.setdefault(str(folder or ""), []).append(each)
    read, notes = [], []
    for folder, students in taught.items():
        names = [each.entry.name for each in students]
        if not folder:
            notes.append(f"{', '.join(names)}: the run does not name the teacher outputs it was distilled from.")
            continue
        try:
            sizes = {"n_rows": len(data.splits["train"]), "n_items": data.n_items, "top_k": 1}
            outputs = read_outputs(locate(folder), fingerprint=data.fingerprint, **sizes)
            current, own = outputs_hash(locate(folder)), [(each.entry.name, each.runs[0].folder) for each in students]
            names = [name for name, run in own if not run or _outputs_of(run, current) == current]
            if others := [name for name, _ in own if name not in names]:
                notes.append(f"{', '.join(others)}: other outputs have been written to {folder} since.")
            if names:
                read.append(_overlap(outputs, locate(folder).name, tuple(names), found, data, device))
        except (TeacherOutputsError, CheckpointError) as error:
            notes.append(f"{', '.join(names)}: {error}")
    return read, notes


def _outputs_of(folder: Path, default: str) -> str:
    """Hash of the teacher outputs that a run was distilled from; older runs did not record it."""
    return str(read_record(folder).get("teacher_outputs", default))


def _overlap(
    outputs: TeacherOutputs,
    name: str,
    taught: tuple[str, ...],
    found: Sequence[Contender],
    data: RecData,
    device: torch.device,
) -> Overlap:
    labelled = outputs.rows_labelled(len(data.splits["train"]))
    rows = labelled[_evenly(len(labelled), _OVERLAP_ROWS)]
    k = min(_TOP, outputs.ranking.shape[1])
    teachers = outputs.batch(rows, k).ranking.numpy()  # (B, k)
    history, _ = Rows.of(data, "train").histories(rows)
    leaves_out = not (teachers[:, :, None] == history[:, None, :]).any()
    place, slot = np.nonzero(history < data.n_items)
    shown = torch.from_numpy(place).to(device), torch.from_numpy(history[place, slot].astype(np.int64)).to(device)
    shares: dict[str, Estimate] = {}
    for each in found:
        if each.entry.stage in ("student", "distill"):
            values = [
                (top[:, :, None] == teachers[:, None, :]).any(axis=2).mean(axis=1)
                for run in each.runs
                if run.folder is not None
                for top in [top_items(run.folder, data, "train", rows, k, device, shown if leaves_out else None)]
            ]
            shares[each.entry.name] = estimate(np.stack(values))
    run = str(outputs.manifest.get("run", "unknown"))
    return Overlap(name, run, k, len(rows), leaves_out, k / data.n_items, shares, taught)


def _evenly(n_rows: int, wanted: int) -> NDArray[np.int64]:
    """Up to ``wanted`` of ``n_rows`` row numbers, evenly spaced, each in the middle of its share."""
    n = min(n_rows, wanted)
    return (np.arange(n) * 2 + 1) * n_rows // (2 * n)


def samples(
    found: Sequence[Contender], data: RecData, *, mask_seen: bool, device: torch.device
) -> tuple[list[Sample], list[str]]:
    """Recommend with the first run of each student for a few test users, evenly spaced over the split.

    Args:
        found: All contenders.
        data: The dataset.
        mask_seen: Whether items in the user's past are removed, as in the ranking.
        device: Where students run.

    Returns:
        Samples, and notes on students that cannot be loaded.
    """
    split = data.splits["test"]
    rows = _evenly(len(split), _SAMPLE_USERS)
    users = split.select(rows)
    targets = torch.tensor(users["target"][:], device=device)
    seen = SeenItems(Rows.of(data, "test")).pairs_without_targets(rows, targets) if mask_seen else None
    tops, notes = dict[str, NDArray[np.int64]](), []
    for each in found:
        run = each.runs[0]
        if each.entry.stage in ("student", "distill") and run.folder is not None:
            try:
                k = min(_SAMPLE_ITEMS, data.n_items)
                tops[each.entry.name] = top_items(run.folder, data, "test", rows, k, device, seen)
            except CheckpointError as error:
                notes.append(f"{each.entry.name}: {error}")
    places = {each.entry.name: each.runs[0].ranks[rows] + 1 for each in found}
    found_samples = []
    for number, row in enumerate(users):
        target = int(row["target"])
        found_samples.append(
            Sample(
                str(row["user_id"]),
                tuple(data.titles[item] for item in row["history"][-_SAMPLE_HISTORY:]),
                data.titles[target],
                {
                    name: tuple((data.titles[item], item == target) for item in top[number].tolist() if item >= 0)
                    for name, top in tops.items()
                },
                {name: int(places[name][number]) for name in tops},
            )
        )
    return found_samples, notes
