"""``accelerate launch -m llm2rec.ensemble``: a teacher of students, item neighbours, title neighbours and LLM teachers.

Its outputs are those of `llm2rec.teacher`: ``llm2rec.distill distill=listwise_reading`` reads them.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llm2rec.config import Config
from llm2rec.core.errors import ConfigError
from llm2rec.core.files import read_json, replaced_file, with_home
from llm2rec.core.git_info import git_state
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.processes import agree
from llm2rec.core.run import Run, read_record
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.sharding import shards_frozen_weights
from llm2rec.data import RecData
from llm2rec.ensemble.batch import SplitRows
from llm2rec.ensemble.choice import Choice, chosen_weights, given_weights, member_table
from llm2rec.ensemble.members import Member
from llm2rec.ensemble.model import Ensemble, rank_targets, rows_at_once
from llm2rec.ensemble.opening import (
    Folders,
    exported_vectors,
    open_members,
    open_teachers,
    rank_training_rows,
    read_titles,
    vectors_to_export,
)
from llm2rec.ensemble.runs import FinishedRun, finished_run, latest_members, named_runs
from llm2rec.ensemble.search import sample_rows
from llm2rec.ensemble.settings import EnsembleSettings
from llm2rec.ensemble.store import save_ensemble
from llm2rec.stage import build, built_object, open_data, open_engine, open_masking, stage
from llm2rec.student.datamodule import SeenItems
from llm2rec.teacher.outputs import log_labelling, rows_to_label, write_outputs
from llm2rec.teacher.settings import ExportSettings, LLMSettings

logger = logging.getLogger("llm2rec.ensemble")
_LEAST = 1e-12  # exported instead of a probability of 0


def _folders(cfg: Config, run: Run) -> Folders:
    root, paths = cfg.paths.root, cfg.paths
    outputs = from_launch_folder(paths.teacher_outputs_dir, root) / cfg.dataset.name
    return Folders(Path(root), from_launch_folder(paths.llm_dir, root), outputs, run.folder / "rankings")


def _outputs(cfg: Config) -> Path:
    return from_launch_folder(cfg.paths.teacher_outputs_dir, cfg.paths.root) / cfg.dataset.name / cfg.ensemble.name


def _named(cfg: Config, fingerprint: str) -> dict[Path, str]:
    """Folders and names of the runs to mix."""
    root, paths = cfg.paths.root, cfg.paths
    if cfg.runs != "latest":
        return named_runs(cfg.runs, Path(root))
    outputs = from_launch_folder(paths.teacher_outputs_dir, root) / cfg.dataset.name
    return named_runs(latest_members(from_launch_folder(paths.result_dir, root), outputs, fingerprint), Path(root))


def _is_current(cfg: Config, folder: Path) -> bool:
    """Whether the ensemble exists with the same members, and the exported outputs are its own."""
    if built_object(cfg.active).source() != read_record(folder).get("selection_source"):
        return False
    if not ((folder / "ensemble").is_dir() and (manifest := _outputs(cfg) / "manifest.json").is_file()):
        return False
    outputs = read_json(manifest)
    fingerprint = read_record(folder, "dataset")["dataset"]["fingerprint"]
    named = _named(cfg, fingerprint).values()  # there may be more finished runs by now
    members = outputs.get("members", [])
    if outputs.get("run") != folder.name or {each["run"] for each in members if "run" in each} != {*named}:
        return False
    texts = [each["text"] for each in members if each.get("kind") == "titles"]
    if texts:
        from llm2rec.teacher.llm import weights_changed  # transformers takes seconds to import

        return not any(weights_changed(with_home(text["source"]), text["weights"]) for text in texts)
    return True


@stage("ensemble", reads=("ensemble", "llm", "active", "runs", "metrics"), is_current=_is_current)
def main(cfg: Config, run: Run) -> None:
    """Choose the weights of the members, validate the ensemble, and export its rankings for the training rows."""
    settings, folders = build(cfg.ensemble, EnsembleSettings), _folders(cfg, run)
    policy: Any = built_object(cfg.active)  # a `SelectionPolicy`, as in llm2rec.teacher
    if cfg.runs != "latest":
        named_runs(cfg.runs, Path(cfg.paths.root))  # raises before data are prepared
    data = open_data(cfg, run)
    named = _named(cfg, data.fingerprint)
    rows = rows_to_label(policy, run, n_rows := len(data.splits["train"]))
    begun_with = run.record.get("members", named.values())  # of a sweep, more jobs may have finished since
    runs = [finished_run(each, name, data) for each, name in named.items() if name in begun_with]
    _check_members(settings, runs)
    exported = vectors_to_export(settings, runs)
    run.keep(members=[each.run for each in runs])
    engine = open_engine(cfg, run, lockstep=shards_frozen_weights())
    titles = None
    if settings.titles.share != 0 or "titles" in exported:
        with run.phase("titles"):
            titles = read_titles(build(cfg.llm, LLMSettings), data, engine, folders)
        run.keep(language_model=titles.about["text"]["weights"])
    members = open_members(runs, titles, settings, data, engine.device)
    with run.phase("teachers"):
        teachers = open_teachers(runs, settings, data, engine, folders)
    members += teachers
    vectors, columns = exported_vectors(exported, members, titles)
    masked = open_masking(cfg, run, data)
    choice = _choice(cfg, run, members, settings, data, engine, masked)
    with engine.first_process_first():
        if engine.is_main:
            save_ensemble(run.folder / "ensemble", members, choice.weights, {each.run: each.model for each in runs})
    ensemble = Ensemble(members, choice.weights)
    _validate(cfg, run, ensemble, data, engine, masked)
    with run.phase("export"):
        rank_training_rows(teachers, rows, data, engine, folders)
        blocks = export_blocks(ensemble, data, rows, engine, run.folder / "export", settings)
        if engine.is_main:
            about = {
                "dataset": data.name,
                "fingerprint": data.fingerprint,
                "teacher": settings.name,
                "train_rows": n_rows,
                "members": choice.members,
                "search": choice.search,
                "vectors": columns,
                "selection": run.config["active"],
                **git_state(),
                "run": run.folder.name,
            }
            labelled = rows if len(rows) < n_rows else None
            export = ExportSettings(top_k=settings.top_k)
            write_outputs(_outputs(cfg), blocks, vectors, export, about, labelled=labelled)
            for folder in (run.folder / "export", folders.blocks):
                shutil.rmtree(folder, ignore_errors=True)
    if engine.is_main:
        log_labelling(run, ("export",), len(rows), n_rows)
    run.note(label=f"{settings.name} ({_described(choice)})", parameters=ensemble.n_parameters)
    engine.close()


def _check_members(settings: EnsembleSettings, runs: Sequence[FinishedRun]) -> None:
    """Raise if there will be no members, before anything is loaded."""
    teachers = settings.teachers.share != 0 and any(each.is_teacher for each in runs)
    students = settings.students.share != 0 and any(not each.is_teacher for each in runs)
    if not (students or teachers or settings.neighbours.share != 0 or settings.titles.share != 0):
        raise ConfigError(
            "the ensemble has no members with a share: neighbours and titles are switched off, and `runs` is empty or "
            "switched off too; give `runs=[result/result_...]`, or leave out one of `ensemble.neighbours.share=0` and "
            "`ensemble.titles.share=0`."
        )


def _choice(
    cfg: Config,
    run: Run,
    members: Sequence[Member],
    settings: EnsembleSettings,
    data: RecData,
    engine: Engine,
    masked: bool,
) -> Choice:
    """The weights of the members, chosen once per run, by the first process; a collective."""
    given_weights(members, settings)
    file = run.folder / "metrics" / "members.json"
    chosen = None
    with run.phase("search"):
        if engine.is_main and file.is_file():
            chosen = read_json(file)
        elif engine.is_main:
            validation = SplitRows(data, "validation", max(each.max_length for each in members))
            numbers = sample_rows(len(validation), settings.search.rows, cfg.seed)
            seen = SeenItems(validation.rows) if masked else None
            metric = cfg.metrics.select_on
            found = chosen_weights(
                members, settings, validation, numbers, metric, cfg.seed, seen=seen, device=engine.device
            )
            run.write_metrics("members", chosen := found.to_dict())
        choice = Choice.of(agree(chosen))
    for line in member_table(choice):
        logger.info("%s", line)
    return choice


def _validate(cfg: Config, run: Run, ensemble: Ensemble, data: RecData, engine: Engine, masked: bool) -> None:
    """Measure the ensemble on all validation rows; a collective."""
    validation = SplitRows(data, "validation", ensemble.max_length)
    seen = SeenItems(validation.rows) if masked else None
    with run.phase("validation"):
        ranks = rank_targets(ensemble, validation, engine, seen=seen, batch_rows=cfg.ensemble.batch_rows)
    reached = {f"val/{name}": value for name, value in ranking_metrics(ranks).items()}
    history = [{"step": 0, **reached}]
    protocol = {"select_on": cfg.metrics.select_on, "mask_seen": masked}
    run.write_metrics("validation", {**protocol, "best_step": 0, "history": history})
    if engine.is_main:
        metric = cfg.metrics.select_on
        logger.info("%s on validation: %.4f", metric, reached[f"val/{metric}"])


def export_blocks(
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
    size, at_once = settings.block_rows, min(settings.batch_rows, rows_at_once(data.n_items))
    rows = SplitRows(data, "train", ensemble.max_length)
    files = [folder / f"block_{number:06d}.safetensors" for number in range(-(-len(labelled) // size))]
    mine = engine.my_missing(files)
    shares = {number: labelled[number * size : (number + 1) * size] for number in mine}
    k = min(settings.top_k, data.n_items)
    with engine.rows_progress("export", sum(len(numbers) for numbers in shares.values())) as progress:
        for number, numbers in shares.items():
            items = np.empty((len(numbers), k), np.int32)
            log_probs, done = np.empty((len(numbers), k), np.float32), 0
            for part in np.array_split(numbers, -(-len(numbers) // at_once)):
                best = ensemble.probabilities(rows.batch(part, engine.device)).topk(k, dim=1)
                there = slice(done, done := done + len(part))
                items[there] = best.indices.cpu().numpy()
                log_probs[there] = best.values.clamp(min=_LEAST).log().cpu().numpy()
                progress.advance(len(part))
            with replaced_file(files[number]) as aside:
                save_file({"items": items, "log_probs": log_probs}, aside)
    engine.wait()
    return files


def _described(choice: Choice) -> str:
    """The members with their shares, such as ``2 sasrec 0.3, neighbours 0.2, titles of minilm 0.5``."""
    counts: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    for each in choice.members:
        name = each.get("label") or (f"titles of {each['llm']}" if each["kind"] == "titles" else each["kind"])
        counts[name] += 1
        shares[name] += each["share"]
    return ", ".join(
        f"{f'{counts[name]} ' if any(each.get('label') == name for each in choice.members) else ''}{name} {share:.3g}"
        for name, share in shares.items()
    )


if __name__ == "__main__":
    main()
