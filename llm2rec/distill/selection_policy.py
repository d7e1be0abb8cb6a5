"""Selection policies: which training rows are distilled, and with what weight.

A policy returns a weight per row at the start of an epoch; the trainer multiplies each row's distillation losses by
its weight. The task loss always covers all rows. A custom policy is a class in any importable module, chosen with
``active=custom active.policy=module.Class``.
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
    """Selects and weights rows for distillation."""

    @abstractmethod
    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Return the weights of the training rows for one epoch.

        Every process calls this and must get the same result, so randomness must depend only on a seed and the epoch.
        Weights computed from the student are saved in the run folder, so a resumed epoch uses the same weights.

        Args:
            evidence: Row numbers, epoch, the teacher's outputs, and the student at the start of the epoch.

        Returns:
            Weights of shape ``(M,)``; 0 for rows that are not distilled, including rows without teacher labels.
        """

    def rows_to_label(self, n_rows: int) -> NDArray[np.int64] | None:
        """Return the rows that the teacher must label for this policy, before a teacher is trained.

        The teacher labels only these rows. Distillation that reads labels rejects teacher outputs without them.

        Args:
            n_rows: Training rows, M.

        Returns:
            Row numbers, ascending; None if the policy accepts any labelled rows, in which case the teacher labels all.
        """
        return None

    def checked_rows_to_label(self, n_rows: int) -> NDArray[np.int64] | None:
        """Call `rows_to_label` and validate its result.

        Raises:
            ConfigError: If the result is not an ascending list of valid row numbers.
        """
        labelled = self.rows_to_label(n_rows)
        if labelled is None:
            return None
        rows = np.asarray(labelled)
        wrong = rows.ndim != 1 or rows.size == 0 or not np.issubdtype(rows.dtype, np.integer)
        if wrong or rows[0] < 0 or rows[-1] >= n_rows or (np.diff(rows) <= 0).any():
            text = np.array2string(rows, threshold=8, edgeitems=3)
            raise ConfigError(
                f"{type(self).__name__}.rows_to_label returned {text}, expected unique row numbers from 0 to "
                f"{n_rows - 1} in ascending order."
            )
        return rows.astype(np.int64)

    def most_chosen(self, n_rows: int) -> int:
        """The largest number of rows that any epoch distils; 0 if unknown."""
        return 0

    def decided_at(self, epoch: int) -> int:
        """The epoch at whose start the weights of ``epoch`` are computed; at most ``epoch``, the default."""
        return epoch

    def source(self) -> str | None:
        """SHA-256 of the policy's source file, which ``reuse`` compares; None for policies of this library."""
        if type(self).__module__.startswith("llm2rec."):
            return None
        return sha256_of_file(Path(getfile(type(self))))


class SelectionPolicyAll(SelectionPolicy):
    """Distils every row with weight 1, as DLLM2Rec does."""

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weight 1 for all rows."""
        return np.ones(evidence.n_rows, np.float32)

    def rows_to_label(self, n_rows: int) -> NDArray[np.int64]:
        """All rows."""
        return np.arange(n_rows)


def _sample_rows(n_rows: int, n_drawn: int, seed: int) -> NDArray[np.int64]:
    """Sample row numbers without replacement; a smaller sample is a prefix of a larger one."""
    return np.random.default_rng([seed, n_rows]).permutation(n_rows)[:n_drawn]


class _Budgeted(SelectionPolicy):
    """Distils a fraction of the rows, which may change linearly over the first epochs.

    Args:
        budget: Fraction of all training rows that is distilled in epoch 0, in (0, 1].
        final_budget: Fraction from epoch ``over_epochs`` on; None keeps ``budget``.
        over_epochs: Epochs over which the fraction changes from ``budget`` to ``final_budget``.
    """

    def __init__(self, budget: float, final_budget: float | None = None, over_epochs: int = 10) -> None:
        for name, value in (("budget", budget), ("final_budget", budget if final_budget is None else final_budget)):
            if not 0 < value <= 1:
                raise ConfigError(f"active.{name} is {value}, expected a fraction of the rows above 0 and up to 1.")
        if over_epochs < 1:
            raise ConfigError(f"active.over_epochs is {over_epochs}, expected at least 1.")
        self.budget, self.over_epochs = budget, over_epochs
        self.final_budget = budget if final_budget is None else final_budget

    def n_chosen(self, n_rows: int, epoch: int) -> int:
        """Number of rows, of M, that are distilled in ``epoch``; at least 1."""
        done = min(epoch / self.over_epochs, 1.0)
        # This form returns exactly `budget` if both budgets are equal.
        return max(1, round((self.budget + done * (self.final_budget - self.budget)) * n_rows))

    def most_chosen(self, n_rows: int) -> int:
        """Number of rows of the largest budget."""
        return max(self.n_chosen(n_rows, epoch) for epoch in (0, self.over_epochs))


class SelectionPolicyRandom(_Budgeted):
    """Distils a fixed random sample of the rows: the baseline for other policies at the same budget.

    The rows of a smaller budget are a subset of the rows of a larger one.

    Args:
        budget: Fraction of the rows in epoch 0.
        seed: Seed of the sample.
        final_budget: Fraction from epoch ``over_epochs`` on; None keeps ``budget``.
        over_epochs: Epochs over which the fraction changes from ``budget`` to ``final_budget``.
    """

    def __init__(self, budget: float, seed: int, final_budget: float | None = None, over_epochs: int = 10) -> None:
        super().__init__(budget, final_budget, over_epochs)
        self.seed = _checked_seed(seed)

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weight 1 for the sampled rows, 0 for the others; epochs with the same budget select the same rows."""
        weights = np.zeros(evidence.n_rows, np.float32)
        weights[_sample_rows(evidence.n_rows, self.n_chosen(evidence.n_rows, evidence.epoch), self.seed)] = 1
        return weights

    def rows_to_label(self, n_rows: int) -> NDArray[np.int64]:
        """The rows of the largest budget."""
        return np.sort(_sample_rows(n_rows, self.most_chosen(n_rows), self.seed))


def _checked_seed(seed: int) -> int:
    if seed < 0:
        raise ConfigError(f"active.seed is {seed}, expected 0 or more.")
    return seed


class _PoolBased(_Budgeted):
    """Selects rows from a pool that the teacher has labelled: all rows, or a random sample.

    This is pool-based active learning (Settles, 2009, section 2.3). The pool is sampled before the teacher is trained,
    and the teacher labels only the pool.

    Args:
        budget: Fraction of the rows in epoch 0.
        final_budget: Fraction from epoch ``over_epochs`` on; None keeps ``budget``.
        over_epochs: Epochs over which the fraction changes from ``budget`` to ``final_budget``.
        pool: Fraction of all training rows in the pool, in (0, 1]; 1 accepts any labelled rows.
        seed: Seed of the pool.
    """

    def __init__(self, budget: float, final_budget: float | None, over_epochs: int, pool: float, seed: int) -> None:
        super().__init__(budget, final_budget, over_epochs)
        if not 0 < pool <= 1:
            raise ConfigError(f"active.pool is {pool}, expected a fraction of the rows above 0 and up to 1.")
        if pool < (largest := max(self.budget, self.final_budget)):
            raise ConfigError(
                f"active.pool is {pool}, smaller than the largest budget, {largest}; raise `active.pool` or lower "
                "`active.budget` and `active.final_budget`."
            )
        self.pool, self.seed = pool, _checked_seed(seed)

    def rows_to_label(self, n_rows: int) -> NDArray[np.int64] | None:
        """The rows of the pool; None if ``pool`` is 1."""
        if self.pool == 1:
            return None
        return np.sort(_sample_rows(n_rows, max(self.most_chosen(n_rows), round(self.pool * n_rows)), self.seed))

    def largest(self, values: NDArray[Any], evidence: Evidence) -> NDArray[np.float32]:
        """Weight 1 for the rows with the largest ``values``, shape ``(labelled,)``; ties go to the earlier row.

        Labelled rows outside the pool are ignored, so extra labels do not change the selection.
        """
        n_chosen = self.n_chosen(evidence.n_rows, evidence.epoch)
        ordered = evidence.rows[np.argsort(-values, kind="stable")]
        if (pool := self.rows_to_label(evidence.n_rows)) is not None:
            ordered = ordered[np.isin(ordered, pool)]
        if len(ordered) < n_chosen:
            raise ConfigError(
                f"{type(self).__name__} selects {n_chosen} rows in epoch {evidence.epoch}, but only {len(ordered)} of "
                "the rows that it may select have teacher labels; lower `active.budget`, or label more rows."
            )
        weights = np.zeros(evidence.n_rows, np.float32)
        weights[ordered[:n_chosen]] = 1
        return weights


_MEASURES = ("best", "margin", "entropy")


class _TeacherUncertainty(_PoolBased):
    """Selects rows by the teacher's uncertainty, computed from the distances in its outputs.

    Args:
        budget: Fraction of the rows in epoch 0.
        measure: ``best``: distance of the first candidate (least confidence, if distances are negative
            log-probabilities). ``margin``: gap between the first and the second candidate. ``entropy``: entropy of the
            distribution ``∝ exp(-distance)`` over all stored candidates. All three are standard in active learning
            (Settles, Computer Sciences Technical Report 1648, University of Wisconsin-Madison, 2009).
        final_budget: Fraction from epoch ``over_epochs`` on; None keeps ``budget``.
        over_epochs: Epochs over which the fraction changes from ``budget`` to ``final_budget``.
        pool: Fraction of all training rows in the pool, in (0, 1]; 1 accepts any labelled rows.
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
        """The teacher's uncertainty about each labelled row, shape ``(labelled,)``.

        Raises:
            ConfigError: If the measure is ``margin`` and the outputs have one candidate per row.
        """
        distance = evidence.teacher.distance.astype(np.float64)
        if self.measure == "best":
            return distance[:, 0]
        if self.measure == "margin":
            if distance.shape[1] < 2:
                raise ConfigError(
                    "active.measure is 'margin', but the teacher outputs have one candidate per row; export at least 2 "
                    "with `teacher.export.top_k`."
                )
            return distance[:, 0] - distance[:, 1]
        probs = torch.softmax(-torch.from_numpy(distance), dim=1)
        return torch.special.entr(probs).sum(dim=1).numpy()


class SelectionPolicyConfidence(_TeacherUncertainty):
    """Distils the rows with the lowest teacher uncertainty, where its outputs are most likely right."""

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weight 1 for the rows of lowest uncertainty, 0 for the others."""
        return self.largest(-self.uncertainty(evidence), evidence)


class SelectionPolicyUncertainty(_TeacherUncertainty):
    """Distils the rows with the highest teacher uncertainty, where its outputs add most to the target item."""

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weight 1 for the rows of highest uncertainty, 0 for the others."""
        return self.largest(self.uncertainty(evidence), evidence)


class _Refreshed(SelectionPolicy):
    """Scores the rows with the student every ``refresh_epochs`` epochs, a forward pass over all labelled rows."""

    refresh_epochs: int

    def _refresh_every(self, refresh_epochs: int) -> None:
        if refresh_epochs < 1:
            raise ConfigError(f"active.refresh_epochs is {refresh_epochs}, expected at least 1.")
        self.refresh_epochs = refresh_epochs

    def decided_at(self, epoch: int) -> int:
        """The last multiple of ``refresh_epochs`` up to ``epoch``."""
        return epoch - epoch % self.refresh_epochs


class SelectionPolicyDisagreement(_PoolBased, _Refreshed):
    """Distils the rows on which the current student disagrees most with the teacher.

    Args:
        budget: Fraction of the rows in epoch 0.
        measure: ``overlap``: share of the teacher's top K that is missing from the student's top K. ``rank``: rank of
            the teacher's first candidate in the student's ranking of the catalogue; ties count against the student.
        top_k: K of ``overlap``; at most the number of candidates in the teacher outputs.
        refresh_epochs: Epochs between two scorings of the rows with the student.
        final_budget: Fraction from epoch ``over_epochs`` on; None keeps ``budget``. Takes effect at the next scoring.
        over_epochs: Epochs over which the fraction changes from ``budget`` to ``final_budget``.
        pool: Fraction of all training rows in the pool, in (0, 1]; 1 accepts any labelled rows.
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
        """Weight 1 for the rows of highest disagreement, 0 for the others."""
        return self.largest(evidence.student.each_row(self.disagreement), evidence)

    def disagreement(self, scored: ScoredRows) -> Tensor:
        """Disagreement of student and teacher, shape ``(B,)``."""
        if self.measure == "rank":
            return target_ranks(scored.logits, scored.teacher_batch.ranking[:, 0])
        if (stored := scored.teacher_batch.ranking.shape[1]) < self.top_k:
            raise ConfigError(
                f"active.top_k is {self.top_k}, but the teacher outputs have {stored} candidates per row; lower it, or "
                "export more with `teacher.export.top_k` or `ensemble.top_k`."
            )
        shared = consistency_weights(scored.logits, scored.teacher_batch.ranking[:, : self.top_k], self.top_k)
        return 1 - shared.mean(dim=1)


class SelectionPolicyMeta(_Refreshed):
    """Weights rows by how much distilling them lowers the validation loss (after Ren et al., 2018).

    Learning to reweight examples (arXiv 1803.09050, equations 11 to 13) sets the weight of a row to the positive part
    of ``-∂L_validation(θ - Σ_i ε_i ∇L_i(θ)) / ∂ε_i`` at ε = 0, which is ``⟨∇L_validation(θ), ∇L_i(θ)⟩``. Here, at the
    start of an epoch:

    - L_i is the ranking loss of training row i, as configured, and L_validation the mean cross-entropy over the
      validation rows. The test split is never read.
    - θ is restricted to the output item vectors, ``(N, D)``, for which the product has a closed form: with user vector
      u_i and ``δ_i = ∂L_i / ∂logits_i``, a row's gradient is ``δ_i ⊗ u_i``, and its product with the validation
      gradient G is ``δ_i · (G u_i)``. One forward pass over the rows is enough.
    - Dropout is off. Weights are ``max(0, product)`` divided by their mean over the labelled rows, so the mean weight
      is 1, as with ``all``; if no product is positive, all weights are 0.

    The paper does this for each batch and all parameters. The validation rows determine both the weights and early
    stopping, so validation metrics are biased in favour of this policy; compare it with others on the test split only.

    Args:
        refresh_epochs: Epochs between two scorings of the rows with the student.
    """

    def __init__(self, refresh_epochs: int = 1) -> None:
        self._refresh_every(refresh_epochs)

    def weights(self, evidence: Evidence) -> NDArray[np.float32]:
        """Weight the labelled rows by how much they lower the validation loss."""
        gradient = evidence.student.validation_gradient()  # (N, D)

        def usefulness(scored: ScoredRows) -> Tensor:
            return (scored.ranking_gradient() * (scored.users @ gradient.T)).sum(dim=1)

        useful = np.maximum(evidence.student.each_row(usefulness), 0)
        mean = useful.mean(dtype=np.float64)
        weights = np.zeros(evidence.n_rows, np.float32)
        weights[evidence.rows] = useful / mean if mean > 0 else 0
        return weights
