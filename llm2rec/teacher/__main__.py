"""``accelerate launch -m llm2rec.teacher``: train the iLoRA teacher and write its outputs."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from llm2rec.config import Config
from llm2rec.core.card import Training
from llm2rec.core.files import read_json, with_home
from llm2rec.core.git_info import git_state
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.run import Run, read_record
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.sharding import full_numel, shards_frozen_weights
from llm2rec.data import RecData, title_agreement
from llm2rec.stage import build, built_object, open_data, open_engine, stage
from llm2rec.student.card import training_on
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.samples import Answers, log_recommendations
from llm2rec.teacher.borrowed_student import open_recommender
from llm2rec.teacher.card import teacher_card
from llm2rec.teacher.export import rank_blocks
from llm2rec.teacher.factory import build_teacher, save_teacher
from llm2rec.teacher.gate_cache import GateCache, TeacherRows
from llm2rec.teacher.ilora_model import ItemTeacher, LLMTeacher
from llm2rec.teacher.llm import check_launch, locate, mixed_precision, weights_changed, weights_hash
from llm2rec.teacher.outputs import rows_to_label, tell_labelling, write_outputs
from llm2rec.teacher.settings import LLMSettings, TeacherSettings
from llm2rec.teacher.title.model import TitleRecommender
from llm2rec.teacher.title.objective import UNLISTED_CANDIDATES, TitleObjective
from llm2rec.teacher.trainer import ItemObjective, TeacherTask, train_teacher

logger = logging.getLogger(__name__)


def _is_current(cfg: Config, folder: Path) -> bool:
    """Whether the teacher and its language model are as they were, and the outputs that bear its name its own."""
    if not (folder / "teacher").is_dir():
        return False
    told = read_json(folder / "teacher" / "config.json")
    if weights_changed(with_home(told["source"]), told.get("llm_weights", "")):
        return False
    if not cfg.teacher.export.enabled:
        return True
    record = read_record(folder, "dataset")
    if built_object(cfg.active).source() != record.get("selection_source"):
        return False
    manifest = _outputs(cfg, record["dataset"]["name"]) / "manifest.json"
    return manifest.is_file() and read_json(manifest).get("run") == folder.name


def _outputs(cfg: Config, dataset: str) -> Path:
    """Where this teacher's outputs for a dataset lie."""
    folder = from_launch_folder(cfg.paths.teacher_outputs_dir, cfg.paths.root)
    return folder / dataset / f"{cfg.teacher.name}-{cfg.llm.name}"


@stage("teacher", reads=("llm", "teacher", "active", "metrics"), is_current=_is_current)
def main(cfg: Config, run: Run) -> None:
    """Train the teacher, store its adapter, rank the catalogue for every training row."""
    settings, llm = build(cfg.teacher, TeacherSettings), build(cfg.llm, LLMSettings)
    check_launch(settings.precision)
    policy: Any = built_object(cfg.active)  # a `SelectionPolicy`; distillation lies above the teacher
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
            seen = SeenItems(Rows.of(data, "validation")) if cfg.metrics.mask_seen else None
            objective = objective_of(model, train_rows, validation_rows, engine, seen)
            train_teacher(model, objective, engine, settings, cfg.metrics.select_on)
    log_recommendations(engine, answers_of(model.eval(), data), validation, data.items)
    if engine.is_main:
        # Without the place of a trained recommender on this machine.
        told = {k: v for k, v in run.config["teacher"].items() if k != "recommender_run"}
        training = validated_on(training_on(data, run, settings.train_rows, settings.validation_rows), model, settings)
        about = (llm.name, recipe.source, settings.tuning, settings.objective, training, {"teacher": told})
        save_teacher(run.folder / "teacher", model.eval(), recipe, teacher_card(*about))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    label = f"{settings.name} {llm.name}{settings.label}{model.gate_source.label}"
    parameters = model_size(model) + (recommender.n_parameters if recommender is not None else 0)
    run.note(label=label, parameters=parameters, trained_parameters=trained)

    if labelled is not None:
        with run.phase("export_gate_inputs"):
            rows = cache.rows(train, labelled)
        with run.phase("export"):
            write_down(model.eval(), rows, settings, engine, run, data, _outputs(cfg, data.name))
        if engine.is_main:
            tell_labelling(run, ("export_gate_inputs", "export"), len(rows.rows), len(train))
    engine.drop_checkpoints()
    if engine.is_main:
        shutil.rmtree(kept, ignore_errors=True)  # the finished teacher holds its own
    engine.close()


def write_down(
    model: LLMTeacher,
    rows: TeacherRows,
    settings: TeacherSettings,
    engine: Engine,
    run: Run,
    data: RecData,
    folder: Path,
) -> None:
    """Rank the catalogue for the rows and write the teacher outputs to ``folder``, whose name is the teacher's."""
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
    """What a teacher of this kind is trained to do; ``seen`` is left out where it is validated on all items."""
    if isinstance(model, TitleRecommender):
        return TitleObjective(model, train, validation, engine)
    assert isinstance(model, ItemTeacher), "there are teachers of two kinds"
    return ItemObjective(model, train, validation, engine, seen=seen)


def answers_of(model: LLMTeacher, data: RecData) -> Answers:
    """What a teacher in evaluation mode answers, for `log_recommendations`."""
    left = max(1, data.n_items - data.history_length)  # a search over titles finds all that it is asked for or none
    return lambda history, lengths, k: model.best_items(history, lengths, min(k, left))[0]


def validated_on(training: Training, model: LLMTeacher, settings: TeacherSettings) -> Training:
    """What a card says of the training, with what teachers are validated on where it is not what students are."""
    if isinstance(model, TitleRecommender):
        return replace(training, n_candidates=settings.title.n_candidates or UNLISTED_CANDIDATES)
    of_history = settings.exclude_history and training.left_out == "no items"
    return replace(training, left_out="items of the history") if of_history else training


def choose_rows(n_rows: int, wanted: int | None, seed: int) -> NDArray[np.int64]:
    """All rows, or a random choice of ``wanted`` of them, in ascending order."""
    if wanted is None or wanted >= n_rows:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng([seed, n_rows]).permutation(n_rows)[:wanted])


def model_size(model: nn.Module) -> int:
    """Parameters of the model, frozen ones included."""
    return sum(full_numel(parameter) for parameter in model.parameters())


if __name__ == "__main__":
    main()
