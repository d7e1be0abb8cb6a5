"""``accelerate launch -m llm2rec.student``: train a student without distillation, the baseline."""

from dataclasses import asdict

from llm2rec.cards import student_card, training_on
from llm2rec.config import Config
from llm2rec.core.run import Run
from llm2rec.stage import build, open_data, open_engine, open_masking, stage
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.models import build_model
from llm2rec.student.samples import log_recommendations, student_answers
from llm2rec.student.settings import StudentSettings
from llm2rec.student.store import save_student
from llm2rec.student.trainer_baseline import train_baseline


@stage("student", reads=("student", "metrics"), is_current=lambda cfg, folder: (folder / "student").is_dir())
def main(cfg: Config, run: Run) -> None:
    """Train the baseline and store the weights that validate best."""
    settings = build(cfg.student, StudentSettings)
    data = open_data(cfg, run)
    engine = open_engine(cfg, run, settings.training)
    arguments = {"n_items": data.n_items, **asdict(settings.model)}
    model = build_model(settings.name, **arguments)
    train = Rows.of(data, "train", settings.model.max_length, settings.examples)
    validation = Rows.of(data, "validation", settings.model.max_length)
    masked = open_masking(cfg, run, data)
    seen = SeenItems(validation) if masked else None
    with run.phase("train"):
        model = train_baseline(
            model,
            train,
            validation,
            engine,
            loss=settings.loss,
            item_optimizer=settings.item_optimizer,
            select_on=cfg.metrics.select_on,
            seen=seen,
        )
    log_recommendations(engine, student_answers(model, masked), validation, data.items)
    if engine.is_main:
        items = data.items.with_format("arrow")[:]
        card = student_card(
            settings.name,
            items["raw_id"][:3].to_pylist(),
            model.max_length,
            training_on(data, run),
            {"student": run.config["student"]},
        )
        save_student(run.folder / "student", model, settings.name, arguments, items, card, mask_seen=masked)
    run.note(label=settings.name, parameters=sum(weight.numel() for weight in model.parameters()))
    engine.drop_checkpoints()
    engine.close()


if __name__ == "__main__":
    main()
