"""Exceptions of an optimizer step: out-of-memory errors, numbers that are not finite, frozen parameter groups.

A step is atomic. Non-finite losses or gradients and out-of-memory errors are detected before the weights change, and
everything that the passes have changed by then is restored: gradients, running statistics, random states.
"""

import gc
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from llm2rec.core.errors import ConfigError, NonFiniteError, OutOfMemoryError
from llm2rec.core.seed import random_state
from llm2rec.core.train.batching import MicroBatch, OptimizerStep, micro_batch_count, micro_batches
from llm2rec.core.train.checkpoint import trained_buffers
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.core.train.sharding import FrozenGroupStates
from llm2rec.core.train.trackers import SpikeDetector

__all__ = ["Attempt", "Stepper"]

logger = logging.getLogger(__name__)
_DRY_RUNS = 3  # steps per launch; the first has no optimizer state yet
_MAX_IDS = 50  # listed in an error message


class _NamesExamples(Protocol):
    def example_ids(self, micro: MicroBatch) -> NDArray[np.int64]: ...


class Attempt:
    """Attempt at the forward and backward passes of a step. As a context, it catches out-of-memory errors.

    Args:
        stepper: The stepper.
        step: The step.
        synchronised: Whether processes exchange gradients in the last micro-batch; False for a dry run.

    Attributes:
        micro_batches: This process's micro-batches.
        scale: Factor on the sum of a micro-batch's losses that gives the mean over the rows of the step.
        sums: Sums of the losses over this process's rows by name, float64, on the device.
        finite: Whether each micro-batch's loss is finite, on the device.
        error: Message of an out-of-memory error, or None.
    """

    def __init__(self, stepper: "Stepper", step: OptimizerStep, synchronised: bool) -> None:
        self._stepper, self._accelerator, self._synchronised = stepper, stepper.accelerator, synchronised
        n_processes = self._accelerator.num_processes
        self.micro_batches = micro_batches(step, stepper.n_micro_batches, self._accelerator.process_index, n_processes)
        self.scale = n_processes * stepper.n_micro_batches / step.n_rows
        self.sums, self.finite = dict[str, Tensor](), list[Tensor]()
        self.error: str | None = None

    def __enter__(self) -> Self:
        self._accelerator.step = 0  # reset the count of micro-batches after a failed attempt
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error or ""):
            # Keep the text only: a traceback references frames, and these the memory.
            self.error = ". ".join(str(error).split(". ")[:2])  # the rest is generic advice
            return True
        return False

    def accumulate(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Context of a micro-batch: processes exchange gradients in the last one, and never in a dry run."""
        return self._accelerator.accumulate(wrapped) if self._synchronised else self._accelerator.no_sync(wrapped)

    def sum_over_rows(self, micro: MicroBatch, losses: Mapping[str, Tensor]) -> Tensor:
        """Sum the losses of a micro-batch's rows and add the sums to those of the step.

        Args:
            micro: The micro-batch, B rows.
            losses: Losses by name, each of shape ``(B,)``.

        Returns:
            Sum of ``loss``, with its gradient.
        """
        weights = torch.from_numpy(micro.weights).to(self._accelerator.device)
        sums = {name: (values * weights).sum() for name, values in losses.items()}
        for name, value in sums.items():
            added = value.detach().double()
            self.sums[name] = self.sums[name] + added if name in self.sums else added
        self.finite.append(torch.isfinite(sums["loss"].detach()))
        if self._stepper.uses_deepspeed and len(self.finite) == len(self.micro_batches):
            self._stepper.check_before_deepspeed_steps(self)
        return sums["loss"]


class Stepper:
    """Exception handling of `llm2rec.core.train.loop.train_step`.

    Args:
        accelerator: Accelerator of this launch.
        training: Batch sizes, clipping, and the handling of non-finite numbers.
        log: Logs scalars by name at a step.
        lockstep: Whether processes wait for each other within passes, as with a sharded model; running out of memory
            then ends the launch.

    Attributes:
        micro_batch_size: Maximum rows per micro-batch; decreases when memory runs out.
        n_micro_batches: Micro-batches per process and step.
        whole_steps: Setting that requires one micro-batch per step, or an empty string.
        skipped: Number of skipped steps.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        training: TrainingSettings,
        log: Callable[[Mapping[str, float], int], None],
        lockstep: bool = False,
    ) -> None:
        self.accelerator, self.training, self._log, self._lockstep = accelerator, training, log, lockstep
        self.micro_batch_size, self.n_micro_batches, self.whole_steps = training.micro_batch_size, 1, ""
        self.set_micro_batch_size(training.micro_batch_size)
        self.skipped, self._dry_runs = 0, _DRY_RUNS
        self._loss = SpikeDetector("loss", training.spike_ratio)
        self._norm = SpikeDetector("gradient norm", training.spike_ratio)

    def prepare(self, model: nn.Module, optimizer: Any) -> None:
        """Set the unwrapped model and its optimizer as `Engine.prepare` returns it."""
        self._model, self._optimizer = model, optimizer
        self.uses_deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None) is not None
        self._buffers: list[Tensor] | None = None
        if self.uses_deepspeed and self.training.nonfinite == "skip":
            raise ConfigError(
                "`nonfinite` is 'skip', but DeepSpeed updates the weights within its backward pass and cannot skip a "
                "step; use `nonfinite=stop`, or a launch configuration without DeepSpeed."
            )

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """Use micro-batches of at most this many rows from now on."""
        self.micro_batch_size = micro_batch_size
        self.n_micro_batches = micro_batch_count(
            self.training.batch_size, micro_batch_size, self.accelerator.num_processes
        )
        # In the accelerator's constructor the launcher's environment would take precedence.
        self.accelerator.gradient_accumulation_steps = self.n_micro_batches

    # Attempts -------------------------------------------------------------------------------------------------------

    def attempts(self, step: OptimizerStep, objective: _NamesExamples, frozen: Collection[str]) -> Iterator[Attempt]:
        """Yield attempts at a step until one fits into memory; retries use smaller micro-batches.

        With several processes the first steps of a launch begin with a dry run without gradient exchange, because a
        process that ran out of memory in the step itself would leave the others waiting.

        Args:
            step: The step.
            objective: Provides the example ids of a micro-batch.
            frozen: Names of parameter groups that are frozen in this step.

        Raises:
            OutOfMemoryError: If the step does not fit with any micro-batch size.
        """
        self._step, self._objective, self._frozen = step, objective, frozenset(frozen)
        self._note_state()
        self._frozen_states = (
            FrozenGroupStates(self._optimizer.optimizer, self._frozen) if self.uses_deepspeed and frozen else None
        )
        several = self.accelerator.num_processes > 1
        while several and not self.uses_deepspeed and not self._lockstep and self._dry_runs > 0:
            yield (attempt := Attempt(self, step, synchronised=False))
            if self._sum_over_processes(float(attempt.error is not None)):
                self._use_smaller_micro_batches(attempt.error or "another process is out of memory")
            else:
                self._restore_state()
                self._dry_runs -= 1
                break
        while True:
            self._attempt = Attempt(self, step, synchronised=True)
            yield self._attempt
            if self._attempt.error is None:
                return
            # Other processes may wait for this one's gradients, and DeepSpeed has accumulated some of them.
            self._use_smaller_micro_batches(self._attempt.error, possible=not several and not self.uses_deepspeed)

    @property
    def losses(self) -> dict[str, Tensor]:
        """Sums of the step's losses over this process's rows by name, on the device."""
        return self._attempt.sums

    def _note_state(self) -> None:
        """Save buffers and random states, which the passes change."""
        if self._buffers is None:  # only now is the model on its device
            self._buffers = list(trained_buffers(self._model).values())
        self._restore_random, self._values = random_state(), [buffer.clone() for buffer in self._buffers]

    def _restore_state(self) -> None:
        self._restore_random()
        for parameter in self._model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for buffer, value in zip(self._buffers or [], self._values, strict=True):
                buffer.copy_(value)

    def _use_smaller_micro_batches(self, message: str, possible: bool = True) -> None:
        """Halve the micro-batches from this step on."""
        self._restore_state()
        step, n_processes = self._step, self.accelerator.num_processes
        # Rows of this step, which may be smaller than others; computed over all processes, so that all agree.
        rows = -(-min(step.n_rows, self.training.batch_size) // (n_processes * self.n_micro_batches))
        failed = f"out of memory at step {step.number} with micro-batches of {rows} rows ({message})"
        if self.whole_steps:
            raise OutOfMemoryError(f"{failed}; {self.whole_steps} needs one micro-batch per step: lower `batch_size`.")
        if not possible:
            raise OutOfMemoryError(f"{failed}; resume with a smaller `micro_batch_size`, which gives the same results.")
        if rows == 1:
            raise OutOfMemoryError(
                f"{failed}; use shorter histories, a smaller model, `gradient_checkpointing=true` or a lower precision "
                "for a teacher, or a larger GPU."
            )
        self.set_micro_batch_size((rows + 1) // 2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.accelerator.is_main_process:
            logger.warning(
                "%s; retrying with micro_batch_size=%d; the effective batch size stays %d",
                failed, self.micro_batch_size, self.training.batch_size,
            )  # fmt: skip

    # Numbers --------------------------------------------------------------------------------------------------------

    def clip_gradients(self) -> None:
        """Clip all gradients to `TrainingSettings.max_grad_norm`; the norm stays on the device."""
        max_norm = self.training.max_grad_norm
        if self.uses_deepspeed:  # has already clipped gradients and updated weights
            norm = self.accelerator.clip_grad_norm_(self._model.parameters(), max_norm)
            self._total = torch.as_tensor(0.0 if norm is None else norm)
            return
        with_gradient = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
        self._total = get_total_norm([_values(parameter) for parameter in with_gradient])
        if max_norm > 0:
            clip_grads_with_norm_(with_gradient, max_norm, self._total)

    def is_finite(self) -> bool:
        """Whether losses and gradients of the step are finite on all processes; if not, undo the step.

        This is the only synchronisation of host and device in a step.

        Raises:
            NonFiniteError: If they are not finite and the step may not be skipped.
        """
        attempt, device = self._attempt, self.accelerator.device
        mine = torch.stack([(~torch.stack(attempt.finite)).sum().double(), attempt.sums["loss"]])
        if self.accelerator.num_processes > 1:
            mine = self.accelerator.reduce(mine, reduction="sum")
        n_bad, loss, norm = torch.cat([mine, self._total.to(device).double().reshape(1)]).tolist()
        if n_bad or not np.isfinite(norm):
            self._restore_state()
            self._skip_or_stop("loss" if n_bad else self._norm.name, only_bad=bool(n_bad))
            return False
        if self.accelerator.is_main_process:
            for name, detector, value in (
                ("loss", self._loss, loss / self._step.n_rows),
                ("grad_norm", self._norm, norm),
            ):
                if detector.add(value, self._step.number):
                    self._log({f"spike/{name}": value}, self._step.number)
        return True

    def check_before_deepspeed_steps(self, attempt: Attempt) -> None:
        """Check losses before DeepSpeed's last backward pass, which updates the weights.

        Raises:
            NonFiniteError: If a loss is not finite.
        """
        if not bool(torch.stack(attempt.finite).all()):
            self._attempt = attempt
            self._skip_or_stop("loss", only_bad=True)

    def _skip_or_stop(self, what: str, *, only_bad: bool) -> None:
        """Skip the step or raise, the same on all processes and with the same example ids."""
        attempt = self._attempt
        ids = [
            example
            for micro, finite in zip(attempt.micro_batches, attempt.finite, strict=True)
            if not (only_bad and bool(finite))
            for example in self._objective.example_ids(micro).tolist()
        ]
        if self.accelerator.num_processes > 1 and not self.uses_deepspeed:
            ids = gather_object(ids)
        message = f"the {what} is not finite at step {self._step.number}, over the training examples {_listed(ids)}"
        if self.training.nonfinite == "stop" or self.uses_deepspeed or self.skipped >= self.training.max_skipped:
            already = f" {self.skipped} steps have been skipped already." if self.skipped else ""
            raise NonFiniteError(
                f"{message}; lower `learning_rate`, set `max_grad_norm`, or train in a wider number format. The last "
                f"checkpoint is unchanged.{already}"
            )
        self.skipped += 1
        self._log({"train/skipped_steps": self.skipped}, self._step.number)
        if self.accelerator.is_main_process:
            logger.warning("%s; skipped (%d of at most %d)", message, self.skipped, self.training.max_skipped)

    def keep_frozen_groups(self) -> None:
        """Keep weights and optimizer state of the parameter groups that are frozen in this step."""
        if self.uses_deepspeed:  # it has already updated all groups, and keeps gradients in buffers of its own
            if self._frozen_states is not None:
                self._frozen_states.restore()
            return
        for group in self._optimizer.param_groups:
            if group.get("name") in self._frozen:
                for parameter in group["params"]:
                    parameter.grad = None  # AdamW skips it; a zero gradient would change its averages

    def _sum_over_processes(self, value: float) -> float:
        mine = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(mine, reduction="sum"))

    def scalars(self) -> dict[str, float]:
        """Scalars of the last steps, for logging."""
        return {} if self._norm.median is None else {"train/grad_norm": self._norm.median}

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """State for checkpoints."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "skipped": self.skipped,
            "loss": self._loss.to_dict(),
            "grad_norm": self._norm.to_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of `to_dict`."""
        self.set_micro_batch_size(min(state["micro_batch_size"], self.training.micro_batch_size))
        self.skipped = state["skipped"]
        self._loss.restore(state["loss"])
        self._norm.restore(state["grad_norm"])


def _values(parameter: nn.Parameter) -> Tensor:
    """Values of a gradient; a sparse gradient is coalesced first."""
    gradient = parameter.grad
    assert gradient is not None, "only parameters with gradients"
    if not gradient.is_sparse:
        return gradient
    parameter.grad = gradient.coalesce()
    return parameter.grad.values()


def _listed(ids: list[int]) -> str:
    distinct = sorted(set(ids))
    more = f" and {len(distinct) - _MAX_IDS} more" if len(distinct) > _MAX_IDS else ""
    return ", ".join(map(str, distinct[:_MAX_IDS])) + more
