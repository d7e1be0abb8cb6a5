"""Ask a selection policy, check its answer, and keep it for a run that is resumed."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.errors import ConfigError, TeacherOutputsError
from llm2rec.core.files import replaced_file
from llm2rec.core.processes import agree, is_first_process
from llm2rec.distill.data_bridge import TeacherOutputs
from llm2rec.distill.evidence import Evidence, StudentNow
from llm2rec.distill.selection_policy import SelectionPolicy

__all__ = ["Selection"]

logger = logging.getLogger(__name__)


class Selection:
    """The weights of the rows, epoch by epoch.

    Weights that were read off the student cannot be found again when a run is resumed in the middle of an epoch, since
    the student has moved on; they are written into the run folder until the training ends.

    Args:
        policy: Whom to ask.
        n_rows: Training rows, M.
        teacher: What the policy may look at.
        student: Gives the student as it is at the start of an epoch.
        folder: Where weights are kept; no other run's.
        needs_labels: Whether what is distilled is read off the teacher's files row by row; item vectors are not.

    Raises:
        TeacherOutputsError: If the policy needs rows that the teacher has not labelled.
        ConfigError: If some epoch's budget is more than what is labelled.
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
        self._told: tuple[int, int, float] | None = None
        asked = policy.checked_rows_to_label(n_rows)
        missing = np.empty(0, np.int64) if asked is None else np.setdiff1d(asked, self._rows)
        if len(missing) and needs_labels:
            raise TeacherOutputsError(
                f"{type(policy).__name__} distils rows that the teacher has not labelled: {len(missing)} of them, the "
                f"first is row {missing[0]}; it has labelled {len(self._rows)} of {n_rows}. Use the policy, seed and "
                "budget that the teacher was run with (`selection` in manifest.json), or a policy that chooses among "
                "the labelled rows, or label these too with `python -m llm2rec.teacher`."
            )
        if asked is None and (most := policy.most_chosen(n_rows)) > len(self._rows):
            raise ConfigError(
                f"the largest budget of any epoch is {most} rows, but the teacher has labelled {len(self._rows)} of "
                f"{n_rows}; lower `active.budget` and `active.final_budget`, or label more."
            )

    def weights(self, epoch: int) -> NDArray[np.float32]:
        """Weights of all rows in ``epoch``, shape ``(M,)``; a collective, called at the epoch's first step or later.

        Raises:
            ConfigError: If the policy's answer cannot be used.
        """
        decided = self._policy.decided_at(epoch)
        if decided != self._epoch:
            file = self._folder / f"epoch_{decided:06d}.npy"
            kept = agree(file.is_file() if is_first_process() else None)
            self._weights = np.load(file, allow_pickle=False) if kept else self._asked(decided, file)
            self._epoch = decided
            told = int((self._weights > 0).sum()), self._n_rows, float(self._weights.sum()) / self._n_rows
            if told != self._told:
                logger.info("epoch %d: distilling %d of %d rows, mean weight %.3f", decided, *told)
                self._told = told
        return self._weights

    def close(self) -> None:
        """Forget what was kept; for a training that has ended."""
        if is_first_process():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _asked(self, epoch: int, file: Path) -> NDArray[np.float32]:
        student = self._student(epoch)
        weights = self._policy.weights(Evidence(self._n_rows, epoch, self._rows, self._teacher, student))
        self._check(np.asarray(weights), epoch)
        weights = np.asarray(weights, np.float32)
        if student.was_read and is_first_process():
            with replaced_file(file) as aside, open(aside, "wb") as opened:
                np.save(opened, weights, allow_pickle=False)
        return weights

    def _check(self, weights: NDArray[np.float32], epoch: int) -> None:
        name = f"{type(self._policy).__name__}, asked about epoch {epoch},"
        if weights.shape != (self._n_rows,):
            raise ConfigError(f"{name} gave weights of shape {weights.shape}, expected ({self._n_rows},).")
        wrong = ~(np.isfinite(weights) & (weights >= 0))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ConfigError(f"{name} gave row {row} the weight {weights[row]}, expected 0 or a positive number.")
        unlabelled = weights > 0
        unlabelled[self._rows] = False
        if unlabelled.any() and self._needs_labels:
            raise ConfigError(
                f"{name} gave a weight to row {int(np.argmax(unlabelled))}, which the teacher has not labelled; choose "
                "among `evidence.rows`."
            )
