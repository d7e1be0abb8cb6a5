"""Run selection policies: build custom ones, validate their weights, and save them for a resumed run."""

import logging
import shutil
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.errors import ConfigError, TeacherOutputsError
from llm2rec.core.files import replaced_file
from llm2rec.core.processes import agree, is_first_process
from llm2rec.distill.data_bridge import TeacherOutputs
from llm2rec.distill.selection_evidence import Evidence, StudentNow
from llm2rec.distill.selection_policy import SelectionPolicy

__all__ = ["Selection", "policy_named"]

logger = logging.getLogger(__name__)


class Selection:
    """Row weights of each epoch.

    Weights that depend on the student cannot be recomputed when a run resumes in the middle of an epoch, because the
    student has changed by then; they stay in the run folder until training ends.

    Args:
        policy: The selection policy.
        n_rows: Training rows, M.
        teacher: The teacher's outputs.
        student: Returns the student at the start of an epoch.
        folder: Folder for saved weights, in the run folder.
        needs_labels: Whether distillation reads the teacher's outputs of each row; False if it uses item vectors only.

    Raises:
        TeacherOutputsError: If the policy needs rows that the teacher has not labelled.
        ConfigError: If the budget of an epoch exceeds the number of labelled rows.
    """

    def __init__(
        self,
        policy: SelectionPolicy,
        n_rows: int,
        teacher: TeacherOutputs,
        student: Callable[[int], StudentNow],
        folder: Path,
        *,
        needs_labels: bool = True,
    ) -> None:
        self._policy, self._n_rows, self._teacher, self._folder = policy, n_rows, teacher, folder
        self._student, self._rows = student, teacher.rows_labelled(n_rows)
        self._needs_labels = needs_labels
        self._epoch, self._weights = -1, np.empty(0, np.float32)
        self._logged: tuple[int, int, float] | None = None
        required = policy.checked_rows_to_label(n_rows)
        missing = np.empty(0, np.int64) if required is None else np.setdiff1d(required, self._rows)
        if len(missing) and needs_labels:
            raise TeacherOutputsError(
                f"{type(policy).__name__} distils {len(missing)} rows without teacher labels, the first is row "
                f"{missing[0]}; the teacher has labelled {len(self._rows)} of {n_rows} rows. Use the policy, seed and "
                "budget of the teacher run (`selection` in manifest.json), or a policy that selects among the labelled "
                "rows, or label the missing rows with `python -m llm2rec.teacher`."
            )
        if required is None and (most := policy.most_chosen(n_rows)) > len(self._rows):
            raise ConfigError(
                f"the largest budget is {most} rows, but the teacher has labelled {len(self._rows)} of {n_rows}; lower "
                "`active.budget` and `active.final_budget`, or label more rows."
            )

    def weights(self, epoch: int) -> NDArray[np.float32]:
        """Weights of all rows in ``epoch``, shape ``(M,)``; a collective, called at the epoch's first step or later.

        Raises:
            ConfigError: If the policy returns invalid weights.
        """
        decided = self._policy.decided_at(epoch)
        if decided != self._epoch:
            file = self._folder / f"epoch_{decided:06d}.npy"
            saved = agree(file.is_file() if is_first_process() else None)
            self._weights = np.load(file, allow_pickle=False) if saved else self._compute(decided, file)
            self._epoch = decided
            counts = int((self._weights > 0).sum()), self._n_rows, float(self._weights.sum()) / self._n_rows
            if counts != self._logged:
                logger.info("epoch %d: distilling %d of %d rows, mean weight %.3f", decided, *counts)
                self._logged = counts
        return self._weights

    def close(self) -> None:
        """Delete the saved weights at the end of training."""
        if is_first_process():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _compute(self, epoch: int, file: Path) -> NDArray[np.float32]:
        student = self._student(epoch)
        weights = self._policy.weights(Evidence(self._n_rows, epoch, self._rows, self._teacher, student))
        self._check(np.asarray(weights), epoch)
        weights = np.asarray(weights, np.float32)
        if student.was_read and is_first_process():
            with replaced_file(file) as aside, open(aside, "wb") as opened:
                np.save(opened, weights, allow_pickle=False)
        return weights

    def _check(self, weights: NDArray[np.float32], epoch: int) -> None:
        name = type(self._policy).__name__
        if weights.shape != (self._n_rows,):
            raise ConfigError(
                f"{name} returned weights of shape {weights.shape} in epoch {epoch}, expected ({self._n_rows},)."
            )
        wrong = ~(np.isfinite(weights) & (weights >= 0))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ConfigError(
                f"{name} returned weight {weights[row]} for row {row} in epoch {epoch}, expected a number from 0."
            )
        unlabelled = weights > 0
        unlabelled[self._rows] = False
        if unlabelled.any() and self._needs_labels:
            raise ConfigError(
                f"{name} selects row {int(np.argmax(unlabelled))} in epoch {epoch}, which has no teacher label; "
                "select among `evidence.rows`."
            )


def policy_named(policy: str, arguments: Mapping[str, Any]) -> SelectionPolicy:
    """Build a custom policy: ``active=custom active.policy=module.Class``.

    Args:
        policy: Class as ``module.Class``; the module must be importable from the launch folder.
        arguments: Keyword arguments of the constructor.

    Raises:
        ConfigError: If the class cannot be imported, is not a policy, or does not accept the arguments.
    """
    module, _, name = policy.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"active.policy is {policy!r}, which cannot be imported ({error}); expected `module.Class` of a module in "
            "the launch folder or on PYTHONPATH."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, SelectionPolicy)):
        raise ConfigError(f"active.policy is {policy!r}, expected a subclass of {SelectionPolicy.__module__}.")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"active.policy {policy!r} cannot be built from {dict(arguments)}: {error}.") from error
