"""Train a teacher: one loop for all objectives, and the `item` objective."""

import logging
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.train.batching import OptimizerStep
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.optimizer import adamw
from llm2rec.core.train.state import TrainingState
from llm2rec.core.train.stepper import MicroBatches
from llm2rec.student.datamodule import SeenItems
from llm2rec.student.losses import cross_entropy
from llm2rec.teacher.curriculum import is_hybrid
from llm2rec.teacher.evaluator import rank_targets
from llm2rec.teacher.gate_cache import TeacherRows
from llm2rec.teacher.gates import GateWatch, balance_losses, mean_gates
from llm2rec.teacher.ilora_model import ItemTeacher, LLMTeacher
from llm2rec.teacher.prompts import TokenBatch
from llm2rec.teacher.settings import TeacherSettings

__all__ = ["ItemObjective", "Objective", "train_teacher"]

logger = logging.getLogger(__name__)
_PROMPTS_SHOWN = 3


class Objective(Protocol):
    """What a teacher is trained to do.

    Attributes:
        train: Rows to train on.
        validation: Rows for early stopping.
        knows_lengths: Whether ``train.token_counts`` are the lengths of whole prompts, so that tokens a second can be
            told.
    """

    train: TeacherRows
    validation: TeacherRows
    knows_lengths: bool

    def losses(self, wrapped: nn.Module, micro: NDArray[np.int64], *, hybrid: bool, epoch: int) -> Tensor:
        """Losses of a micro-batch; the gates of its rows are held meanwhile.

        Args:
            wrapped: The teacher as `Engine.prepare` returned it.
            micro: Positions in ``train.rows``, shape ``(B,)``.
            hybrid: Whether prompts carry injected vectors.
            epoch: Epoch, from 0.

        Returns:
            One loss a row, shape ``(B,)``, float32.
        """

    def validate(self) -> dict[str, float]:
        """Validation metrics by name; a collective."""

    def prompts(self, n: int) -> TokenBatch:
        """What the first ``n`` training rows make the language model read, answers included; for people to look at."""


class ItemObjective:
    """Next-item classification over the whole catalogue: full-softmax cross-entropy.

    Args:
        model: Unwrapped teacher.
        train: Rows to train on.
        validation: Rows for early stopping.
        engine: Divides validation rows among processes.
        seen: Items to leave out of the validation rankings, as in `rank_targets`.
    """

    knows_lengths = True

    def __init__(
        self,
        model: ItemTeacher,
        train: TeacherRows,
        validation: TeacherRows,
        engine: Engine,
        *,
        seen: SeenItems | None = None,
    ) -> None:
        self.model, self.train, self.validation, self.engine, self.seen = model, train, validation, engine, seen

    def losses(self, wrapped: nn.Module, micro: NDArray[np.int64], *, hybrid: bool, epoch: int) -> Tensor:
        """See `Objective.losses`."""
        data, rows = self.train.data, self.train.rows[micro]
        targets = data.batch(rows, self.engine.device).targets
        inputs = self.model.read(*data.histories(rows), hybrid=hybrid)
        logits = wrapped(**vars(inputs), keep=targets)  # (B, N)
        return cross_entropy(logits, targets)

    def validate(self) -> dict[str, float]:
        """See `Objective.validate`."""
        return ranking_metrics(rank_targets(self.model, self.validation, self.engine, seen=self.seen))

    def prompts(self, n: int) -> TokenBatch:
        """See `Objective.prompts`."""
        data, rows = self.train.data, self.train.rows[:n]
        history, lengths = data.histories(rows)
        return self.model.prompts.histories(history, lengths, hybrid=self.model.is_hybrid)


def train_teacher(
    model: LLMTeacher, objective: Objective, engine: Engine, settings: TeacherSettings, select_on: str = "ndcg@10"
) -> None:
    """Train what the teacher has to train; keep the weights that validate best. It is left in evaluation mode.

    A teacher that has nothing to train, such as one of ``tuning=none`` that scores by titles, stays as it is.

    Args:
        model: Unwrapped teacher with fresh weights; its base is frozen.
        objective: What it is trained to do, and on which rows.
        engine: Runs the loop; its run folder gets checkpoints, best weights and ``metrics/validation.json``.
        settings: Learning rates, curriculum, load balance; length and batch are the engine's.
        select_on: Validation metric that decides.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        logger.info("nothing to train: `teacher.tuning` is %r and nothing beside the LLM learns", settings.tuning)
        model.eval()
        return
    training, train, record = engine.training, objective.train, TrainingState(engine, select_on)
    wrapped, optimizer = engine.prepare(model, _optimizer(model, settings))
    if state := engine.load_checkpoint(model, optimizer):
        record.restore(state)
    else:
        shown = model.prompts.readable(objective.prompts(_PROMPTS_SHOWN))
        engine.log_text("prompts", "\n\n".join(f"    {prompt}" for prompt in shown))  # indented: not to be rendered

    watch = GateWatch(model, objective.validation.gate_inputs, engine)
    n_rows, balance_weight = len(train.rows), settings.balance_loss
    positions, max_steps = np.arange(n_rows), engine.max_steps(n_rows)
    steps = engine.steps(positions, record.step, train.token_counts)
    wrapped.train()
    for step, share in engine.progress(steps, "teacher", max_steps, initial=record.step):
        if record.stopping.should_stop:
            break
        if settings.item_refresh_steps and step > 0 and step % settings.item_refresh_steps == 0:
            engine.average_buffers(model)  # gates with running statistics take part
            model.refresh_titles()
        hybrid = model.is_hybrid and is_hybrid(settings.curriculum, step, max_steps, engine.seed)
        lr = engine.begin_step(step, max_steps, optimizer, resting=() if hybrid else ("projector",))
        passes = partial(_passes, wrapped, model, objective, engine, balance_weight, hybrid, step)
        if objective.knows_lengths:
            engine.count(tokens=int(train.token_counts[share.batch].sum()))
        record.finish_step(step, share.n_rows, engine.train_step(step, share, passes))

        if training.evaluation_is_due(record.step, n_rows):
            engine.average_buffers(model)
            scalars = {"learning_rate": lr, "hybrid": float(hybrid)} if model.is_hybrid else {"learning_rate": lr}
            # Before the vectors are shown, validation, which is hybrid, says little of what is being learnt.
            waits = settings.curriculum != "two_stage" or hybrid
            record.evaluated(model, objective.validate(), waits=waits, **scalars, **watch.look(record.step))
        if engine.checkpoint_is_due(record.step, n_rows):
            engine.save_checkpoint(model, optimizer, record.state())
    record.finish(model)
    model.eval()


def _passes(
    wrapped: nn.Module,
    model: LLMTeacher,
    objective: Objective,
    engine: Engine,
    balance_weight: float,
    hybrid: bool,
    step: int,
    share: OptimizerStep,
) -> MicroBatches:
    """Losses of a step's micro-batches; see `Engine.train_step`."""
    train = objective.train
    epoch = step // engine.training.steps_per_epoch(len(train.rows))
    use = mean_gates(model, train.gate_inputs, share, engine) if balance_weight > 0 else None  # (E,) or (G, E)
    for micro in share.micro_batches:
        gate_input = torch.from_numpy(train.gate_inputs[micro]).to(engine.device)
        with model.mixing(gate_input) as gates:  # they must outlive backward
            losses = {"loss": objective.losses(wrapped, micro, hybrid=hybrid, epoch=epoch)}  # (B,)
            if use is not None and gates is not None:
                losses |= {"loss_task": losses["loss"], "loss_balance": balance_losses(gates, use)}
                losses["loss"] = losses["loss_task"] + balance_weight * losses["loss_balance"]
            yield train.rows[micro], losses


def _optimizer(model: nn.Module, settings: TeacherSettings) -> torch.optim.AdamW:
    """Gate, projector and head in parameter groups of their own, as far as the model has them."""
    ratios = {
        "ilora_gate": settings.gate_learning_rate_ratio,
        "projector": settings.projector_learning_rate_ratio,
        "head": settings.head_learning_rate_ratio,
    }
    names = [name.split(".") for name, each in model.named_parameters() if each.requires_grad]
    trained = {next((part for part in ratios if part in name), None) for name in names}  # as `adamw` goes through them
    decays = {"ilora_gate": settings.gate_weight_decay, "projector": settings.projector_weight_decay}
    return adamw(
        model,
        settings.training.learning_rate,
        settings.training.weight_decay,
        {name: ratio for name, ratio in ratios.items() if name in trained},
        {name: decay for name, decay in decays.items() if name in trained and decay is not None},
    )
