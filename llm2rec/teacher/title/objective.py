"""The `title` objective (iLoRA, arXiv 2408.10159): the log-probability of the answer after a prompt with candidates."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.train.engine import Engine
from llm2rec.student.negatives import CandidateSampler
from llm2rec.teacher.evaluator import rank_answers
from llm2rec.teacher.gate_cache import TeacherRows
from llm2rec.teacher.prompts import TokenBatch
from llm2rec.teacher.title.model import TitleRecommender

__all__ = ["UNLISTED_CANDIDATES", "TitleObjective"]

UNLISTED_CANDIDATES = 20  # how many are scored where prompts list none


class TitleObjective:
    """Language-model cross-entropy on the answer's title, its end token included, and on nothing else.

    A row's loss is the mean over its answer's tokens, and a step's the mean over its rows, however they are divided.
    (The released program takes the mean over all tokens of a micro-batch, in which long titles weigh more and a
    token's weight depends on its neighbours.)

    Candidates are a function of the run's seed and the row, and of the epoch where they are redrawn; those of
    validation never change. Prompts without candidates are validated among some that are scored, but not listed.

    Args:
        model: Unwrapped teacher.
        train: Rows to train on.
        validation: Rows for early stopping.
        engine: Divides validation rows among processes, and has the seed.

    Raises:
        ConfigError: If the catalogue is too small for the candidates.
    """

    def __init__(self, model: TitleRecommender, train: TeacherRows, validation: TeacherRows, engine: Engine) -> None:
        self.model, self.validation, self.engine = model, validation, engine
        n_candidates = model.settings.n_candidates
        self._among = CandidateSampler(
            validation.data, engine.seed, n_candidates or UNLISTED_CANDIDATES, split="validation"
        )
        self._shown = (
            CandidateSampler(train.data, engine.seed, n_candidates, split="train") if model.lists_candidates else None
        )
        self.train = replace(train, token_counts=self._token_counts(train))
        self.knows_lengths = not model.settings.redraw_candidates

    def losses(self, wrapped: nn.Module, micro: NDArray[np.int64], *, hybrid: bool, epoch: int) -> Tensor:
        """See `llm2rec.teacher.trainer.TeacherTask.losses`."""
        tokens = self._answered(self.train.rows[micro], hybrid=hybrid, epoch=epoch)
        losses: Tensor = wrapped(**vars(tokens.to(self.engine.device)))
        return losses

    def prompts(self, n: int) -> TokenBatch:
        """See `llm2rec.teacher.trainer.TeacherTask.prompts`."""
        return self._answered(self.train.rows[:n], hybrid=self.model.is_hybrid, epoch=0)

    def _answered(self, rows: NDArray[np.int64], *, hybrid: bool, epoch: int) -> TokenBatch:
        data = self.train.data
        return self.model.prompts.questions(
            *data.histories(rows),
            self._candidates(rows, epoch),
            data.targets.numpy()[rows],
            hybrid=hybrid,
            padding="left",  # the answers then end side by side, and logits are needed of few positions
        )

    def validate(self) -> dict[str, float]:
        """Metrics of the answer's rank among its candidates, whose names say nothing of that; a collective."""
        return ranking_metrics(rank_answers(self.model, self.validation, self._among, self.engine))

    def _candidates(self, rows: NDArray[np.int64], epoch: int) -> NDArray[np.int64] | None:
        if self._shown is None:
            return None
        return self._shown.draw(rows, epoch if self.model.settings.redraw_candidates else None)

    def _token_counts(self, train: TeacherRows) -> NDArray[np.int64]:
        """Tokens of each prompt with its answer, by which rows of similar length are put together.

        Without candidates where each epoch draws others: rows keep their length then only as far as it is their own.
        """
        history, lengths = train.data.histories(train.rows)
        shown = None if self.model.settings.redraw_candidates else self._candidates(train.rows, 0)
        targets = train.data.targets.numpy()[train.rows]
        return self.model.prompts.question_token_counts(history, lengths, shown, targets, hybrid=self.model.is_hybrid)
