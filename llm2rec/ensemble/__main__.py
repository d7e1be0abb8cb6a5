"""``accelerate launch -m llm2rec.ensemble``: a teacher of finished students and item neighbours, without any LLM.

Its outputs are those of `llm2rec.teacher`: ``llm2rec.distill distill=listwise distill.teacher_outputs=...`` reads them.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from llm2rec.config import Config
from llm2rec.core.engine import Engine
from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import replaced_file
from llm2rec.core.git_info import git_state
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.run import Run, read_record
from llm2rec.data import RecData
from llm2rec.ensemble.model import Ensemble, load_ensemble, rank_targets, save_ensemble
from llm2rec.ensemble.settings import EnsembleSettings
from llm2rec.stage import build, open_data, open_engine, stage
from llm2rec.student.datamodule import SeenItems, SequenceData
from llm2rec.student.rows import RowPlaces
from llm2rec.teacher.export import write_outputs
from llm2rec.teacher.settings import ExportSettings

logger = logging.getLogger("llm2rec.ensemble")
_LEAST = 1e-12  # what a probability of 0 is written as


def _outputs(cfg: Config) -> Path:
    return from_launch_folder(cfg.paths.teacher_outputs_dir, cfg.paths.root) / cfg.dataset.name / cfg.ensemble.name


@stage(
    "ensemble",
    reads=("ensemble", "runs", "metrics"),
    is_current=lambda cfg, folder: (folder / "ensemble").is_dir() and (_outputs(cfg) / "manifest.json").is_file(),
)
def main(cfg: Config, run: Run) -> None:
    """Rank the catalogue for every training row, and say how well it ranks on validation."""
    settings = build(cfg.ensemble, EnsembleSettings)
    data = open_data(cfg, run)
    places = _members(cfg.runs, Path(cfg.paths.root), data)
    engine = open_engine(cfg, run)
    with engine.first_process_first():
        if engine.is_main:
            save_ensemble(run.folder / "ensemble", [place / "student" for place in places], settings.neighbours)
        ensemble = load_ensemble(run.folder / "ensemble", data, engine.device)
    validation = SequenceData.of(data.splits["validation"], data.n_items, ensemble.max_length)
    seen = SeenItems.of(data.splits["validation"], data.sequences) if cfg.metrics.mask_seen else None
    with run.phase("validation"):
        ranks = rank_targets(ensemble, validation, engine, seen=seen, batch_rows=settings.batch_rows)
    reached = {f"val/{name}": value for name, value in ranking_metrics(ranks).items()}
    history = [{"step": 0, **reached}]
    run.write_metrics("validation", {"select_on": cfg.metrics.select_on, "best_step": 0, "history": history})
    if engine.is_main:
        told = cfg.metrics.select_on
        logger.info("%s on validation: %.4f", told, reached[f"val/{told}"])
    with run.phase("export"):
        blocks = rank_training_rows(ensemble, data, engine, run.folder / "export", settings)
        if engine.is_main:
            about = {
                "dataset": data.name,
                "fingerprint": data.fingerprint,
                "teacher": settings.name,
                "train_rows": len(data.splits["train"]),
                "members": [place.name for place in places],
                "neighbours": settings.neighbours,
                **git_state(),
                "run": run.folder.name,
            }
            write_outputs(_outputs(cfg), blocks, ensemble.item_vectors, ExportSettings(top_k=settings.top_k), about)
            shutil.rmtree(run.folder / "export")
    label = f"{settings.name} ({len(places)} students, {settings.neighbours:g} neighbours)"
    run.note(label=label, parameters=ensemble.n_parameters)
    engine.close()


def rank_training_rows(
    ensemble: Ensemble, data: RecData, engine: Engine, folder: Path, settings: EnsembleSettings
) -> list[Path]:
    """Rank the catalogue for every training row and keep the top K, block by block; a collective.

    Returns:
        What `llm2rec.teacher.export.write_outputs` takes; finished blocks are kept, so that a killed run goes on.
    """
    split, size = data.splits["train"], settings.block_rows
    rows = SequenceData.of(split, data.n_items, ensemble.max_length)
    users = RowPlaces.of(split, data.sequences).users
    files = [folder / f"block_{number:06d}.safetensors" for number in range(-(-len(rows) // size))]
    mine = engine.my_missing(files)
    for number in engine.progress(mine, "export", len(mine), "block"):
        numbers = np.arange(number * size, min((number + 1) * size, len(rows)))
        probabilities, items = [], []
        for part in np.array_split(numbers, -(-len(numbers) // settings.batch_rows)):
            told = ensemble.probabilities(rows.batch(part, engine.device), users[part].astype(np.int64))
            best = told.topk(min(settings.top_k, data.n_items), dim=1)
            probabilities.append(best.values.cpu())
            items.append(best.indices.to("cpu", torch.int32))
        log_probs = torch.cat(probabilities).clamp(min=_LEAST).log()
        with replaced_file(files[number]) as aside:
            save_file({"items": torch.cat(items).numpy(), "log_probs": log_probs.numpy()}, aside)
    engine.wait()
    return files


def _members(runs: object, root: Path, data: RecData) -> list[Path]:
    """Run folders of the students that were named; a sweep's folder stands for its jobs.

    Raises:
        ConfigError: If none were named.
        CheckpointError: If one is no finished run of a student on this dataset.
    """
    if isinstance(runs, str) or not isinstance(runs, Sequence) or not runs:
        raise ConfigError(
            f"`runs` is {runs!r}, expected finished students such as `runs=[result/result_...,result/result_...]`, or "
            "the folder of a sweep: `python -m llm2rec.student --multirun seed=1,2,3`."
        )
    named = [from_launch_folder(str(each), root) for each in runs]
    jobs = [sorted(file.parent for file in each.glob("*/run.json")) for each in named]
    found = [folder for each, inner in zip(named, jobs, strict=True) for folder in (inner or [each])]
    for folder in found:
        if not (folder / "run.json").is_file():
            raise CheckpointError(f"{folder} is no run folder (it holds no run.json); give `runs=[result/result_...]`.")
        record = read_record(folder)
        if record["stage"] not in ("student", "distill") or record["status"] != "finished":
            raise CheckpointError(
                f"{folder.name} is a {record['status']} run of stage {record['stage']!r}; an ensemble is made of "
                "finished runs of student and distill."
            )
        if read_record(folder, "dataset")["dataset"]["fingerprint"] != data.fingerprint:
            raise CheckpointError(
                f"{folder.name} was trained on dataset {record['dataset']['name']!r}, which is not this {data.name!r} "
                f"({data.fingerprint[:12]}); give the same dataset overrides as in training."
            )
    return found


if __name__ == "__main__":
    main()
