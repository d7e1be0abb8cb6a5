"""``accelerate launch -m llm2rec.teacher``: train the teacher and export its outputs."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from llm2rec.cards import Training, teacher_card, training_on
from llm2rec.config import Config
from llm2rec.core.files import read_json, with_home
from llm2rec.core.git_info import git_state
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.run import Run, read_record
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.sharding import full_numel, shards_frozen_weights
from llm2rec.data import RecData, title_agreement
from llm2rec.stage import build, built_object, open_data, open_engine, open_masking, stage
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.samples import Answers, log_recommendations
from llm2rec.teacher.borrowed_student import BorrowedStudent, open_recommender
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.gate_cache import GateCache, TeacherRows
from llm2rec.teacher.ilora_model import ItemTeacher, LLMTeacher
from llm2rec.teacher.llm import check_launch, locate, mixed_precision, weights_changed, weights_hash
from llm2rec.teacher.outputs import log_labelling, rank_blocks, rows_to_label, write_outputs
from llm2rec.teacher.settings import LLMSettings, TeacherSettings
from llm2rec.teacher.store import save_teacher
from llm2rec.teacher.title.model import TitleRecommender
from llm2rec.teacher.title.objective import UNLISTED_CANDIDATES, TitleObjective
from llm2rec.teacher.trainer import ItemObjective, TeacherTask, train_teacher

logger = logging.getLogger(__name__)


def _is_current(cfg: Config, folder: Path) -> bool:
    """Whether the teacher exists, its language model is unchanged, and the outputs of its name are its own."""
    if not (folder / "teacher").is_dir():
        return False
    recipe = read_json(folder / "teacher" / "config.json")
    if weights_changed(with_home(recipe["source"]), recipe.get("llm_weights", "")):
        return False
    if not cfg.teacher.export.enabled:
        return True
    record = read_record(folder, "dataset")
    if built_object(cfg.active).source() != record.get("selection_source"):
        return False
    manifest = _outputs(cfg, record["dataset"]["name"]) / "manifest.json"
    return manifest.is_file() and read_json(manifest).get("run") == folder.name


def _outputs(cfg: Config, dataset: str) -> Path:
    """Folder of this teacher's outputs for a dataset."""
    folder = from_launch_folder(cfg.paths.teacher_outputs_dir, cfg.paths.root)
    return folder / dataset / f"{cfg.teacher.name}-{cfg.llm.name}"


@stage("teacher", reads=("llm", "teacher", "active", "metrics"), is_current=_is_current)
def main(cfg: Config, run: Run) -> None:
    """Train the teacher, save it, and rank the catalogue for the training rows."""
    settings, llm = build(cfg.teacher, TeacherSettings), build(cfg.llm, LLMSettings)
    check_launch(settings.precision)
    policy: Any = built_object(cfg.active)  # a `SelectionPolicy`; distillation imports the teacher
    data = open_data(cfg, run)
    labelled = rows_to_label(policy, run, len(data.splits["train"])) if settings.export.enabled else None
    llm_dir = from_launch_folder(cfg.paths.llm_dir, cfg.paths.root)
    engine = open_engine(
        cfg, run, settings.training, mixed_precision(settings.precision), lockstep=shards_frozen_weights()
    )
    if engine.is_main and (doubt := title_agreement(data).doubt()):
        logger.warning("%s", doubt)
    of_run = from_launch_folder(settings.recommender_run, cfg.paths.root) if settings.recommender_run else None
    kept = run.folder / "recommender_of_run"
    with engine.first_process_first():
        recommender = open_recommender(of_run, kept, data.name, data.fingerprint, engine.device)
        source = locate(llm, Path(cfg.paths.root), llm_dir, data.titles)
    run.keep(language_model=weights_hash(source))
    train, validation = (Rows.of(data, split) for split in ("train", "validation"))
    masked = open_masking(cfg, run, data)
    settings = _excluding(settings, masked, engine)
    model, recipe = build_teacher(
        llm, source, settings, data, train.targets.numpy(), engine.device, recommender, cfg.seed
    )
    export = settings.export
    cache = GateCache(
        model,
        recipe.identity,
        engine,
        llm_dir / "gate_inputs",
        block_rows=export.block_rows,
        batch_tokens=export.batch_tokens,
    )
    if settings.training.epochs > 0:
        with run.phase("gate_inputs"):
            train_rows = cache.rows(train, choose_rows(len(train), settings.train_rows, cfg.seed))
            validation_rows = cache.rows(validation, choose_rows(len(validation), settings.validation_rows, cfg.seed))
        with run.phase("train"):
            seen = SeenItems(validation) if masked else None
            objective = objective_of(model, train_rows, validation_rows, engine, seen)
            train_teacher(model, objective, engine, settings, cfg.metrics.select_on)
    log_recommendations(engine, recommendations_of(model.eval(), data), validation, data.items)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if engine.is_main:
        card = _card(run, data, model, settings, llm.name, recipe.source, is_trained=trained > 0)
        save_teacher(run.folder / "teacher", model.eval(), recipe, card)
    _describe(run, model, f"{settings.name} {llm.name}{settings.label}", recommender, trained)
    if labelled is not None:
        with run.phase("export_gate_inputs"):
            rows = cache.rows(train, labelled)
        with run.phase("export"):
            export_outputs(model.eval(), rows, settings, engine, run, data, _outputs(cfg, data.name))
        if engine.is_main:
            log_labelling(run, ("export_gate_inputs", "export"), len(rows.rows), len(train))
    engine.drop_checkpoints()
    if engine.is_main:
        shutil.rmtree(kept, ignore_errors=True)  # the finished teacher has its own copy
    engine.close()


def _excluding(settings: TeacherSettings, masked: bool, engine: Engine) -> TeacherSettings:
    """The settings with `exclude_history` resolved; warns if the teacher will rank fewer items than students."""
    settings = settings.excluding(masked)
    if settings.exclude_history and not masked and engine.is_main:
        logger.warning(
            "teacher.exclude_history is true, but rankings keep the items of a user's past: the teacher ranks fewer "
            "items than students do; compare them with metrics.mask_seen=true"
        )
    return settings


def _card(
    run: Run, data: RecData, model: LLMTeacher, settings: TeacherSettings, llm: str, source: str, is_trained: bool
) -> str:
    """The model card of a run's teacher."""
    training = validated_on(training_on(data, run, settings.train_rows, settings.validation_rows), model, settings)
    # Without the path of a trained recommender on this machine.
    options = {k: v for k, v in run.config["teacher"].items() if k != "recommender_run"}
    about = (llm, source, settings.tuning, settings.objective, training, {"teacher": options})
    return teacher_card(*about, is_trained=is_trained and settings.training.epochs > 0)


def _describe(run: Run, model: LLMTeacher, label: str, recommender: BorrowedStudent | None, trained: int) -> None:
    """Record label and sizes of a finished teacher."""
    gate = f" ({recommender.name} gate)" if recommender is not None and model.gate_input == "sequence" else ""
    parameters = model_size(model) + (recommender.n_parameters if recommender is not None else 0)
    run.note(label=f"{label}{gate}", parameters=parameters, trained_parameters=trained)


def export_outputs(
    model: LLMTeacher,
    rows: TeacherRows,
    settings: TeacherSettings,
    engine: Engine,
    run: Run,
    data: RecData,
    folder: Path,
) -> None:
    """Rank the catalogue for the rows and write the teacher outputs to ``folder``, named after the teacher."""
    blocks = rank_blocks(model, rows, engine, run.folder / "export", settings.export)
    if not engine.is_main:
        return
    about = {
        "dataset": data.name,
        "fingerprint": data.fingerprint,
        "teacher": folder.name,
        **settings.kind,
        "train_rows": len(rows.data),
        "selection": run.config["active"],
        **git_state(),
        "run": run.folder.name,
    }
    write_outputs(
        folder,
        blocks,
        model.item_vectors,
        settings.export,
        about,
        by_distance=settings.ranks_by_distance,
        labelled=rows.rows if len(rows.rows) < len(rows.data) else None,
    )
    shutil.rmtree(run.folder / "export")


def objective_of(
    model: LLMTeacher, train: TeacherRows, validation: TeacherRows, engine: Engine, seen: SeenItems | None
) -> TeacherTask:
    """The objective of a teacher; ``seen`` items are excluded from a validation on the whole catalogue."""
    if isinstance(model, TitleRecommender):
        return TitleObjective(model, train, validation, engine)
    assert isinstance(model, ItemTeacher), "teachers are of two kinds"
    return ItemObjective(model, train, validation, engine, seen=seen)


def recommendations_of(model: LLMTeacher, data: RecData) -> Answers:
    """Recommendations of a teacher in evaluation mode, for `log_recommendations`."""
    left = max(1, data.n_items - data.history_length)  # a search over titles raises if fewer than k items remain
    return lambda history, lengths, k: model.best_items(history, lengths, min(k, left))[0]


def validated_on(training: Training, model: LLMTeacher, settings: TeacherSettings) -> Training:
    """Training data for the model card, with the teacher's own validation candidates."""
    if isinstance(model, TitleRecommender):
        return replace(training, n_candidates=settings.title.n_candidates or UNLISTED_CANDIDATES)
    of_history = settings.exclude_history and training.excluded == "no items"
    return replace(training, excluded="items of the history") if of_history else training


def choose_rows(n_rows: int, wanted: int | None, seed: int) -> NDArray[np.int64]:
    """All rows, or a random choice of ``wanted`` of them, in ascending order."""
    if wanted is None or wanted >= n_rows:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng([seed, n_rows]).permutation(n_rows)[:wanted])


def model_size(model: nn.Module) -> int:
    """Number of parameters, including frozen ones."""
    return sum(full_numel(parameter) for parameter in model.parameters())


if __name__ == "__main__":
    main()
