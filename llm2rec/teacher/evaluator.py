"""Rank the target of every row with a teacher: among the catalogue (`item`), or among its candidates (`title`)."""

import torch
from torch import Tensor

from llm2rec.core.metrics import target_ranks
from llm2rec.core.train.engine import Engine
from llm2rec.student.datamodule import SeenItems
from llm2rec.student.evaluator import RowNumbers, batches_within_cost, evaluation_mode, rank_rows
from llm2rec.student.negatives import CandidateSampler
from llm2rec.teacher.gate_cache import TeacherRows
from llm2rec.teacher.ilora_model import ItemTeacher
from llm2rec.teacher.title.model import TitleRecommender

__all__ = ["rank_answers", "rank_targets"]


def rank_targets(
    model: ItemTeacher,
    rows: TeacherRows,
    engine: Engine,
    *,
    seen: SeenItems | None = None,
    batch_tokens: int = 8192,
) -> Tensor:
    """Rank the targets of all rows among the whole catalogue; a collective.

    Args:
        model: Unwrapped model.
        rows: Rows to rank, M of them.
        engine: Splits the rows among processes and gathers the ranks.
        seen: Items to leave out of each row's ranking, in addition to the history that the model itself leaves out;
            the target stays in. None for the model's own rule alone.
        batch_tokens: Tokens per forward pass, padding included.

    Returns:
        0-based ranks of shape ``(M,)``, int64, on the CPU.
    """

    def rank(positions: RowNumbers) -> Tensor:
        numbers = rows.rows[positions]
        batch = rows.data.batch(numbers, engine.device)
        inputs = model.read(*rows.data.histories(numbers))
        with model.use_gates(torch.from_numpy(rows.gate_inputs[positions]).to(engine.device)):
            scores = model(**vars(inputs), keep=None if seen is None else batch.targets)  # (B, N)
        if seen is not None:
            scores = seen.mask(scores, numbers, batch.targets)
        return target_ranks(scores, batch.targets)

    with evaluation_mode(model):
        batches = batches_within_cost(lambda mine: rows.token_counts[mine], batch_tokens)
        return rank_rows(rank, len(rows.rows), engine, batches)


def rank_answers(
    model: TitleRecommender,
    rows: TeacherRows,
    candidates: CandidateSampler,
    engine: Engine,
    *,
    batch_tokens: int = 8192,
) -> Tensor:
    """Rank each row's target among its candidates by the log-probability of their titles; a collective.

    Args:
        model: Unwrapped teacher. Its prompts list the candidates if it was trained with listed candidates.
        rows: Rows to rank, M of them.
        candidates: Draws C candidates per row, the same at every call.
        engine: Splits the rows among processes and gathers the ranks.
        batch_tokens: Prompt tokens per forward pass, padding included.

    Returns:
        0-based ranks below C, ties counted against the model, shape ``(M,)``, int64, on the CPU.
    """
    data = rows.data

    def listed(drawn: RowNumbers) -> RowNumbers | None:
        return drawn if model.lists_candidates else None

    def token_counts(positions: RowNumbers) -> RowNumbers:
        numbers = rows.rows[positions]
        history, lengths = data.histories(numbers)
        shown = listed(candidates.draw(numbers))
        return model.prompts.question_token_counts(history, lengths, shown, hybrid=model.is_hybrid)

    def rank(positions: RowNumbers) -> Tensor:
        numbers = rows.rows[positions]
        history, lengths, drawn = *data.histories(numbers), candidates.draw(numbers)
        gate_inputs = torch.from_numpy(rows.gate_inputs[positions]).to(engine.device)
        scores = model.candidate_log_probs(history, lengths, listed(drawn), gate_inputs, drawn)  # (B, C)
        targets = data.targets.numpy()[numbers]
        places = torch.from_numpy((drawn == targets[:, None]).argmax(axis=1)).to(scores.device)
        return target_ranks(scores, places)

    with evaluation_mode(model):
        return rank_rows(rank, len(rows.rows), engine, batches_within_cost(token_counts, batch_tokens))
