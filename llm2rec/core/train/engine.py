"""Engine of all stages: a layer over `accelerate.Accelerator` for processes, logging and checkpoints.

It is independent of models and losses; the training loop is `llm2rec.core.train.loop`.
"""

import logging
import math
import shutil
import signal
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.errors import Interrupted
from llm2rec.core.files import read_json, replaced_folder, storage_errors, write_json
from llm2rec.core.logging import Progress, progress
from llm2rec.core.processes import Termination, agree, launch_hidden, process_arguments
from llm2rec.core.run import Run
from llm2rec.core.seed import seed_everything
from llm2rec.core.train.batching import MicroBatch, OptimizerStep, TrainingUnits, epoch_batches, micro_batches
from llm2rec.core.train.checkpoint import (
    load_optimizer,
    load_weights,
    optimizer_tensors,
    save_tensors,
    trainable_weights,
    trained_buffers,
)
from llm2rec.core.train.optimizer import warmup_cosine
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.core.train.sharding import complete_deepspeed_config, exclude_frozen_from_ddp, full_numel
from llm2rec.core.train.stepper import Stepper
from llm2rec.core.train.trackers import Throughput, memory_in_use

__all__ = ["Engine"]

logger = logging.getLogger(__name__)
_ENDING = {int(signal.SIGINT): "Ctrl-C", int(signal.SIGTERM): "SIGTERM"}
Model = TypeVar("Model", bound=nn.Module)
Item = TypeVar("Item")


class Engine:
    """Processes, batches, logging and checkpoints of a run.

    Args:
        run: The run folder, for logs and checkpoints.
        seed: Seed of the run; each step and process derives its own from it.
        mixed_precision: ``no`` or ``bf16`` (autocast).
        training: Batch sizes, clipping and schedule; None for stages that do not train.
        tensorboard: Whether to log to TensorBoard.
        lockstep: Whether every process computes all rows instead of its share, which a model with sharded weights
            requires, since each of its passes runs on all processes.
        finish: Whether to end training where the run's newest checkpoint is, with the best weights so far.
    """

    def __init__(
        self,
        run: Run,
        *,
        seed: int,
        mixed_precision: str = "no",
        training: TrainingSettings | None = None,
        tensorboard: bool = True,
        lockstep: bool = False,
        finish: bool = False,
    ) -> None:
        self.run, self.lockstep, self.finish = run, lockstep, finish
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
                log_with="tensorboard" if tensorboard else None,
                project_dir=run.folder,
            )
        if tensorboard:
            with storage_errors(run.folder):
                self.accelerator.init_trackers("tensorboard")
        self._throughput, self.has_tensorboard = Throughput(), tensorboard
        self._optimizer: Any = None
        self.learning_rate = 0.0
        self.stepper = Stepper(self.accelerator, self.training, self.log, lockstep)
        self.seed = seed
        self._termination, self._ending = Termination(), cast(int | None, None)
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
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed shards the optimizer state among processes."""
        return getattr(self.accelerator.state, "deepspeed_plugin", None) is not None

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    def first_process_first(self) -> AbstractContextManager[None]:
        """Context that the first process runs before the others, which then find its files."""
        return self.accelerator.main_process_first()

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def my_rows(self, n_rows: int) -> NDArray[np.int64]:
        """This process's block of ``range(n_rows)``; the blocks partition the rows. In lockstep, all rows."""
        if self.lockstep:
            return np.arange(n_rows)
        share = math.ceil(n_rows / self.n_processes)
        return np.arange(min(self.rank * share, n_rows), min((self.rank + 1) * share, n_rows))

    def gather_rows(self, mine: Tensor, n_rows: int) -> Tensor:
        """Concatenate the results of all blocks of `my_rows`, on every process.

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
        """This process's share of the missing files, as positions in ``files``; a collective.

        An interrupted stage that writes file by file resumes this way. In lockstep, every process computes all files.
        """
        missing = [number for number, file in enumerate(files) if not file.is_file()]
        self.wait()  # no process writes before all have listed the files
        return missing if self.lockstep else missing[self.rank :: self.n_processes]

    # Training -------------------------------------------------------------------------------------------------------

    def prepare(self, model: Model, optimizer: torch.optim.Optimizer) -> tuple[Model, Any]:
        """Wrap model and optimizer for the processes and devices of this launch."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None:  # DeepSpeed would read these values from a data loader
            complete_deepspeed_config(plugin.deepspeed_config, model, self.training, self.n_micro_batches)
        if self.lockstep:
            exclude_frozen_from_ddp(model)
        wrapped, self._optimizer = self.accelerator.prepare(model, optimizer)
        self.stepper.prepare(model, self._optimizer)
        return cast(Model, wrapped), self._optimizer

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches per process and step; increases when a GPU runs out of memory."""
        return self.stepper.n_micro_batches

    def max_steps(self, n_rows: int) -> int:
        """Optimizer steps of the whole training over ``n_rows`` rows."""
        return self.training.epochs * self.training.steps_per_epoch(n_rows)

    def steps(self, units: TrainingUnits, start: int = 0) -> Iterator[OptimizerStep]:
        """Effective batches of all optimizer steps, over all epochs; defers SIGTERM and Ctrl-C to the end of a step.

        Args:
            units: Training rows, the same on every process.
            start: Finished steps.

        Yields:
            The steps, in order.
        """
        settings, sizes = self.training, units.sizes
        per_epoch = settings.steps_per_epoch(units.n_rows)
        with self._termination.awaited():
            for epoch in range(start // per_epoch, settings.epochs):
                batches = epoch_batches(units, settings.batch_size, self.seed, epoch)
                for number, batch in enumerate(batches, epoch * per_epoch):
                    if number >= start:
                        n_rows = len(batch) if sizes is None else int(sizes[batch].sum())
                        yield OptimizerStep(number, epoch, batch, n_rows, sizes)

    def micro_batches(self, step: OptimizerStep) -> list[MicroBatch]:
        """This process's micro-batches of a step."""
        return micro_batches(step, self.n_micro_batches, self.rank, self.n_processes)

    def begin_step(self, step: int, n_steps: int, optimizer: Any, frozen: Collection[str] = ()) -> None:
        """Seed dropout for global step ``step`` and set its learning rates.

        Args:
            step: Global step, from 0.
            n_steps: Steps of the whole training.
            optimizer: Optimizer as `prepare` returned it.
            frozen: Names of parameter groups that are frozen in this step.
        """
        seed_everything(self.seed, "step", step, self.rank)
        settings = self.training
        self.learning_rate = warmup_cosine(
            step,
            max_steps=n_steps,
            warmup_steps=round(settings.warmup_ratio * n_steps),
            lr=settings.learning_rate,
            min_lr=settings.min_learning_rate_ratio * settings.learning_rate,
            warmup_start_lr=settings.warmup_start_ratio * settings.learning_rate,
        )
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if group.get("name") in frozen else self.learning_rate * group.get("lr_ratio", 1.0)

    @contextmanager
    def timed(self, step: OptimizerStep) -> Iterator[None]:
        """Time a step, for logging throughput."""
        self.count(rows=step.n_rows)
        with self._throughput.timed():
            yield

    def parameter_counts(self, model: nn.Module) -> tuple[int, int]:
        """Number of trainable parameters and of all parameters of a model."""
        sizes = [(full_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
        return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)

    # Logging --------------------------------------------------------------------------------------------------------

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars to the run's tracker."""
        with storage_errors(self.run.folder):
            self.accelerator.log(dict(values), step)

    def log_text(self, name: str, markdown: str, step: int = 0) -> None:
        """Log a text, which TensorBoard renders as Markdown."""
        with storage_errors(self.run.folder):
            self.accelerator.log({name: markdown}, step)

    def count(self, **amounts: int) -> None:
        """Add amounts of a step over all processes, such as ``tokens``, for logging throughput."""
        self._throughput.count(**amounts)

    def log_steps(self, step: int) -> None:
        """Log gradient norm, learning rates, throughput and memory of the last steps.

        There is one learning rate per parameter group; the group without a name is logged as ``rest``.
        """
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        rates = {f"learning_rate/{group.get('name') or 'rest'}": float(group["lr"]) for group in groups}
        self.log(self.stepper.scalars() | rates | self._throughput.scalars() | memory_in_use(self.device), step)

    def sum_over_processes(self, values: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Sums of ``values`` over all processes; a collective."""
        # In double precision, like Python floats, so that sums from a checkpoint resume exactly.
        if not values:
            return {}
        tensors = [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values.values()]
        return dict(zip(values, self.sum_tensor(torch.stack(tensors)).tolist(), strict=True))

    def sum_tensor(self, mine: Tensor) -> Tensor:
        """Sum of a tensor over all processes; a collective."""
        return cast(Tensor, self.accelerator.reduce(mine, reduction="sum"))

    def average_buffers(self, model: nn.Module) -> None:
        """Average running statistics over processes, each of which updates them from its rows; a collective.

        Running statistics are linear in their inputs, so the frequency of averaging affects only rounding.
        """
        for buffer in trained_buffers(model).values():
            if buffer.is_floating_point():  # counts of batches are equal on all processes
                buffer.copy_(cast(Tensor, self.accelerator.reduce(buffer, reduction="mean")))

    def progress(
        self,
        iterable: Iterable[Item],
        description: str,
        total: int,
        unit: str = "step",
        initial: int = 0,
        at_most: bool = False,
    ) -> Iterator[Item]:
        """Iterate with a progress line on the first process; see `llm2rec.core.logging`."""
        return progress(iterable, description, total, unit, initial=initial, at_most=at_most)

    def rows_progress(self, description: str, n_rows: int) -> Progress:
        """Context with the progress of rows scored in batches, on the first process."""
        return Progress(description, n_rows, "row")

    # Checkpoints ----------------------------------------------------------------------------------------------------

    @property
    def _checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first; incomplete ones have names that begin with a dot."""
        return sorted((self.run.folder / "checkpoints").glob("step_*"))

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run resumes from a checkpoint; a collective."""
        return bool(agree(bool(self._checkpoints)))

    def checkpoint_is_due(self, steps_done: int, n_rows: int) -> bool:
        """Whether to write a checkpoint after ``steps_done`` steps: by the settings, or on a signal; a collective.

        If any process has received a signal, all of them stop at the same step.
        """
        ending = [number in self._termination.received for number in _ENDING]
        if self.n_processes > 1:
            ending = self.sum_tensor(torch.tensor(ending, dtype=torch.int64, device=self.device)).bool().tolist()
        self._ending = next((number for number, received in zip(_ENDING, ending, strict=True) if received), None)
        return self._ending is not None or self.training.checkpoint_is_due(steps_done, n_rows)

    def save_checkpoint(self, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Write a checkpoint, then delete older ones; a collective.

        Args:
            model: The unwrapped model; its trained weights are saved.
            optimizer: Optimizer as `prepare` returned it.
            state: Plain values of the training state, including ``step``.

        Raises:
            Interrupted: If the run has received a signal, after writing the checkpoint.
        """
        tensors = optimizer_tensors(model, optimizer.optimizer)
        self.average_buffers(model)  # the first process saves its buffers
        if self.is_main:
            older = self._checkpoints
            target = self.run.folder / "checkpoints" / f"step_{state['step']:09d}"
            with replaced_folder(target) as folder:
                save_tensors(trainable_weights(model), folder / "model.safetensors")
                save_tensors(tensors, folder / "optimizer.safetensors")
                write_json(folder / "state.json", {**state, "steps": self.stepper.to_dict()})
            for folder in [each for each in older if each != target][: -self.training.keep_checkpoints + 1 or None]:
                shutil.rmtree(folder)
        self.wait()
        if self._ending is not None:
            raise Interrupted(f"{_ENDING[self._ending]} received; step {state['step']} is stored.", self._ending)

    def load_checkpoint(self, model: nn.Module, optimizer: Any) -> dict[str, Any] | None:
        """Restore the run's newest checkpoint, if there is one.

        Args:
            model: The unwrapped model.
            optimizer: Optimizer as `prepare` returned it.

        Returns:
            The training state, or None without a checkpoint.
        """
        folder: Path | None = agree(self._checkpoints[-1] if self._checkpoints else None)
        if folder is None:
            return None
        load_weights(model, folder / "model.safetensors")
        load_optimizer(model, optimizer.optimizer, folder / "optimizer.safetensors")
        logger.info("resuming at %s", folder.name)
        state = cast(dict[str, Any], read_json(folder / "state.json"))
        self.stepper.restore(state.pop("steps"))
        return state

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints of a finished run, after its best weights are saved; the last call of a stage.

        The run is marked as finished first, so that a run killed in between does not restart when resumed.
        """
        if self.is_main:
            self.run.note(status="finished")
            shutil.rmtree(self.run.folder / "checkpoints", ignore_errors=True)

    def close(self) -> None:
        """Flush logs and leave the process group."""
        self.accelerator.end_training()
