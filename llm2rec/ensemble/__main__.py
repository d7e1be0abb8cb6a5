"""``accelerate launch -m llm2rec.ensemble``: a teacher of finished students and item neighbours, without an LLM.

Its outputs are those of `llm2rec.teacher`: ``llm2rec.distill distill=listwise distill.teacher_outputs=...`` reads them.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llm2rec.config import Config
from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import read_json, replaced_file
from llm2rec.core.git_info import git_state
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.processes import is_first_process
from llm2rec.core.run import Run, described, is_sweep, jobs_of, read_record
from llm2rec.core.train.engine import Engine
from llm2rec.data import RecData
from llm2rec.ensemble.model import Ensemble, load_ensemble, rank_targets, save_ensemble
from llm2rec.ensemble.settings import EnsembleSettings
from llm2rec.stage import build, built_object, open_data, open_engine, open_masking, stage
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.teacher.outputs import log_labelling, rows_to_label, write_outputs
from llm2rec.teacher.settings import ExportSettings

logger = logging.getLogger("llm2rec.ensemble")
_LEAST = 1e-12  # exported instead of a probability of 0


@dataclass(frozen=True)
class Member:
    """A student of the ensemble.

    Attributes:
        folder: Its run folder.
        run: That folder's name; of a sweep's job with the sweep's before it.
        label: What it is, such as ``sasrec``.
        seed: Its seed.
    """

    folder: Path
    run: str
    label: str
    seed: int | None


def _outputs(cfg: Config) -> Path:
    return from_launch_folder(cfg.paths.teacher_outputs_dir, cfg.paths.root) / cfg.dataset.name / cfg.ensemble.name


def _is_current(cfg: Config, folder: Path) -> bool:
    """Whether the ensemble exists with the same members, and the exported outputs are its own."""
    if built_object(cfg.active).source() != read_record(folder).get("selection_source"):
        return False
    if not ((folder / "ensemble").is_dir() and (manifest := _outputs(cfg) / "manifest.json").is_file()):
        return False
    outputs = read_json(manifest)
    members = list(_named(cfg.runs, Path(cfg.paths.root)).values())  # a sweep may have more finished jobs by now
    return outputs.get("run") == folder.name and [each["run"] for each in outputs.get("members", [])] == members


@stage("ensemble", reads=("ensemble", "active", "runs", "metrics"), is_current=_is_current)
def main(cfg: Config, run: Run) -> None:
    """Validate the ensemble, and export its rankings for the training rows to label."""
    settings = build(cfg.ensemble, EnsembleSettings)
    policy: Any = built_object(cfg.active)  # a `SelectionPolicy`, as in llm2rec.teacher
    data = open_data(cfg, run)
    rows = rows_to_label(policy, run, n_rows := len(data.splits["train"]))
    named = _named(cfg.runs, Path(cfg.paths.root))
    begun_with = run.record.get("members", named.values())  # of a sweep, more jobs may have finished since
    members = [_member(each, name, data) for each, name in named.items() if name in begun_with]
    run.keep(members=[each.run for each in members])
    engine = open_engine(cfg, run)
    with engine.first_process_first():
        if engine.is_main:
            places = [member.folder / "student" for member in members]
            save_ensemble(run.folder / "ensemble", places, settings.neighbours)
    ensemble = load_ensemble(run.folder / "ensemble", data, engine.device)
    validation = Rows.of(data, "validation", ensemble.max_length)
    masked = open_masking(cfg, run, data)
    seen = SeenItems(validation) if masked else None
    with run.phase("validation"):
        ranks = rank_targets(ensemble, validation, engine, seen=seen, batch_rows=settings.batch_rows)
    reached = {f"val/{name}": value for name, value in ranking_metrics(ranks).items()}
    history = [{"step": 0, **reached}]
    protocol = {"select_on": cfg.metrics.select_on, "mask_seen": masked}
    run.write_metrics("validation", {**protocol, "best_step": 0, "history": history})
    if engine.is_main:
        metric = cfg.metrics.select_on
        logger.info("%s on validation: %.4f", metric, reached[f"val/{metric}"])
    with run.phase("export"):
        blocks = rank_training_rows(ensemble, data, rows, engine, run.folder / "export", settings)
        if engine.is_main:
            about = {
                "dataset": data.name,
                "fingerprint": data.fingerprint,
                "teacher": settings.name,
                "train_rows": n_rows,
                "members": [{"run": each.run, "label": each.label, "seed": each.seed} for each in members],
                "neighbours": settings.neighbours,
                "selection": run.config["active"],
                **git_state(),
                "run": run.folder.name,
            }
            write_outputs(
                _outputs(cfg),
                blocks,
                ensemble.item_vectors,
                ExportSettings(top_k=settings.top_k),
                about,
                labelled=rows if len(rows) < n_rows else None,
            )
            shutil.rmtree(run.folder / "export")
    if engine.is_main:
        log_labelling(run, ("export",), len(rows), n_rows)
    kinds = Counter(member.label for member in members)
    of = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    label = f"{settings.name} ({of}; {settings.neighbours:g} neighbours)"
    run.note(label=label, parameters=ensemble.n_parameters)
    engine.close()


def rank_training_rows(
    ensemble: Ensemble,
    data: RecData,
    labelled: NDArray[np.int64],
    engine: Engine,
    folder: Path,
    settings: EnsembleSettings,
) -> list[Path]:
    """Rank the catalogue for the training rows ``labelled`` and keep the top K, block by block; a collective.

    Returns:
        What `llm2rec.teacher.outputs.write_outputs` takes; finished blocks are kept for resuming.
    """
    size, at_once = settings.block_rows, min(settings.batch_rows, ensemble.rows_at_once)
    rows = Rows.of(data, "train", ensemble.max_length)
    files = [folder / f"block_{number:06d}.safetensors" for number in range(-(-len(labelled) // size))]
    mine = engine.my_missing(files)
    shares = {number: labelled[number * size : (number + 1) * size] for number in mine}
    with engine.rows_progress("export", sum(len(numbers) for numbers in shares.values())) as progress:
        for number, numbers in shares.items():
            probabilities, items = [], []
            for part in np.array_split(numbers, -(-len(numbers) // at_once)):
                probs = ensemble.probabilities(rows.batch(part, engine.device), rows.users[part].astype(np.int64))
                best = probs.topk(min(settings.top_k, data.n_items), dim=1)
                probabilities.append(best.values.cpu())
                items.append(best.indices.to("cpu", torch.int32))
                progress.advance(len(part))
            log_probs = torch.cat(probabilities).clamp(min=_LEAST).log()
            with replaced_file(files[number]) as aside:
                save_file({"items": torch.cat(items).numpy(), "log_probs": log_probs.numpy()}, aside)
    engine.wait()
    return files


def _named(runs: object, root: Path) -> dict[Path, str]:
    """Folders and names of the given students; a sweep's folder stands for its finished jobs.

    Raises:
        ConfigError: If `runs` is empty, or holds a student twice.
    """
    if isinstance(runs, str) or not isinstance(runs, Sequence) or not runs:
        raise ConfigError(
            f"`runs` is {runs!r}, expected finished students such as `runs=[result/result_...,result/result_...]`, or "
            "the folder of a sweep: `python -m llm2rec.student --multirun seed=1,2,3`."
        )
    found: dict[Path, str] = {}
    for folder in (from_launch_folder(str(each), root).resolve() for each in runs):
        jobs = jobs_of(folder) if is_sweep(folder) else []
        for job in (job for job in jobs if not job.is_finished and is_first_process()):
            logger.warning("%s is not finished and is left out of the ensemble", job.name)
        alone = f"{folder.parent.name}/{folder.name}" if is_sweep(folder.parent) else folder.name
        named = {job.folder: job.name for job in jobs if job.is_finished} or {folder: alone}
        if again := next((name for place, name in named.items() if place in found), None):
            raise ConfigError(f"`runs` names {again} twice; give every student once.")
        found |= named
    return found


def _member(folder: Path, name: str, data: RecData) -> Member:
    """A member of the ensemble.

    Raises:
        CheckpointError: If the folder is not a finished run of a student on this dataset.
    """
    if not (folder / "run.json").is_file():
        raise CheckpointError(
            f"{folder} is not the folder of a run or sweep (it has no run.json); give `runs=[result/result_...]`."
        )
    record = read_record(folder)
    if record["stage"] not in ("student", "distill") or record["status"] != "finished":
        raise CheckpointError(f"{name} is {described(record)}; expected a finished run of student or distill.")
    if read_record(folder, "dataset")["dataset"]["fingerprint"] != data.fingerprint:
        raise CheckpointError(
            f"{name} was trained on dataset {record['dataset']['name']!r}, not on this {data.name!r} "
            f"({data.fingerprint[:12]}); use the same dataset overrides as in training."
        )
    return Member(folder, name, str(record["label"]), record.get("seed"))


if __name__ == "__main__":
    main()
