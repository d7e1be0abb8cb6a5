"""What run folders, students and teacher outputs tell besides metrics; what cannot be had is said with its reason."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from llm2rec.evaluate.report.findings import Contender, RunScores
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.store import load_student

__all__ = [
    "Curve",
    "GateUse",
    "Labelling",
    "Overlap",
    "Sample",
    "curves",
    "gate_use",
    "labellings",
    "overlaps",
    "samples",
    "top_items",
]

_OVERLAP_ROWS = 1000
_TOP = 10
_SAMPLE_USERS, _SAMPLE_ITEMS, _SAMPLE_HISTORY = 5, 5, 6
_GATE_GROUPS = 4
_LABELLING = ("labelled", "train_rows", "seconds", "seconds_saved")


@dataclass(frozen=True)
class Curve:
    """The validation history of a run.

    Attributes:
        name: Entry and seed.
        entry: The entry.
        kind: ``students``, ``teachers``, or ``teachers that write titles``, which choose among few candidates.
        metric: What was measured.
        best_step: Optimizer step whose weights were kept.
        points: Step and value, evaluation by evaluation.
    """

    name: str
    entry: str
    kind: str
    metric: str
    best_step: int
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class GateUse:
    """How a teacher's experts are used.

    Attributes:
        name: Entry and seed.
        entropy: Mean entropy of a row's gates, in nats.
        information: Mutual information of row and expert, in nats; 0 where all rows share one mixture.
        groups: Fewest and most interactions of a group of users, its rows, and the mean gate of each expert.
    """

    name: str
    entropy: float
    information: float
    groups: tuple[tuple[int, int, int, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Overlap:
    """How many of a teacher's best items are among each student's.

    Attributes:
        teacher: Name of the teacher outputs.
        run: The run that wrote them, as far as they say.
        top_k: Items compared.
        rows: Training rows compared.
        without_history: Whether items of the history are left out, as the teacher leaves them out.
        chance: What a random choice would share.
        students: Mean share by entry.
        taught: Entries that were distilled from these outputs.
    """

    teacher: str
    run: str
    top_k: int
    rows: int
    without_history: bool
    chance: float
    students: dict[str, Estimate]
    taught: tuple[str, ...]


@dataclass(frozen=True)
class Labelling:
    """What a teacher's labels cost, and what a budget has saved.

    Attributes:
        name: The run, as its entry.
        labelled: Training rows that it labelled.
        train_rows: Those that there are.
        seconds: What that took.
        seconds_saved: What the others would have taken at the same speed.
    """

    name: str
    labelled: int
    train_rows: int
    seconds: float
    seconds_saved: float


@dataclass(frozen=True)
class Sample:
    """What students recommend to a test user.

    Attributes:
        user: The user's id.
        history: Titles, oldest first, the last ones of the history.
        target: Title of what the user took next.
        answers: Best titles by entry, each with whether it is the target.
        places: Place of the target among all items by entry, from 1.
    """

    user: str
    history: tuple[str, ...]
    target: str
    answers: dict[str, tuple[tuple[str, bool], ...]]
    places: dict[str, int]


def _runs(found: Sequence[Contender], *stages: str) -> list[tuple[str, str, RunScores]]:
    """Runs of some stages, with a name, of the entry, and of the seed where it has several, and the entry's name."""
    return [
        (each.entry.name if len(each.runs) == 1 else f"{each.entry.name} [{run.scored.seed}]", each.entry.name, run)
        for each in found
        for run in each.runs
        if run.stage in stages
    ]


def labellings(found: Sequence[Contender]) -> tuple[list[Labelling], list[str]]:
    """Read what each run that has written labels says of them; ``found`` as `contenders` gave it.

    Returns:
        What they say, and why a run does not.
    """
    told, notes = [], []
    for name, _, run in _runs(found, "teacher", "ensemble"):
        assert run.folder is not None, "only popularity has no folder"
        file = run.folder / "metrics" / "labelling.json"
        try:
            figures = read_object(file, *_LABELLING) if file.is_file() else None
        except DataError as error:
            notes.append(f"What the labels of {name} cost is not known: {error}")
            continue
        if figures is not None:
            told.append(Labelling(name, *(figures[key] for key in _LABELLING)))
    return told, notes


def curves(found: Sequence[Contender], metric: str) -> tuple[list[Curve], list[str]]:
    """Read the validation history of each run.

    Args:
        found: All contenders.
        metric: What to take where it was measured; else what the run's weights were chosen by.

    Returns:
        Curves, and why a run has none.
    """
    read, notes = [], []
    for name, entry, run in _runs(found, "student", "distill", "teacher"):
        assert run.folder is not None, "only popularity has no folder"
        file = run.folder / "metrics" / "validation.json"
        try:
            told = read_object(file, "select_on", "best_step", "history") if file.is_file() else {"history": []}
        except DataError as error:
            notes.append(f"{name}: {error}")
            continue
        if not told["history"]:
            notes.append(f"{name}: was not validated, as nothing was trained.")
            continue
        shown = metric if all(f"val/{metric}" in each for each in told["history"]) else told["select_on"]
        points = tuple((int(each["step"]), float(each[f"val/{shown}"])) for each in told["history"])
        kind = "students" if run.stage != "teacher" else "teachers"
        kind = "teachers that write titles" if run.scored.n_titles else kind
        read.append(Curve(name, entry, kind, shown, int(told["best_step"]), points))
    return read, notes


def gate_use(found: Sequence[Contender], lengths: NDArray[np.int64]) -> tuple[list[GateUse], list[str]]:
    """Sum up the gates that scoring has stored, by how many interactions users had.

    Args:
        found: All contenders.
        lengths: Interactions of each test row's user before the target, shape ``(M,)``.

    Returns:
        Gate use of each teacher with experts, and why others have none.
    """
    read, notes = [], []
    for name, _, run in _runs(found, "teacher"):
        assert run.folder is not None, "only popularity has no folder"
        file = run.folder / "metrics" / "test_gates.npy"
        if not file.is_file():
            again = f"or it was scored before gates were stored; delete {run.name}/metrics/test.json to score it again"
            notes.append(f"{name}: no gates are stored: it has no experts, {again}.")
            continue
        gates = _gates_in(file, len(lengths))
        if gates is None:
            notes.append(f"{name}: {run.name}/metrics/test_gates.npy does not hold the gates of these test rows.")
            continue
        # With PEFT, which takes seconds to import: most reports are of students alone.
        from llm2rec.ilora import gate_health

        health = gate_health(torch.from_numpy(gates))
        groups = tuple(
            (int(lengths[rows].min()), int(lengths[rows].max()), len(rows), tuple(gates[rows].mean(axis=0).tolist()))
            for rows in quantile_groups(lengths, _GATE_GROUPS)
        )
        read.append(GateUse(name, health.entropy, health.information, groups))
    return read, notes


def _gates_in(file: Path, n_rows: int) -> NDArray[np.float32] | None:
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
    """Let a finished student recommend.

    Args:
        folder: Its run folder.
        data: The dataset.
        split: Its split.
        rows: Rows to answer, shape ``(B,)``.
        k: Items of an answer.
        device: Where to compute.
        seen: Items that are not to be found.

    Returns:
        Item ids of shape ``(B, k)``, best first; -1 where fewer are left.

    Raises:
        CheckpointError: If the folder holds no student.
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
    """Compare the best items of each student with those of the teachers that students were distilled from.

    On training rows, evenly spaced among those labelled: these the teacher has ranked.

    Args:
        found: All contenders.
        data: The dataset.
        locate: Finds the folder of ``distill.teacher_outputs``.
        device: Where students compute.

    Returns:
        One overlap for each folder of teacher outputs, and why others could not be looked at.
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
            notes.append(f"{', '.join(names)}: the run does not say which teacher outputs it was distilled from.")
            continue
        try:
            sizes = {"n_rows": len(data.splits["train"]), "n_items": data.n_items, "top_k": 1}
            outputs = read_outputs(locate(folder), fingerprint=data.fingerprint, **sizes)
            there, own = outputs_hash(locate(folder)), [(each.entry.name, each.runs[0].folder) for each in students]
            names = [name for name, run in own if not run or read_record(run).get("teacher_outputs", there) == there]
            if others := [name for name, _ in own if name not in names]:
                notes.append(f"{', '.join(others)}: other outputs have been written to {folder} since.")
            if names:
                read.append(_overlap(outputs, locate(folder).name, tuple(names), found, data, device))
        except (TeacherOutputsError, CheckpointError) as error:
            notes.append(f"{', '.join(names)}: {error}")
    return read, notes


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
    """Let the first run of each student recommend to a few test users, evenly spaced, whatever comes out.

    Args:
        found: All contenders.
        data: The dataset.
        mask_seen: Whether what users had before is left out, as in the ranking.
        device: Where students compute.

    Returns:
        Samples, and why a student has no part in them.
    """
    split = data.splits["test"]
    rows = _evenly(len(split), _SAMPLE_USERS)
    asked = split.select(rows)
    targets = torch.tensor(asked["target"][:], device=device)
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
    told = []
    for number, row in enumerate(asked):
        target = int(row["target"])
        told.append(
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
    return told, notes
