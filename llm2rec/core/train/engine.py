"""The one abstraction over `accelerate.Accelerator` that teacher, student and distillation loops share.

It joins processes, prepares model and optimizer, accumulates, clips, logs, checkpoints and resumes. It knows no model
and no loss: a loop calls it, not the other way round.
"""

import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.errors import Interrupted
from llm2rec.core.files import read_json, replaced_folder, write_json
from llm2rec.core.logging import progress
from llm2rec.core.processes import Termination, agree, launch_hidden, process_arguments
from llm2rec.core.run import Run
from llm2rec.core.seed import seed_everything
from llm2rec.core.train.batching import OptimizerStep, epoch_batches, optimizer_step
from llm2rec.core.train.checkpoint import (
    load_optimizer,
    load_weights,
    optimizer_tensors,
    save_tensors,
    trainable_weights,
    trained_buffers,
)
from llm2rec.core.train.schedule import warmup_cosine
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.core.train.sharding import keep_out_of_exchange
from llm2rec.core.train.stepper import MicroBatches, Stepper
from llm2rec.core.train.trackers import TensorBoardWriter, Throughput, memory_in_use
from llm2rec.core.train.zero import configure

__all__ = ["Engine"]

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
Item = TypeVar("Item")


class Engine:
    """Runs training loops on one or many processes.

    Args:
        run: The run folder, for logs and checkpoints.
        seed: Seed of the run; each step and process derives its own from it.
        mixed_precision: ``no`` or ``bf16`` (autocast).
        training: Batch sizes, clipping and schedule; None for stages that do not train.
        tensorboard: Whether to write TensorBoard events.
        show_progress: Whether to draw progress bars.
        lockstep: Whether all processes go through all rows together wherever they would divide them: a model whose
            weights are divided needs each of its passes on every process.
    """

    def __init__(
        self,
        run: Run,
        *,
        seed: int,
        mixed_precision: str = "no",
        training: TrainingSettings | None = None,
        tensorboard: bool = True,
        show_progress: bool = True,
        lockstep: bool = False,
    ) -> None:
        self.run, self.lockstep = run, lockstep
        self.training = training or TrainingSettings()
        cpu, process_group = process_arguments()
        with launch_hidden():
            self.accelerator = Accelerator(
                cpu=cpu,
                mixed_precision=mixed_precision,
                kwargs_handlers=[
                    InitProcessGroupKwargs(**process_group),
                    DistributedDataParallelKwargs(broadcast_buffers=False),
                ],
            )
        self._board = TensorBoardWriter(run.folder / "tensorboard" if tensorboard and self.is_main else None)
        self._pace, self.has_tensorboard = Throughput(), tensorboard
        self._optimizer: Any = None
        self._stepper = Stepper(self.accelerator, self.training, self._board.scalars, lockstep)
        self.seed, self._show_progress = seed, show_progress
        self._termination, self._is_ending = Termination(), False
        seed_everything(seed)  # the same initial weights on every process

    # Processes ------------------------------------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def n_processes(self) -> int:
        """How many processes train together."""
        return self.accelerator.num_processes

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed divides the optimizer's state among processes."""
        return getattr(self.accelerator.state, "deepspeed_plugin", None) is not None

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return self.accelerator.device

    def first_process_first(self) -> AbstractContextManager[None]:
        """Let the first process prepare what the others then only load."""
        return self.accelerator.main_process_first()

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.accelerator.wait_for_everyone()

    def my_rows(self, n_rows: int) -> NDArray[np.int64]:
        """This process's block of ``range(n_rows)``; together the blocks hold every row once. In lockstep, all rows."""
        if self.lockstep:
            return np.arange(n_rows)
        share = math.ceil(n_rows / self.n_processes)
        return np.arange(min(self.rank * share, n_rows), min((self.rank + 1) * share, n_rows))

    def gather_rows(self, mine: Tensor, n_rows: int) -> Tensor:
        """Put the results of all blocks of `my_rows` together, on every process.

        Args:
            mine: Results of this process's block, shape ``(block, ...)``.
            n_rows: Number of rows over all processes.

        Returns:
            Results of shape ``(n_rows, ...)`` in row order.
        """
        if self.n_processes == 1 or self.lockstep:
            return mine
        share = math.ceil(n_rows / self.n_processes)
        padding = mine.new_zeros((share - len(mine), *mine.shape[1:]))  # a gather needs equal shapes
        gathered = self.accelerator.gather(torch.cat([mine, padding]).to(self.device))
        return cast(Tensor, gathered)[:n_rows].to(mine.device)

    def my_missing(self, files: list[Path]) -> list[int]:
        """This process's share of the files that are not there yet, as positions in ``files``; a collective.

        Work that is written file by file goes on where it stopped when it is divided like this. In lockstep, every
        process does and writes all of them alike.
        """
        missing = [number for number, file in enumerate(files) if not file.is_file()]
        self.wait()  # all processes have looked before any writes
        return missing if self.lockstep else missing[self.rank :: self.n_processes]

    # One training step ----------------------------------------------------------------------------------------------

    def prepare(self, model: Model, optimizer: torch.optim.Optimizer) -> tuple[Model, Any]:
        """Wrap model and optimizer for the processes and devices of this launch."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None:  # what DeepSpeed would read off a data loader, which we do not give it
            configure(plugin.deepspeed_config, model, self.training, self.n_micro_batches)
        if self.lockstep:
            keep_out_of_exchange(model)
        wrapped, prepared = self.accelerator.prepare(model, optimizer)
        self._optimizer = prepared
        self._stepper.prepare(model, wrapped, prepared)
        return cast(Model, wrapped), prepared

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches per process and step; more of them once a GPU has been too small."""
        return self._stepper.n_micro_batches

    def keep_undivided(self, reason: str) -> None:
        """Refuse to divide steps any further, since ``reason`` (a setting) needs each in one piece."""
        self._stepper.undivided = reason

    def max_steps(self, n_rows: int) -> int:
        """Optimizer steps of a whole training over ``n_rows`` rows."""
        return self.training.epochs * self.training.steps_per_epoch(n_rows)

    def steps(
        self,
        units: NDArray[np.int64],
        start: int = 0,
        lengths: NDArray[np.int64] | None = None,
        sizes: NDArray[np.int64] | None = None,
    ) -> Iterator[tuple[int, OptimizerStep]]:
        """Number and rows of each optimizer step, over all epochs; SIGTERM waits for the step it comes in meanwhile.

        Args:
            units: Row numbers to train on, or numbers of pieces of several rows, the same on every process.
            start: Steps already done.
            lengths: Tokens of each unit, to put units of similar length together; see `epoch_batches`.
            sizes: Rows of each unit by its number; None means 1 each.

        Yields:
            The step's number from 0 and this process's share of its rows.
        """
        settings = self.training
        per_epoch = settings.steps_per_epoch(len(units) if sizes is None else int(sizes[units].sum()))
        with self._termination.awaited():
            for epoch in range(start // per_epoch, settings.epochs):
                batches = epoch_batches(units, settings.batch_size, self.seed, epoch, lengths, sizes)
                for number, batch in enumerate(batches, epoch * per_epoch):
                    if number >= start:
                        yield number, optimizer_step(batch, self.n_micro_batches, self.rank, self.n_processes, sizes)

    def begin_step(self, step: int, max_steps: int, optimizer: Any, resting: Collection[str] = ()) -> float:
        """Seed dropout for global step ``step`` and set its learning rate.

        Args:
            step: Global step, from 0.
            max_steps: Steps of the whole training.
            optimizer: What `prepare` returned.
            resting: Names of parameter groups that this step leaves as they are, the optimizer's state of them too.

        Returns:
            The learning rate of now, before the ``lr_ratio`` that a group may carry.
        """
        seed_everything(self.seed, "step", step, self.rank)
        settings = self.training
        lr = warmup_cosine(
            step,
            max_steps=max_steps,
            warmup_steps=round(settings.warmup_ratio * max_steps),
            lr=settings.learning_rate,
            min_lr=settings.min_learning_rate_ratio * settings.learning_rate,
            warmup_start_lr=settings.warmup_start_ratio * settings.learning_rate,
        )
        self._stepper.resting = frozenset(resting)
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if group.get("name") in resting else lr * group.get("lr_ratio", 1.0)
        return lr

    def train_step(
        self, step: int, share: OptimizerStep, passes: Callable[[OptimizerStep], MicroBatches]
    ) -> dict[str, float] | None:
        """Follow the gradient of the mean loss of a step's rows, after `begin_step`; a collective.

        Args:
            step: Global step, from 0.
            share: This process's rows of it.
            passes: A generator of training rows and losses, for each micro-batch of a share; see `MicroBatches`. Where
                a GPU runs out of memory it is called again, with the same rows in smaller micro-batches.

        Returns:
            Sums of the losses over this process's rows by name, or None if the step was skipped.

        Raises:
            NonFiniteError: If loss or gradient is not finite and steps are not, or no longer, to be skipped; no
                gradient has been applied.
            OutOfMemoryError: If the step does not fit, however it is divided.
        """
        self.count(rows=share.n_rows)
        with self._pace.timed():
            return self._stepper.take(step, share, passes)

    # Telling --------------------------------------------------------------------------------------------------------

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars to TensorBoard."""
        self._board.scalars(values, step)

    def log_text(self, name: str, markdown: str, step: int = 0) -> None:
        """Write a text to TensorBoard."""
        self._board.text(name, markdown, step)

    def count(self, **amounts: int) -> None:
        """Note what a step gets done over all processes, such as ``tokens``, for the speed that TensorBoard shows."""
        self._pace.count(**amounts)

    def log_steps(self, step: int) -> None:
        """Write what there is to show of the last steps to TensorBoard: norms, learning rates, speed, memory.

        Learning rates are those of the optimizer's groups; ``rest`` is what has no name, and so no rate of its own.
        """
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        rates = {f"learning_rate/{group.get('name') or 'rest'}": float(group["lr"]) for group in groups}
        self.log(self._stepper.scalars() | rates | self._pace.scalars() | memory_in_use(self.device), step)

    def sum_over_processes(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums of this process's and all others' ``values``; a collective."""
        # In double precision, as Python adds, so that sums stored in a checkpoint go on exactly.
        mine = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, self.sum_tensor(mine).tolist(), strict=True))

    def sum_tensor(self, mine: Tensor) -> Tensor:
        """Sum of this process's and all others' tensor, of the same shape; a collective."""
        return cast(Tensor, self.accelerator.reduce(mine, reduction="sum"))

    def average_buffers(self, model: nn.Module) -> None:
        """Give every process the mean of the running statistics that each has gathered from its own rows; a collective.

        They are linear in what they have seen, so how often this is done changes nothing but rounding.
        """
        for buffer in trained_buffers(model).values():
            if buffer.is_floating_point():  # a count of batches is the same everywhere
                buffer.copy_(cast(Tensor, self.accelerator.reduce(buffer, reduction="mean")))

    def progress(
        self, iterable: Iterable[Item], description: str, total: int, unit: str = "step", initial: int = 0
    ) -> Iterator[Item]:
        """Iterate with a progress line on the first process; see `llm2rec.core.logging`."""
        shown = self._show_progress and self.is_main
        return progress(iterable, description, total, unit, initial=initial, shown=shown)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    @property
    def _checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first; a killed writer leaves only names that begin with a dot."""
        return sorted((self.run.folder / "checkpoints").glob("step_*"))

    def checkpoint_is_due(self, steps_done: int, n_rows: int) -> bool:
        """Whether to write a checkpoint after ``steps_done`` steps: as the settings say, and on SIGTERM; a collective.

        One process may have got the signal before the others: all of them end at the same step.
        """
        asked = torch.tensor(int(self._termination.is_asked), device=self.device)
        self._is_ending = bool(asked if self.n_processes == 1 else self.sum_tensor(asked))
        return self._is_ending or self.training.checkpoint_is_due(steps_done, n_rows)

    def save_checkpoint(self, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Write a checkpoint of now, then delete older ones; a collective.

        Args:
            model: The model as it was before `prepare`; its trained weights are stored.
            optimizer: Optimizer as `prepare` returned it.
            state: Plain values the loop needs to go on from here, ``step`` among them.

        Raises:
            Interrupted: If the run was asked to end; the checkpoint is there.
        """
        tensors = optimizer_tensors(model, optimizer.optimizer)
        self.average_buffers(model)  # those of the first process are stored
        if self.is_main:
            older = self._checkpoints
            target = self.run.folder / "checkpoints" / f"step_{state['step']:09d}"
            with replaced_folder(target) as folder:
                save_tensors(trainable_weights(model), folder / "model.safetensors")
                save_tensors(tensors, folder / "optimizer.safetensors")
                write_json(folder / "state.json", {**state, "steps": self._stepper.state()})
            for folder in [each for each in older if each != target][: -self.training.keep_checkpoints + 1 or None]:
                shutil.rmtree(folder)
        self.wait()
        if self._is_ending:
            raise Interrupted(
                f"SIGTERM came, and step {state['step']} is stored; go on from there with the same command and "
                f"`resume=` the run's folder ({self.run.folder.name})."
            )

    def load_checkpoint(self, model: nn.Module, optimizer: Any) -> dict[str, Any] | None:
        """Restore the run's newest checkpoint, if there is one.

        Args:
            model: The model as it was before `prepare`.
            optimizer: Optimizer as `prepare` returned it.

        Returns:
            The loop's state, or None for a fresh start.
        """
        folder: Path | None = agree(self._checkpoints[-1] if self._checkpoints else None)
        if folder is None:
            return None
        load_weights(model, folder / "model.safetensors")
        load_optimizer(model, optimizer.optimizer, folder / "optimizer.safetensors")
        logger.info("resuming at %s", folder.name)
        state = cast(dict[str, Any], read_json(folder / "state.json"))
        self._stepper.restore(state.pop("steps"))
        return state

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints of a finished run, whose best weights are kept elsewhere; the last thing a stage does.

        The run is marked first: killed in between, it would otherwise begin anew when resumed.
        """
        if self.is_main:
            self.run.note(status="finished")
            shutil.rmtree(self.run.folder / "checkpoints", ignore_errors=True)

    def close(self) -> None:
        """Flush logs and leave the process group."""
        self._board.close()
        self.accelerator.end_training()
