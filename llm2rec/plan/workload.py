"""How much a job reads: items, rows, and tokens of their prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.train.batching import micro_batch_count
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.data import RecData
from llm2rec.plan.settings import PlanSettings
from llm2rec.student.datamodule import Rows
from llm2rec.teacher.prompts import PromptBuilder
from llm2rec.teacher.settings import PromptSettings, TeacherSettings
from llm2rec.teacher.title.prompts import TitlePrompts
from llm2rec.teacher.wording import plain_wordings, wordings_for

__all__ = ["EstimatedPrompts", "Workload", "rows_per_micro_batch", "workload_of"]

_SAMPLE = 20_000  # rows whose prompts are counted
_HISTORY = 10  # items of a history where no dataset is opened


@dataclass(frozen=True)
class Workload:
    """How much a job reads.

    Attributes:
        n_items: Items of the catalogue, N.
        n_rows: Training rows, all of which are labelled.
        n_train_rows: Rows that the teacher is trained on.
        n_validation_rows: Rows of a validation.
        history_length: Longest history, L.
        train_tokens: Mean tokens of a prompt in training, answer included.
        longest_tokens: Tokens of the longest of these.
        read_tokens: Mean tokens of a prompt in gate inputs and export.
        shortest_tokens: Tokens of the shortest of these, of which a batch holds most.
        title_tokens: Mean tokens of a title.
        answer_tokens: Tokens of the longest answer.
        data_bytes: Bytes of the prepared dataset.
    """

    n_items: int
    n_rows: int
    n_train_rows: int
    n_validation_rows: int
    history_length: int
    train_tokens: float
    longest_tokens: int
    read_tokens: float
    shortest_tokens: int
    title_tokens: float
    answer_tokens: int
    data_bytes: int


class EstimatedPrompts:
    """Token counts by the number of characters, for a tokenizer that is not available.

    Args:
        titles: Item titles.
        settings: Prompt texts and limits.
        domain: The dataset's word for an item.
        characters_per_token: Mean characters of a token.
    """

    def __init__(
        self, titles: Sequence[str], settings: PromptSettings, domain: str, characters_per_token: float
    ) -> None:
        def tokens(text: str) -> int:
            return int(-(-len(text) // characters_per_token))

        def texts(*, title_next: bool) -> tuple[int, int]:
            """Tokens around a history, and around a history and candidates, in the longest wording."""
            words = plain_wordings(settings.prefix, settings.suffix, domain, title_next=title_next)
            words = wordings_for(domain) if settings.wording == "domain" else words
            longest = [max(sum(map(tokens, each)) for each in kind) for kind in (words.histories, words.questions)]
            return 1 + longest[0], 1 + longest[1]

        self._texts, self._question_texts = texts(title_next=False)[0], texts(title_next=True)
        most = settings.max_title_tokens or max(map(tokens, titles), default=0)
        shown = [min(tokens(title), most) + tokens(settings.separator) for title in titles]
        self._titles = np.array(shown, np.int64)  # (N,)
        self._max_tokens, self._max_items = settings.max_tokens, settings.max_items

    def token_counts(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """As `PromptBuilder.token_counts`."""
        return np.minimum(self._texts + self._shown(history, lengths), self._max_tokens)

    def question_token_counts(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.integer] | None,
        targets: NDArray[np.integer],
    ) -> NDArray[np.int64]:
        """As `TitlePrompts.question_token_counts`."""
        counts = self._shown(history, lengths) + self._titles[targets] + 1
        without, listing = self._question_texts
        counts += without if candidates is None else listing + self._titles[candidates].sum(axis=1)
        return np.minimum(counts, self._max_tokens)

    def _shown(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """Tokens of the titles of a history, shape ``(B,)``."""
        ages = lengths[:, None] - 1 - np.arange(history.shape[1])  # (B, L), 0 for the most recent
        is_shown = (ages >= 0) & (ages < (self._max_items or np.inf))
        return np.where(is_shown, np.append(self._titles, 0)[history], 0).sum(axis=1)

    def title_token_counts(self) -> NDArray[np.int64]:
        """As `PromptBuilder.title_token_counts`."""
        return self._titles


def rows_per_micro_batch(training: TrainingSettings, gpus: int) -> int:
    """Rows of a GPU's largest micro-batch."""
    n_micro = micro_batch_count(training.batch_size, training.micro_batch_size, gpus)
    return -(-training.batch_size // (n_micro * gpus))


def workload_of(
    plan: PlanSettings,
    teacher: TeacherSettings,
    data: RecData | None,
    prompts: PromptBuilder | EstimatedPrompts | None,
) -> Workload:
    """Take sizes from the plan where it gives them, otherwise from the dataset.

    Args:
        plan: Sizes that replace the dataset's.
        teacher: Rows and objective.
        data: The dataset; None if the plan gives all sizes.
        prompts: Counts tokens; None without dataset.
    """
    n_rows = plan.n_rows or (len(data.splits["train"]) if data else 0)
    n_train = min(teacher.train_rows or n_rows, n_rows)
    tokens: Any = plan.prompt_tokens
    if data is None or prompts is None:
        assert tokens is not None, "the stage opens the dataset if a size is missing"
        history, n_validation, size = _HISTORY, 0, n_rows * 4 * (_HISTORY + 6)
        title = max(1, tokens // _HISTORY)
        counts: dict[str, Any] = {"title_tokens": title, "answer_tokens": title}
    else:
        history, n_train_split, validation = (
            data.history_length,
            len(data.splits["train"]),
            len(data.splits["validation"]),
        )
        counts = _counted(teacher, data, prompts)
        size = sum(file.stat().st_size for file in data.folder.rglob("*") if file.is_file())
        size = size * n_rows // max(1, n_train_split)
        n_validation = min(teacher.validation_rows or validation, validation)
    if tokens:
        counts |= dict.fromkeys(("train_tokens", "longest_tokens", "read_tokens", "shortest_tokens"), tokens)
    n_items = plan.n_items or (data.n_items if data else 0)
    return Workload(n_items, n_rows, n_train, n_validation, history, data_bytes=size, **counts)


def _counted(teacher: TeacherSettings, data: RecData, prompts: PromptBuilder | EstimatedPrompts) -> dict[str, float]:
    """Token counts of a sample of the training rows."""
    train = Rows.of(data, "train")
    generator = np.random.default_rng(0)
    rows = np.sort(generator.permutation(len(train))[:_SAMPLE])
    history, lengths = train.histories(rows)
    read = trained = prompts.token_counts(history, lengths)
    titles = prompts.title_token_counts()
    if teacher.objective == "title":
        n_candidates, targets = teacher.title.n_candidates, train.targets.numpy()[rows]
        listed = generator.integers(data.n_items, size=(len(rows), n_candidates)) if n_candidates else None
        trained = cast(TitlePrompts, prompts).question_token_counts(history, lengths, listed, targets)
    return {
        "train_tokens": float(trained.mean()),
        "longest_tokens": int(trained.max()),
        "read_tokens": float(read.mean()),
        "shortest_tokens": int(read.min()),
        "title_tokens": float(titles.mean()),
        "answer_tokens": int(titles.max()) + 1,
    }
