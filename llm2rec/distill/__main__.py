"""``accelerate launch -m llm2rec.distill``: train a student with distillation from a teacher's outputs."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from llm2rec.cards import student_card, training_on
from llm2rec.config import Config
from llm2rec.core.errors import ConfigError
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.run import Run, read_record
from llm2rec.core.vectors import Preparation
from llm2rec.data import RecData
from llm2rec.distill.data_bridge import TeacherOutputs, outputs_hash, read_outputs
from llm2rec.distill.selection_policy import SelectionPolicy
from llm2rec.distill.settings import DistillSettings, EmbeddingSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.distill.trainer_distill import train_distilled
from llm2rec.stage import build, built_object, open_data, open_engine, open_masking, stage
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.models import SequentialRecommender, build_model
from llm2rec.student.reading import TextReader
from llm2rec.student.samples import log_recommendations, student_answers
from llm2rec.student.settings import LossSettings, StudentSettings
from llm2rec.student.store import save_student

logger = logging.getLogger(__name__)


def _is_current(cfg: Config, folder: Path) -> bool:
    """Whether the student exists, and teacher outputs and policy source have not changed since it was trained."""
    outputs, record = from_launch_folder(cfg.distill.teacher_outputs, cfg.paths.root), read_record(folder)
    if built_object(cfg.active).source() != record.get("selection_source"):
        return False
    return (folder / "student").is_dir() and outputs_hash(outputs) == record.get("teacher_outputs")


@stage("distill", reads=("student", "distill", "active", "metrics"), is_current=_is_current)
def main(cfg: Config, run: Run) -> None:
    """Distil the teacher into a student and store the weights that validate best."""
    settings, student_settings = build(cfg.distill, DistillSettings), build(cfg.student, StudentSettings)
    policy: SelectionPolicy = built_object(cfg.active)
    _check(settings, student_settings.loss)
    data = open_data(cfg, run)
    outputs = from_launch_folder(settings.teacher_outputs, cfg.paths.root)
    teacher = read_outputs(
        outputs,
        n_rows=len(data.splits["train"]),
        n_items=data.n_items,
        fingerprint=data.fingerprint,
        top_k=min(settings.ranking.top_k, data.n_items) if settings.ranking.weight > 0 else 1,
    )
    run.keep(teacher_outputs=outputs_hash(outputs), selection_source=policy.source())
    engine = open_engine(cfg, run, student_settings.training)
    arguments = {"n_items": data.n_items, **asdict(student_settings.model)}
    if settings.embedding.unties and arguments["tie_items"]:
        side = settings.embedding.fusion_sides
        logger.info("using separate input and output item tables: fusion_sides=%s", side)
        arguments["tie_items"] = False
    train = Rows.of(data, "train", student_settings.model.max_length, student_settings.examples)
    untrained = ~train.occurring() if reads_texts(settings.embedding, teacher) else None
    if untrained is not None:
        logger.info("%d items do not occur in training: the teacher's vectors represent them", int(untrained.sum()))
    preparation = preparation_of(settings.embedding, teacher)
    model = distilled_student(
        build_model(student_settings.name, **arguments), teacher, settings.embedding, preparation, untrained
    )
    validation = Rows.of(data, "validation", student_settings.model.max_length)
    masked = open_masking(cfg, run, data)
    seen = SeenItems(validation) if masked else None
    with run.phase("train"):
        train_distilled(
            model,
            train,
            teacher,
            validation,
            policy,
            engine,
            settings,
            loss=student_settings.loss,
            item_optimizer=student_settings.item_optimizer,
            select_on=cfg.metrics.select_on,
            seen=seen,
        )
    log_recommendations(engine, student_answers(model.student, masked), validation, data.items)
    name = teacher.manifest.get("teacher", "unknown teacher")
    if engine.is_main:
        reader = reader_of(model, preparation, teacher, data) if settings.embedding.reads and teacher.encoders else None
        _save(run, data, model.student, student_settings.name, arguments, teacher, reader, masked)
    served = sum(weight.numel() for weight in model.student.weights_to_serve().values())
    run.note(label=f"{student_settings.name} + {settings.name} ({name})", parameters=served)
    engine.drop_checkpoints()
    engine.close()


def _check(settings: DistillSettings, loss: LossSettings) -> None:
    if not settings.teaches:
        raise ConfigError(
            f"distill={settings.name} does not use the teacher: `distill.ranking.weight`, "
            "`distill.embedding.fusion_scale` and `alignment_weight` are 0 and `initialise` is none; set one of them, "
            "or train a baseline with `python -m llm2rec.student`."
        )
    if settings.task_loss != "student" and loss != LossSettings():
        logger.warning("student.loss is ignored: the recipe %s uses task_loss=%s", settings.name, settings.task_loss)


def _save(
    run: Run,
    data: RecData,
    student: SequentialRecommender,
    name: str,
    arguments: dict[str, Any],
    teacher: TeacherOutputs,
    reader: TextReader | None,
    masked: bool,
) -> None:
    """Save the student into the run's folder."""
    items = data.items.with_format("arrow")[:]
    card = card_of(run, data, name, student.max_length, items, teacher.manifest, reads=reader is not None)
    save_student(run.folder / "student", student, name, arguments, items, card, mask_seen=masked, reader=reader)


def preparation_of(settings: EmbeddingSettings, teacher: TeacherOutputs) -> Preparation | None:
    """Fit the preparation of the teacher's vectors; None uses them as they are."""
    if not settings.standardise:
        return None
    return Preparation.fit(teacher.embeddings, whitening=settings.whitening, components=settings.components)


def reader_of(
    model: DistilledStudent, preparation: Preparation | None, teacher: TeacherOutputs, data: RecData
) -> TextReader:
    """What the student makes of the texts of new items."""
    options = data.manifest["settings"]
    read = {name: options[name] for name in ("text_columns", "text_length") if name in options}
    return TextReader.of(model.student, preparation, encoders=teacher.encoders, **read)


def reads_texts(settings: EmbeddingSettings, teacher: TeacherOutputs) -> bool:
    """Whether the teacher's vectors are to represent items that have no offset."""
    return settings.reads and (settings.id_dropout > 0 or bool(teacher.encoders))


def distilled_student(
    student: SequentialRecommender,
    teacher: TeacherOutputs,
    settings: EmbeddingSettings,
    preparation: Preparation | None = None,
    untrained: Tensor | None = None,
) -> DistilledStudent:
    """Wrap a student for embedding distillation.

    Args:
        student: Freshly initialised student.
        teacher: The teacher's outputs.
        settings: Embedding distillation.
        preparation: Return value of `preparation_of`.
        untrained: As of `DistilledStudent`.
    """
    return DistilledStudent(
        student,
        teacher.embeddings if preparation is None else preparation(teacher.embeddings),
        fusion_scale=settings.fusion_scale,
        align=settings.alignment_weight > 0,
        fusion_sides=settings.fusion_sides,
        alignment_sides=settings.alignment_sides,
        initialise=settings.initialise,
        fusion=settings.fusion,
        fusion_unit=settings.fusion_unit,
        id_dropout=settings.id_dropout,
        untrained=untrained,
    )


def card_of(
    run: Run, data: RecData, student: str, max_length: int, items: pa.Table, manifest: Mapping[str, Any], *, reads: bool
) -> str:
    """The model card of a run's student, with the teacher of the ``manifest``."""
    options = {name: run.config[name] for name in ("student", "distill", "active")}
    recipe = {k: v for k, v in options["distill"].items() if k != "teacher_outputs"}  # a path on this machine
    examples = items["raw_id"][:3].to_pylist()
    return student_card(
        student,
        examples,
        max_length,
        training_on(data, run),
        options | {"distill": recipe},
        teacher=manifest,
        reads=reads,
    )


if __name__ == "__main__":
    main()
