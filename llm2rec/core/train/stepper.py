"""One optimizer step: forward and backward passes over its micro-batches, bad numbers, a GPU that is too small.

A step is done as a whole or not at all. What must not be (a loss or gradient that is not finite, memory that does not
suffice) shows before the weights change, and all that the passes have changed by then is put back: gradients, running
statistics, the state of the random generators.
"""

import gc
import logging
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from llm2rec.core.errors import ConfigError, NonFiniteError, OutOfMemoryError
from llm2rec.core.seed import random_state
from llm2rec.core.train.batching import OptimizerStep, micro_batch_count, optimizer_step
from llm2rec.core.train.checkpoint import trained_buffers
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.core.train.spikes import SpikeDetector
from llm2rec.core.train.zero import FrozenGroupStates

__all__ = ["MicroBatches", "Stepper"]

logger = logging.getLogger(__name__)
MicroBatches = Generator[tuple[NDArray[np.int64], dict[str, Tensor]], None, None]
"""For each micro-batch of a step: its training rows (example ids) and their losses by name, each of shape ``(B,)``;
``loss`` is what is minimised. What the backward pass needs must last until the next one is asked for."""
_REHEARSALS = 3  # steps of a launch: the first is without the optimizer's state, the next are not
_ROWS_TOLD = 50


class Stepper:
    """Takes optimizer steps.

    Args:
        accelerator: Of this launch.
        training: Batch sizes, clipping, and what to do about bad numbers.
        log: Takes scalars by name, and the step.
        lockstep: Whether processes wait for each other within passes, as those of a divided model do: one that is out
            of memory then ends the launch.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        training: TrainingSettings,
        log: Callable[[Mapping[str, float], int], None],
        lockstep: bool = False,
    ) -> None:
        self.accelerator, self.training, self._log = accelerator, training, log
        self.micro_batch_size, self.n_micro_batches = training.micro_batch_size, 1
        self.divide(training.micro_batch_size)
        self.resting, self._lockstep = frozenset[str](), lockstep
        self.undivided = ""
        """Setting that needs each step in one piece, if there is one."""
        self.skipped, self._rehearsals = 0, _REHEARSALS
        self._loss = SpikeDetector("loss", training.spike_ratio)
        self._norm = SpikeDetector("norm of the gradient", training.spike_ratio)

    def prepare(self, model: nn.Module, wrapped: nn.Module, optimizer: Any) -> None:
        """Take over what is to be trained: the model, and it and its optimizer as they are for this launch."""
        self._model, self._wrapped, self._optimizer = model, wrapped, optimizer
        self._deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None) is not None
        self._buffers: list[Tensor] | None = None
        if self._deepspeed and self.training.nonfinite == "skip":
            raise ConfigError(
                "`nonfinite` is 'skip', but DeepSpeed takes each step within its backward pass, where nothing can keep "
                "it back; use `nonfinite=stop`, or a launch configuration without DeepSpeed."
            )

    def divide(self, micro_batch_size: int) -> None:
        """Take steps in micro-batches of at most this many rows from now on."""
        self.micro_batch_size = micro_batch_size
        self.n_micro_batches = micro_batch_count(
            self.training.batch_size, micro_batch_size, self.accelerator.num_processes
        )
        # Set here, not in the accelerator's constructor, where the launcher's environment would win.
        self.accelerator.gradient_accumulation_steps = self.n_micro_batches

    def take(
        self, step: int, share: OptimizerStep, passes: Callable[[OptimizerStep], MicroBatches]
    ) -> dict[str, float] | None:
        """Take one step; a collective.

        Args:
            step: Global step, from 0.
            share: This process's rows.
            passes: Forward passes of a share. It may be called again, for the same rows in smaller micro-batches.

        Returns:
            Sums of the losses over this process's rows by name, or None if the step was skipped.

        Raises:
            NonFiniteError: If loss or gradient is not finite and steps are not, or no longer, to be skipped.
            OutOfMemoryError: If the step does not fit, however it is divided.
        """
        put_back = self._before()
        resting = (
            FrozenGroupStates(self._optimizer.optimizer, self.resting) if self._deepspeed and self.resting else None
        )
        divides = self.accelerator.num_processes > 1 and not self._deepspeed and not self._lockstep
        if divides and self._rehearsals > 0:
            share = self._rehearsed(step, share, passes, put_back)
        while True:
            outcome = self._attempt(share, passes)
            if not isinstance(outcome, str):
                break
            # Other processes may wait for our part of the gradients, and DeepSpeed has kept some of them.
            share = self._smaller(step, share, outcome, put_back, may=self.accelerator.num_processes == 1)
        if self._deepspeed and outcome.bad_rows:  # the others are on their way to exchange gradients
            self._skip_or_stop(step, outcome.bad_rows, "loss")
        n_bad, loss = self._over_processes(len(outcome.bad_rows), outcome.sums["loss"])
        norm = math.nan if n_bad else self._gradient_norm()
        if not math.isfinite(norm):
            put_back()
            self._skip_or_stop(step, outcome.bad_rows if n_bad else outcome.rows, "loss" if n_bad else self._norm.name)
            return None
        if resting is None:
            self._apply()
        else:  # DeepSpeed has stepped by now
            resting.put_back()
        self._watch(step, loss / share.n_rows, norm)
        return outcome.sums

    # Passes ---------------------------------------------------------------------------------------------------------

    def _attempt(
        self, share: OptimizerStep, passes: Callable[[OptimizerStep], MicroBatches], synchronised: bool = True
    ) -> "_Passed | str":
        """What the passes gave, or the message of a GPU that is out of memory.

        What this returns holds no traceback, whose frames would hold the memory.
        """
        try:
            return self._accumulate(share, passes, synchronised)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
                return ". ".join(str(error).split(". ")[:2])  # then come pages of advice
            raise

    def _accumulate(
        self, share: OptimizerStep, passes: Callable[[OptimizerStep], MicroBatches], synchronised: bool
    ) -> "_Passed":
        passed = _Passed({}, [], [])
        goes_on = self.accelerator.num_processes > 1 and not self._deepspeed  # others wait for our gradients
        self.accelerator.step = 0  # of its count of micro-batches; one that failed may have left some
        with closing(passes(share)) as micro_batches:
            for weights in share.weights:
                context = self.accelerator.accumulate if synchronised else self.accelerator.no_sync
                with context(self._wrapped):
                    rows, losses = next(micro_batches)
                    counted = torch.from_numpy(weights).to(self.accelerator.device)
                    own = {name: (values * counted).sum() for name, values in losses.items()}
                    if not passed.add(rows, {name: value.item() for name, value in own.items()}) and not goes_on:
                        break
                    # Accelerate and DeepSpeed divide by the number of micro-batches and average over ranks: undo both.
                    scale = self.accelerator.num_processes * self.n_micro_batches / share.n_rows
                    self.accelerator.backward(own["loss"] * scale)
        return passed

    def _before(self) -> Callable[[], None]:
        """Note what passes change; returns what puts it back."""
        if self._buffers is None:  # not before the model is where it is trained
            self._buffers = list(trained_buffers(self._model).values())
        buffers = self._buffers
        restore_random, values = random_state(), [buffer.clone() for buffer in buffers]

        def put_back() -> None:
            restore_random()
            for parameter in self._model.parameters():
                parameter.grad = None
            with torch.no_grad():
                for buffer, value in zip(buffers, values, strict=True):
                    buffer.copy_(value)

        return put_back

    # Memory ---------------------------------------------------------------------------------------------------------

    def _rehearsed(
        self,
        step: int,
        share: OptimizerStep,
        passes: Callable[[OptimizerStep], MicroBatches],
        put_back: Callable[[], None],
    ) -> OptimizerStep:
        """Try a step without any exchange of gradients, until it fits on all processes; nothing of it remains.

        A process that runs out of memory in the step itself would leave the others waiting for its gradients.
        """
        while True:
            outcome = self._attempt(share, passes, synchronised=False)
            n_failed, _ = self._over_processes(int(isinstance(outcome, str)), 0.0)
            if not n_failed:
                put_back()
                self._rehearsals -= 1
                return share
            message = outcome if isinstance(outcome, str) else "another process is out of memory"
            share = self._smaller(step, share, message, put_back)

    def _smaller(
        self, step: int, share: OptimizerStep, message: str, put_back: Callable[[], None], may: bool = True
    ) -> OptimizerStep:
        """Divide the work into smaller micro-batches, from this step on."""
        put_back()
        n_processes = self.accelerator.num_processes
        # Those of this very step, which may be smaller than others; over all processes, so that all come to the same.
        rows = -(-min(share.n_rows, self.training.batch_size) // (n_processes * self.n_micro_batches))
        told = f"out of memory at step {step} with micro-batches of {rows} rows ({message})"
        if self.undivided:
            raise OutOfMemoryError(f"{told}; {self.undivided} needs each step in one piece: lower `batch_size`.")
        if not may or self._deepspeed:
            raise OutOfMemoryError(f"{told}; resume with a smaller `micro_batch_size`, which gives the same results.")
        if rows == 1:
            raise OutOfMemoryError(
                f"{told}; use shorter histories, a smaller model, `gradient_checkpointing=true` or a smaller precision "
                "for a teacher, or a larger GPU."
            )
        self.divide((rows + 1) // 2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.accelerator.is_main_process:
            logger.warning(
                "%s; going on with %d. Steps keep their %d rows; from here on all is as with `micro_batch_size=%d`.",
                told, self.micro_batch_size, self.training.batch_size, self.micro_batch_size,
            )  # fmt: skip
        return optimizer_step(
            share.batch, self.n_micro_batches, self.accelerator.process_index, n_processes, share.sizes
        )

    # Numbers --------------------------------------------------------------------------------------------------------

    def _gradient_norm(self) -> float:
        """Norm over all gradients, the same on every process; they are clipped to the norm asked for."""
        if self._deepspeed:  # which has clipped and taken the step by now
            norm = self.accelerator.clip_grad_norm_(self._model.parameters(), self.training.max_grad_norm)
            return 0.0 if norm is None else float(norm)
        with_gradient = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
        total = get_total_norm([_values(parameter) for parameter in with_gradient])
        if self.training.max_grad_norm > 0 and torch.isfinite(total):
            clip_grads_with_norm_(with_gradient, self.training.max_grad_norm, total)
        return total.item()

    def _over_processes(self, count: int, value: float) -> tuple[int, float]:
        """Sums of a count and a value; a collective."""
        if self.accelerator.num_processes == 1:
            return count, value
        mine = torch.tensor([count, value], dtype=torch.float64, device=self.accelerator.device)
        n, total = self.accelerator.reduce(mine, reduction="sum").tolist()
        return round(n), total

    def _apply(self) -> None:
        for group in self._optimizer.param_groups:
            if group.get("name") in self.resting:
                for parameter in group["params"]:
                    parameter.grad = None  # which AdamW leaves out; a zero would move its averages on
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _skip_or_stop(self, step: int, rows: list[int], what: str) -> None:
        """Count a step as skipped, or stop; all processes do the same, and tell the same rows."""
        if self.accelerator.num_processes > 1 and not self._deepspeed:
            rows = gather_object(rows)
        told = f"the {what} is not finite at step {step}, over the training examples {_listed(rows)}"
        if self.training.nonfinite == "stop" or self._deepspeed or self.skipped >= self.training.max_skipped:
            already = f" {self.skipped} steps have been skipped already." if self.skipped else ""
            raise NonFiniteError(
                f"{told}; lower `learning_rate`, set `max_grad_norm`, or train in a wider number format. The last "
                f"checkpoint is untouched.{already}"
            )
        self.skipped += 1
        self._log({"train/skipped_steps": self.skipped}, step)
        if self.accelerator.is_main_process:
            logger.warning("%s; skipped (%d of at most %d)", told, self.skipped, self.training.max_skipped)

    def _watch(self, step: int, loss: float, norm: float) -> None:
        if not self.accelerator.is_main_process:
            return
        for name, watch, value in (("loss", self._loss, loss), ("grad_norm", self._norm, norm)):
            if watch.see(value, step):
                self._log({f"spike/{name}": value}, step)

    def scalars(self) -> dict[str, float]:
        """What there is to show of the last steps."""
        return {} if self._norm.median is None else {"train/grad_norm": self._norm.median}

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What to store in a checkpoint."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "skipped": self.skipped,
            "loss": self._loss.state(),
            "grad_norm": self._norm.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.divide(min(state["micro_batch_size"], self.training.micro_batch_size))
        self.skipped = state["skipped"]
        self._loss.restore(state["loss"])
        self._norm.restore(state["grad_norm"])


@dataclass
class _Passed:
    """What the passes of a step gave.

    Attributes:
        sums: Loss sums by name.
        rows: Training rows.
        bad_rows: Those of micro-batches whose loss is not finite.
    """

    sums: dict[str, float]
    rows: list[int]
    bad_rows: list[int]

    def add(self, rows: NDArray[np.int64], sums: dict[str, float]) -> bool:
        """Add a micro-batch; returns whether its loss is finite."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.rows += rows.tolist()
        is_finite = math.isfinite(sums["loss"])
        self.bad_rows += [] if is_finite else rows.tolist()
        return is_finite


def _values(parameter: nn.Parameter) -> Tensor:
    """The numbers of a gradient; those of a sparse one are summed up first, as its optimizer would."""
    gradient = parameter.grad
    assert gradient is not None, "only parameters with gradients are asked"
    if not gradient.is_sparse:
        return gradient
    parameter.grad = gradient.coalesce()
    return parameter.grad.values()


def _listed(rows: list[int]) -> str:
    told = sorted(set(rows))
    more = f" and {len(told) - _ROWS_TOLD} more" if len(told) > _ROWS_TOLD else ""
    return ", ".join(map(str, told[:_ROWS_TOLD])) + more
