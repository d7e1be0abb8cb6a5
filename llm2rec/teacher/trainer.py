"""Train a teacher: what all objectives share, and the `item` objective. The loop is `llm2rec.core.train.loop`."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.train.batching import MicroBatch, OptimizerStep, TrainingUnits
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.loop import Validation, fit
from llm2rec.core.train.optimizer import adamw
from llm2rec.student.datamodule import SeenItems
from llm2rec.student.losses import cross_entropy
from llm2rec.teacher.dry_run import check_trained_tensors
from llm2rec.teacher.evaluator import rank_targets
from llm2rec.teacher.gate_cache import TeacherRows
from llm2rec.teacher.gates import GateMonitor, balance_losses, mean_gates
from llm2rec.teacher.ilora_model import ItemTeacher, LLMTeacher
from llm2rec.teacher.prompts import TokenBatch
from llm2rec.teacher.settings import TeacherSettings, is_hybrid

__all__ = ["ItemObjective", "TeacherObjective", "TeacherTask", "check_first_pass", "train_teacher"]

logger = logging.getLogger(__name__)
_PROMPTS_SHOWN = 3


class TeacherTask(Protocol):
    """What the `item` and the `title` objective differ in; `TeacherObjective` makes either an `Objective` to train on.

    Attributes:
        train: Rows to train on.
        validation: Rows for early stopping.
        knows_lengths: Whether ``train.token_counts`` are the lengths of whole prompts, for the throughput in tokens.
    """

    train: TeacherRows
    validation: TeacherRows
    knows_lengths: bool

    def losses(self, wrapped: nn.Module, micro: NDArray[np.int64], *, hybrid: bool, epoch: int) -> Tensor:
        """Losses of a micro-batch; the gates of its rows are in use meanwhile.

        Args:
            wrapped: The teacher as `Engine.prepare` returned it.
            micro: Positions in ``train.rows``, shape ``(B,)``.
            hybrid: Whether prompts carry injected vectors.
            epoch: Epoch, from 0.

        Returns:
            One loss per row, shape ``(B,)``, float32.
        """

    def validate(self) -> dict[str, float]:
        """Validation metrics by name; a collective."""

    def prompts(self, n: int) -> TokenBatch:
        """Prompts of the first ``n`` training rows, answers included, for the log."""


class TeacherObjective:
    """The objective of a teacher: the loss of its task, and the load balance of its experts.

    ``L = L_task + balance_loss · L_balance``

    Args:
        model: The teacher, not wrapped.
        task: The `item` or `title` objective, and its rows.
        engine: Processes.
        settings: Curriculum, load balance, refresh of the titles' vectors.
    """

    def __init__(self, model: LLMTeacher, task: TeacherTask, engine: Engine, settings: TeacherSettings) -> None:
        self.model, self.task, self.engine, self.settings = model, task, engine, settings
        n_rows = len(task.train.rows)
        self.units = TrainingUnits(np.arange(n_rows), lengths=task.train.token_counts)
        self._n_steps, self._hybrid = engine.max_steps(n_rows), False
        self._expert_use: Tensor | None = None  # (E,) or (G, E): mean gates of the step
        self._monitor = GateMonitor(model, task.validation.gate_inputs, engine)

    def begin_step(self, step: OptimizerStep) -> Collection[str]:
        """See `Objective.begin_step`: refreshes the titles' vectors, and decides whether prompts are hybrid."""
        settings, model, train = self.settings, self.model, self.task.train
        if settings.item_refresh_steps and step.number > 0 and step.number % settings.item_refresh_steps == 0:
            self.engine.average_buffers(model)  # gates with running statistics take part
            model.refresh_titles()
        if settings.balance_loss > 0:
            self._expert_use = mean_gates(model, train.gate_inputs, step, self.engine)
        if self.task.knows_lengths:
            self.engine.count(tokens=int(train.token_counts[step.units].sum()))
        epoch_start = step.epoch * self.engine.training.steps_per_epoch(self.units.n_rows)
        curriculum = settings.curriculum, step.number, self._n_steps, self.engine.seed, epoch_start
        self._hybrid = model.is_hybrid and is_hybrid(*curriculum)
        return () if self._hybrid else ("projector",)

    @contextmanager
    def losses(self, model: nn.Module, micro: MicroBatch) -> Iterator[dict[str, Tensor]]:
        """See `Objective.losses`; the gates are in use until the context closes, after the backward pass."""
        gate_input = torch.from_numpy(self.task.train.gate_inputs[micro.units]).to(self.engine.device)
        with self.model.use_gates(gate_input) as gates:
            losses = {"loss": self.task.losses(model, micro.units, hybrid=self._hybrid, epoch=micro.epoch)}  # (B,)
            if self._expert_use is not None and gates is not None:
                losses |= {"loss_task": losses["loss"], "loss_balance": balance_losses(gates, self._expert_use)}
                losses["loss"] = losses["loss_task"] + self.settings.balance_loss * losses["loss_balance"]
            yield losses

    def example_ids(self, micro: MicroBatch) -> NDArray[np.int64]:
        """See `Objective.example_ids`."""
        return self.task.train.rows[micro.units]

    def validate(self, step: int) -> Validation:
        """See `Objective.validate`."""
        metrics = self.task.validate()
        scalars = {"hybrid": float(self._hybrid)} if self.model.is_hybrid else {}
        # Validation is hybrid: before prompts are, it says little about what is being learnt.
        uses_patience = self.settings.curriculum != "two_stage" or self._hybrid
        return Validation(metrics, scalars | self._monitor.measure(step), uses_patience)


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
        """See `TeacherTask.losses`."""
        data, rows = self.train.data, self.train.rows[micro]
        targets = data.batch(rows, self.engine.device).targets
        inputs = self.model.read(*data.histories(rows), hybrid=hybrid)
        logits = wrapped(**vars(inputs), keep=targets)  # (B, N)
        return cross_entropy(logits, targets)

    def validate(self) -> dict[str, float]:
        """See `TeacherTask.validate`."""
        return ranking_metrics(rank_targets(self.model, self.validation, self.engine, seen=self.seen))

    def prompts(self, n: int) -> TokenBatch:
        """See `TeacherTask.prompts`."""
        data, rows = self.train.data, self.train.rows[:n]
        history, lengths = data.histories(rows)
        return self.model.prompts.histories(history, lengths, hybrid=self.model.is_hybrid)


def train_teacher(
    model: LLMTeacher, task: TeacherTask, engine: Engine, settings: TeacherSettings, select_on: str = "ndcg@10"
) -> None:
    """Train what the teacher has to train; keep the weights that validate best. It ends in evaluation mode.

    A teacher without trainable parameters, such as one of ``tuning=none`` that scores by titles, stays as it is.

    Args:
        model: The teacher with fresh weights, not wrapped; its base is frozen.
        task: The `item` or `title` objective, and its rows.
        engine: Processes and run folder; see `llm2rec.core.train.loop.fit`.
        settings: Learning rates, curriculum, load balance; length and batch are the engine's.
        select_on: Validation metric that selects the weights.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        logger.info("no trainable parameters: `teacher.tuning` is %r and the head has no weights", settings.tuning)
        model.eval()
        return
    if not engine.has_checkpoint:
        shown = model.prompts.readable(task.prompts(_PROMPTS_SHOWN))
        engine.log_text("prompts", "\n\n".join(f"    {prompt}" for prompt in shown))  # indented: not to be rendered
    objective = TeacherObjective(model, task, engine, settings)
    check_first_pass(model, task, engine)
    fit(model, objective, engine, _optimizer(model, settings), description="teacher", select_on=select_on)


def check_first_pass(model: LLMTeacher, task: TeacherTask, engine: Engine) -> None:
    """Raise if trained tensors take no part in the loss; see `check_trained_tensors`. Reads the shortest row."""
    shortest = int(task.train.token_counts.argmin())

    @contextmanager
    def loss(n_copies: int) -> Iterator[Tensor]:
        rows = np.full(n_copies, shortest)
        with model.use_gates(torch.from_numpy(task.train.gate_inputs[rows]).to(engine.device)):
            with engine.accelerator.autocast():
                value = task.losses(model, rows, hybrid=model.is_hybrid, epoch=0).sum()
            yield value

    check_trained_tensors(model, loss, model.model_type, engine.n_processes)


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
