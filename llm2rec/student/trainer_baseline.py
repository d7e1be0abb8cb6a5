"""Train a student on its own task alone: the baseline that distillation has to beat."""

from functools import partial

from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.train.batching import OptimizerStep
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.state import TrainingState
from llm2rec.core.train.stepper import MicroBatches
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.models import SequentialRecommender
from llm2rec.student.optimizer import student_optimizer
from llm2rec.student.settings import LossSettings
from llm2rec.student.task_loss import TaskLoss

__all__ = ["train_baseline"]


def train_baseline(
    model: SequentialRecommender,
    train: Rows,
    validation: Rows,
    engine: Engine,
    *,
    loss: LossSettings | None = None,
    item_optimizer: str = "adamw",
    select_on: str = "ndcg@10",
    seen: SeenItems | None = None,
) -> SequentialRecommender:
    """Train on the student's own task and keep the weights that validate best.

    Args:
        model: Freshly initialised student.
        train: Training rows.
        validation: Rows for early stopping; the test split is never seen here.
        engine: Runs the loop; its run folder gets checkpoints, best weights and ``metrics/validation.json``.
        loss: The task; full-softmax cross-entropy if None.
        item_optimizer: ``adamw`` or ``rowwise``; see `student_optimizer`.
        select_on: Validation metric that decides.
        seen: Items to leave out of the validation rankings; None ranks all items.

    Returns:
        The unwrapped model with the best weights, in evaluation mode.

    Raises:
        ConfigError: If the catalogue is too small for the negatives, or DeepSpeed is to update rows.
    """
    settings, record = engine.training, TrainingState(engine, select_on)
    task_loss = TaskLoss(model, loss or LossSettings(), train.targets, engine.seed)
    wrapped, optimizer = engine.prepare(model, student_optimizer(model, engine, item_optimizer))
    if state := engine.load_checkpoint(model, optimizer):
        record.restore(state)

    def passes(step: int, share: OptimizerStep) -> MicroBatches:
        for units in share.micro_batches:
            batch = train.batch(units, engine.device)
            users = wrapped(*batch.inputs)  # (B, D)
            yield batch.rows, task_loss(users, batch.targets, batch.rows, epoch=step // per_epoch, step=step)

    max_steps, steps = engine.max_steps(len(train)), engine.steps(train.units, record.step, sizes=train.sizes)
    per_epoch = settings.steps_per_epoch(len(train))
    wrapped.train()
    for step, share in engine.progress(steps, "student", max_steps, initial=record.step):
        if record.stopping.should_stop:
            break
        lr = engine.begin_step(step, max_steps, optimizer)
        sums = engine.train_step(step, share, partial(passes, step))
        record.finish_step(step, share.n_rows, sums)

        if settings.evaluation_is_due(record.step, len(train)):
            metrics = ranking_metrics(rank_targets(model, validation, engine, seen=seen))
            record.evaluated(model, metrics, learning_rate=lr)
        if engine.checkpoint_is_due(record.step, len(train)):
            engine.save_checkpoint(model, optimizer, record.state())
    record.finish(model)
    return model.eval()
