"""Which training rows are distilled, and with what weight.

A policy returns weights for all rows at the start of an epoch; the trainer multiplies each row's distillation losses
by its weight. The row's own task is always trained. A new policy is one class in any file that Python can import,
chosen with ``active=custom active.policy=module.Class``; nothing else has to know of it.
"""

from abc import ABC, abstractmethod
from inspect import getfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import ConfigError
from llm2rec.core.files import sha256_of_file
from llm2rec.core.metrics import target_ranks
from llm2rec.distill.kd_losses import consistency_weights
from llm2rec.distill.selection_evidence import Evidence, ScoredRows

__all__ = [
    "SelectionPolicy",
    "SelectionPolicyAll",
    "SelectionPolicyConfidence",
    "SelectionPolicyDisagreement",
    "SelectionPolicyMeta",
    "SelectionPolicyRandom",
    "SelectionPolicyUncertainty",
]


class SelectionPolicy(ABC):
    """Chooses and weighs rows for distillation."""

    @abstractmethod
    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weigh the training rows for one epoch.

        Every process asks at the same moment and must get the same answer, so that chance may only come from a seed and
        the epoch. What is read off the student is kept with the run: a resumed epoch goes on with the same weights.

        Args:
            evidence: What can be known at this moment: rows, epoch, the teacher's outputs, the student as it is.

        Returns:
            Weights of shape ``(M,)``, 0 for rows that are not distilled; of rows that the teacher has not labelled too.
        """

    def rows_to_label(self, n_rows: int) -> NDArray[np.int64] | None:
        """The rows that have to be labelled before this policy can choose, known before there is any teacher.

        The teacher labels these alone, and distillation refuses outputs without them where it reads labels.

        Args:
            n_rows: Training rows, M.

        Returns:
            Row numbers, ascending; None for a policy that chooses among whatever rows are labelled, for which the
            teacher labels all.
        """
        return None

    def checked_rows_to_label(self, n_rows: int) -> NDArray[np.int64] | None:
        """The same, refused where nobody could label them: asked before a teacher is trained.

        Raises:
            ConfigError: If the answer is no list of row numbers, ascending.
        """
        labelled = self.rows_to_label(n_rows)
        if labelled is None:
            return None
        rows = np.asarray(labelled)
        wrong = rows.ndim != 1 or rows.size == 0 or not np.issubdtype(rows.dtype, np.integer)
        if wrong or rows[0] < 0 or rows[-1] >= n_rows or (np.diff(rows) <= 0).any():
            shown = np.array2string(rows, threshold=8, edgeitems=3)
            raise ConfigError(
                f"{type(self).__name__}.rows_to_label gave {shown}, expected row numbers from 0 to {n_rows - 1}, each "
                "once and ascending."
            )
        return rows.astype(np.int64)

    def most_chosen(self, n_rows: int) -> int:
        """The most rows that any epoch distils, as far as that is known beforehand; else 0."""
        return 0

    def decided_at(self, epoch: int) -> int:
        """The epoch, at most ``epoch``, at whose start the weights of ``epoch`` are decided; by default itself."""
        return epoch

    def source(self) -> str | None:
        """SHA-256 of the file that this policy is written in, if that is not this library's: ``reuse`` asks for it."""
        if type(self).__module__.startswith("llm2rec."):
            return None
        return sha256_of_file(Path(getfile(type(self))))


class SelectionPolicyAll(SelectionPolicy):
    """Every row counts fully: DLLM2Rec as published."""

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weigh all rows 1."""
        return np.ones(evidence.n_rows, np.float32)

    def rows_to_label(self, n_rows: int) -> NDArray[np.int64]:
        """All of them."""
        return np.arange(n_rows)


def _drawn(n_rows: int, n_drawn: int, seed: int) -> NDArray[np.int64]:
    """Row numbers drawn without replacement; fewer are the first of more."""
    return np.random.default_rng([seed, n_rows]).permutation(n_rows)[:n_drawn]


class _Budgeted(SelectionPolicy):
    """Distils a part of the rows, which may grow or shrink linearly over the first epochs.

    Args:
        budget: Part of all training rows that is distilled in epoch 0, above 0 up to 1.
        final_budget: That from epoch ``over_epochs`` on; None keeps ``budget``.
        over_epochs: Epochs from the one to the other.
    """

    def __init__(self, budget: float, final_budget: float | None = None, over_epochs: int = 10) -> None:
        for name, value in (("budget", budget), ("final_budget", budget if final_budget is None else final_budget)):
            if not 0 < value <= 1:
                raise ConfigError(f"active.{name} is {value}, expected a part of the rows above 0 and up to 1.")
        if over_epochs < 1:
            raise ConfigError(f"active.over_epochs is {over_epochs}, expected at least 1.")
        self.budget, self.over_epochs = budget, over_epochs
        self.final_budget = budget if final_budget is None else final_budget

    def n_chosen(self, n_rows: int, epoch: int) -> int:
        """Rows of M that are distilled in ``epoch``; at least 1."""
        done = min(epoch / self.over_epochs, 1.0)
        # In this form it is no number between two that are the same.
        return max(1, round((self.budget + done * (self.final_budget - self.budget)) * n_rows))

    def most_chosen(self, n_rows: int) -> int:
        """Rows of the largest budget of any epoch."""
        return max(self.n_chosen(n_rows, epoch) for epoch in (0, self.over_epochs))


class SelectionPolicyRandom(_Budgeted):
    """A fixed random part of the rows: what any cleverer policy has to beat at the same budget.

    A smaller budget chooses among the rows of a larger one.

    Args:
        budget: As in every policy with a budget: part of the rows in epoch 0.
        seed: Seed of the choice.
        final_budget: Part from epoch ``over_epochs`` on; None keeps ``budget``.
        over_epochs: Epochs from the one to the other.
    """

    def __init__(self, budget: float, seed: int, final_budget: float | None = None, over_epochs: int = 10) -> None:
        super().__init__(budget, final_budget, over_epochs)
        self.seed = _checked_seed(seed)

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weigh the chosen rows 1 and the others 0; the choice is the same in every epoch of the same budget."""
        weights = np.zeros(evidence.n_rows, np.float32)
        weights[_drawn(evidence.n_rows, self.n_chosen(evidence.n_rows, evidence.epoch), self.seed)] = 1
        return weights

    def rows_to_label(self, n_rows: int) -> NDArray[np.int64]:
        """The rows of the largest budget of any epoch."""
        return np.sort(_drawn(n_rows, self.most_chosen(n_rows), self.seed))


def _checked_seed(seed: int) -> int:
    if seed < 0:
        raise ConfigError(f"active.seed is {seed}, expected 0 or more.")
    return seed


class _Choosing(_Budgeted):
    """Has a budget, and chooses among rows that must have been labelled before: all, or a random pool of them.

    The pool is what active learning calls the unlabelled pool (Settles, 2009, section 2.3), drawn before there is any
    teacher, which then labels no more than that.

    Args:
        budget: As in every policy with a budget.
        final_budget: As there.
        over_epochs: As there.
        pool: Part of all training rows that is labelled and chosen among, above 0; 1 leaves open which are labelled.
        seed: Seed of the pool.
    """

    def __init__(self, budget: float, final_budget: float | None, over_epochs: int, pool: float, seed: int) -> None:
        super().__init__(budget, final_budget, over_epochs)
        if not 0 < pool <= 1:
            raise ConfigError(f"active.pool is {pool}, expected a part of the rows above 0 and up to 1.")
        if pool < (largest := max(self.budget, self.final_budget)):
            raise ConfigError(
                f"active.pool is {pool}, but `budget` or `final_budget` is {largest}: more rows than there are to "
                "choose among; raise the pool or lower the budget."
            )
        self.pool, self.seed = pool, _checked_seed(seed)

    def rows_to_label(self, n_rows: int) -> NDArray[np.int64] | None:
        """The pool; None where it is not bounded."""
        if self.pool == 1:
            return None
        return np.sort(_drawn(n_rows, max(self.most_chosen(n_rows), round(self.pool * n_rows)), self.seed))

    def largest(self, values: NDArray[Any], evidence: Evidence) -> NDArray[np.float32]:
        """Weigh the rows of the largest ``values`` (shape ``(labelled,)``) 1; of equal ones the earlier.

        Rows outside the pool are left alone though they may be labelled, so that whoever has labelled more decides
        nothing.
        """
        n_chosen = self.n_chosen(evidence.n_rows, evidence.epoch)
        ordered = evidence.rows[np.argsort(-values, kind="stable")]
        if (pool := self.rows_to_label(evidence.n_rows)) is not None:
            ordered = ordered[np.isin(ordered, pool)]
        if len(ordered) < n_chosen:
            raise ConfigError(
                f"{type(self).__name__} distils {n_chosen} rows in epoch {evidence.epoch}, but of those that it may "
                f"choose the teacher has labelled {len(ordered)}; lower `active.budget`, or label more."
            )
        weights = np.zeros(evidence.n_rows, np.float32)
        weights[ordered[:n_chosen]] = 1
        return weights


_MEASURES = ("best", "margin", "entropy")


class _ByTheTeacher(_Choosing):
    """Chooses by how sure the teacher is of a row, read off the distances in its files.

    Args:
        budget: Part of the rows in epoch 0.
        measure: ``best``: the distance of its first candidate (least confidence, where distances are negative
            log-probabilities). ``margin``: how much farther the second one is. ``entropy``: of the distribution
            ``∝ exp(-distance)`` over all stored candidates. The three of the active learning literature (Settles,
            Computer Sciences Technical Report 1648, University of Wisconsin-Madison, 2009).
        final_budget: Part from epoch ``over_epochs`` on; None keeps ``budget``.
        over_epochs: Epochs from the one to the other.
        pool: Part of the rows that the teacher labels, at random, for this to choose among.
        seed: Seed of the pool.
    """

    def __init__(
        self,
        budget: float,
        measure: str = "entropy",
        final_budget: float | None = None,
        over_epochs: int = 10,
        pool: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, final_budget, over_epochs, pool, seed)
        if measure not in _MEASURES:
            raise ConfigError(f"active.measure is {measure!r}, expected one of {', '.join(_MEASURES)}.")
        self.measure = measure

    def uncertainty(self, evidence: Evidence) -> NDArray[np.float64]:
        """How unsure the teacher is of each labelled row, shape ``(labelled,)``; larger is less sure.

        Raises:
            ConfigError: If a margin is asked for and there is one candidate per row.
        """
        distance = evidence.teacher.distance.astype(np.float64)
        if self.measure == "best":
            return distance[:, 0]
        if self.measure == "margin":
            if distance.shape[1] < 2:
                raise ConfigError(
                    "active.measure is 'margin', but the teacher's files hold one candidate per row; export more with "
                    "`teacher.export.top_k`."
                )
            return distance[:, 0] - distance[:, 1]
        probs = torch.softmax(-torch.from_numpy(distance), dim=1)
        return torch.special.entr(probs).sum(dim=1).numpy()


class SelectionPolicyConfidence(_ByTheTeacher):
    """Distils the rows that the teacher is surest of, where its outputs are most likely right."""

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weigh the rows of least uncertainty 1 and the others 0."""
        return self.largest(-self.uncertainty(evidence), evidence)


class SelectionPolicyUncertainty(_ByTheTeacher):
    """Distils the rows that the teacher is least sure of, where its outputs say more than which item is the target."""

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weigh the rows of most uncertainty 1 and the others 0."""
        return self.largest(self.uncertainty(evidence), evidence)


class _Refreshed(SelectionPolicy):
    """Looks at the student every ``refresh_epochs`` epochs; each look costs a forward pass over all labelled rows."""

    refresh_epochs: int

    def _refresh_every(self, refresh_epochs: int) -> None:
        if refresh_epochs < 1:
            raise ConfigError(f"active.refresh_epochs is {refresh_epochs}, expected at least 1.")
        self.refresh_epochs = refresh_epochs

    def decided_at(self, epoch: int) -> int:
        """The last epoch of a multiple of ``refresh_epochs``."""
        return epoch - epoch % self.refresh_epochs


class SelectionPolicyDisagreement(_Choosing, _Refreshed):
    """Distils the rows where the student, as it is now, is farthest from the teacher.

    Args:
        budget: Part of the rows in epoch 0.
        measure: ``overlap``: the part of the teacher's first K that is not among the student's. ``rank``: the place of
            the teacher's first candidate in the student's ranking of the catalogue, ties counted against the student.
        top_k: K of ``overlap``; at most what the teacher's files hold.
        refresh_epochs: Epochs from one look at the student to the next.
        final_budget: Part from epoch ``over_epochs`` on; None keeps ``budget``. A new part waits for the next look.
        over_epochs: Epochs from the one to the other.
        pool: Part of the rows that the teacher labels, at random, for this to choose among.
        seed: Seed of the pool.
    """

    def __init__(
        self,
        budget: float,
        measure: str = "overlap",
        top_k: int = 10,
        refresh_epochs: int = 1,
        final_budget: float | None = None,
        over_epochs: int = 10,
        pool: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, final_budget, over_epochs, pool, seed)
        if measure not in ("overlap", "rank"):
            raise ConfigError(f"active.measure is {measure!r}, expected 'overlap' or 'rank'.")
        if top_k < 1:
            raise ConfigError(f"active.top_k is {top_k}, expected at least 1.")
        self.measure, self.top_k = measure, top_k
        self._refresh_every(refresh_epochs)

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weigh the rows of most disagreement 1 and the others 0."""
        return self.largest(evidence.student.each_row(self.disagreement), evidence)

    def disagreement(self, scored: ScoredRows) -> Tensor:
        """How far the student is from the teacher, shape ``(B,)``."""
        if self.measure == "rank":
            return target_ranks(scored.logits, scored.teacher_batch.ranking[:, 0])
        if (stored := scored.teacher_batch.ranking.shape[1]) < self.top_k:
            raise ConfigError(
                f"active.top_k is {self.top_k}, but the teacher's files hold {stored} candidates per row; lower it, or "
                "export more with `teacher.export.top_k` or `ensemble.top_k`."
            )
        shared = consistency_weights(scored.logits, scored.teacher_batch.ranking[:, : self.top_k], self.top_k)
        return 1 - shared.mean(dim=1)


class SelectionPolicyMeta(_Refreshed):
    """Weighs rows by how much learning from the teacher there lowers the validation loss: the idea of Ren et al. 2018.

    Learning to reweight examples (arXiv 1803.09050, equations 11 to 13) takes the weight of a row to be the positive
    part of ``-∂L_validation(θ - Σ_i ε_i ∇L_i(θ)) / ∂ε_i`` at ε = 0, which is ``⟨∇L_validation(θ), ∇L_i(θ)⟩``. Here, at
    the start of an epoch:

    - L_i is the ranking loss of training row i, as configured, and L_validation the mean cross-entropy over the
      validation rows. The test split is never read.
    - θ stands for the vectors that items are scored with, ``(N, D)``, and nothing below them, for which the product has
      a closed form: with user vector u_i and ``δ_i = ∂L_i / ∂logits_i``, a row's gradient is ``δ_i ⊗ u_i``, so that its
      product with the validation gradient G is ``δ_i · (G u_i)``. One forward pass over the rows gives all.
    - Dropout is off. Weights are ``max(0, product)``, over their mean over the labelled rows, so that rows weigh 1 on
      average, as with ``all``; if no row helps, all weigh 0.

    The paper does this for each batch and all parameters. Since validation rows decide weights here and early stopping
    too, validation metrics flatter this policy; compare it with others on the test split only.

    Args:
        refresh_epochs: Epochs from one look at the student to the next.
    """

    def __init__(self, refresh_epochs: int = 1) -> None:
        self._refresh_every(refresh_epochs)

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weigh the labelled rows by what they do for validation."""
        gradient = evidence.student.validation_gradient()  # (N, D)

        def usefulness(scored: ScoredRows) -> Tensor:
            return (scored.ranking_gradient() * (scored.users @ gradient.T)).sum(dim=1)

        useful = np.maximum(evidence.student.each_row(usefulness), 0)
        mean = useful.mean(dtype=np.float64)
        weights = np.zeros(evidence.n_rows, np.float32)
        weights[evidence.rows] = useful / mean if mean > 0 else 0
        return weights
