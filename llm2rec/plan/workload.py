"""How much there is to read: items, rows, and the tokens of their prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.train.batching import OptimizerStep, TrainingUnits, epoch_batches, micro_batch_count, micro_batches
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.data import RecData
from llm2rec.plan.settings import PlanSettings
from llm2rec.student.datamodule import Rows
from llm2rec.teacher.prompt_layout import PromptLayout, PromptRows
from llm2rec.teacher.settings import PromptSettings, TeacherSettings
from llm2rec.teacher.wording import plain_wordings, wordings_for

__all__ = ["EstimatedPrompts", "Prompts", "Workload", "rows_per_micro_batch", "workload_of"]

_SAMPLE = 20_000  # rows whose prompts are counted


@dataclass(frozen=True)
class Workload:
    """What is to be read.

    Attributes:
        n_items: Items of the catalogue, N.
        n_rows: Training rows, all of which are labelled.
        n_train_rows: Those that the teacher is trained on.
        n_validation_rows: Rows of an evaluation.
        history_length: Items of a history at most, L.
        train_tokens: Mean tokens of a prompt in training, padding included.
        longest_tokens: Tokens of the longest prompt.
        read_tokens: Mean tokens of a prompt that is only read.
        shortest_tokens: Tokens of the shortest of these, of which most go into a batch.
        title_tokens: Mean tokens of a title.
        answer_tokens: Tokens of the longest answer.
        data_bytes: Bytes of the prepared dataset.
        sources: How each of it is known, by what it is.
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
    sources: dict[str, str]


class Prompts(Protocol):
    """Counts the tokens of prompts: `PromptBuilder`, or `EstimatedPrompts`."""

    def token_counts(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """Tokens of prompts with a history alone, shape ``(B,)``."""

    def answered_token_counts(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.integer] | None,
        targets: NDArray[np.integer],
    ) -> NDArray[np.int64]:
        """Tokens of the title task's prompts, with their answers, shape ``(B,)``."""

    def title_token_counts(self) -> NDArray[np.int64]:
        """Tokens of each title, separator included, shape ``(N,)``."""


class EstimatedPrompts:
    """Prompts of a tokenizer that is not at hand: so many characters a token, laid out and cut as real ones are.

    Args:
        titles: Item titles.
        settings: Texts around them, and limits.
        domain: The dataset's word for an item.
        characters_per_token: Mean characters of a token.
    """

    def __init__(
        self, titles: Sequence[str], settings: PromptSettings, domain: str, characters_per_token: float
    ) -> None:
        def tokens(text: str) -> list[int]:
            return [0] * int(-(-len(text) // characters_per_token))

        most = settings.max_title_tokens
        shown = [[*tokens(title)[:most], *tokens(settings.separator)] for title in titles]

        def layout(title_next: bool, answers: list[list[int]]) -> tuple[PromptLayout, PromptLayout]:
            words = plain_wordings(settings.prefix, settings.suffix, domain, title_next=title_next)
            words = wordings_for(domain) if settings.wording == "domain" else words
            ids = {"placeholder_id": 0, "pad_id": 0}
            fixed: dict[str, Any] = {**ids, "max_tokens": settings.max_tokens, "max_items": settings.max_items}
            without, listing = (
                PromptLayout(
                    shown, [[[0, *tokens(first)], *map(tokens, rest)] for first, *rest in texts], answers, **fixed
                )
                for texts in (words.histories, words.questions)
            )
            return without, listing

        self._plain = layout(False, [])[0]
        self._open, self._closed = layout(True, [[*title, 0] for title in shown])
        self._n_items = len(titles)

    def token_counts(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """See `Prompts`."""
        return self._plain.token_counts(PromptRows(history, lengths))

    def answered_token_counts(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.integer] | None,
        targets: NDArray[np.integer],
    ) -> NDArray[np.int64]:
        """See `Prompts`."""
        layout = self._open if candidates is None else self._closed
        return layout.token_counts(PromptRows(history, lengths, candidates), targets)

    def title_token_counts(self) -> NDArray[np.int64]:
        """See `Prompts`."""
        return self._plain.lengths[: self._n_items]


def rows_per_micro_batch(training: TrainingSettings, gpus: int) -> int:
    """Rows of the largest micro-batch of a GPU."""
    n_micro = micro_batch_count(training.batch_size, training.micro_batch_size, gpus)
    return -(-training.batch_size // (n_micro * gpus))


def workload_of(
    plan: PlanSettings, teacher: TeacherSettings, data: RecData | None, prompts: Prompts | None, gpus: int, said: str
) -> Workload:
    """Take sizes from the dataset, and from the plan where it gives them.

    Args:
        plan: Sizes in place of the dataset's.
        teacher: Rows, and kind of prompts.
        data: The dataset; None where the plan gives all.
        prompts: Counts tokens; None where there is no dataset.
        gpus: How many share the rows.
        said: How ``prompts`` counts.
    """
    n_rows = plan.n_rows or (len(data.splits["train"]) if data else 0)
    n_train = min(teacher.train_rows or n_rows, n_rows)
    if data is None or prompts is None:
        assert plan.prompt_tokens is not None, "the stage opens the dataset where something is missing"
        tokens = plan.prompt_tokens
        history = 10
        title = max(1, tokens // history)
        counts: dict[str, Any] = {
            "train_tokens": tokens, "longest_tokens": tokens, "read_tokens": tokens, "shortest_tokens": tokens,
            "title_tokens": title, "answer_tokens": title,
        }  # fmt: skip
        size, n_validation = n_rows * 4 * (history + 6), 0
        sources = {"titles": f"a tenth of a prompt: {title} tokens", "histories": f"{history} items"}
    else:
        counts, history = _counted(teacher, data, prompts, gpus), data.history_length
        if plan.prompt_tokens:
            given = ("train_tokens", "longest_tokens", "read_tokens", "shortest_tokens")
            counts |= dict.fromkeys(given, plan.prompt_tokens)
        size = sum(file.stat().st_size for file in data.folder.rglob("*") if file.is_file())
        size = size * n_rows // max(1, len(data.splits["train"]))
        n_validation = min(teacher.validation_rows or len(data.splits["validation"]), len(data.splits["validation"]))
        sources = {"titles": said, "histories": f"{data.name}: at most {history} items"}
    name = data.name if data else ""
    sources |= {
        "items": "plan.n_items" if plan.n_items else name,
        "rows": "plan.n_rows" if plan.n_rows else name,
        "prompts": "plan.prompt_tokens" if plan.prompt_tokens else said,
    }
    n_items = plan.n_items or (data.n_items if data else 0)
    return Workload(n_items, n_rows, n_train, n_validation, history, data_bytes=size, sources=sources, **counts)


def _counted(teacher: TeacherSettings, data: RecData, prompts: Prompts, gpus: int) -> dict[str, float]:
    """Tokens of a sample of the training rows, in the batches that training makes of them."""
    train = Rows.of(data, "train")
    generator = np.random.default_rng(0)
    rows = np.sort(generator.permutation(len(train))[:_SAMPLE])
    history, lengths = train.histories(rows)
    read = trained = prompts.token_counts(history, lengths)
    titles = prompts.title_token_counts()
    if teacher.objective == "title":
        n_candidates, targets = teacher.title.n_candidates, train.targets.numpy()[rows]
        listed = generator.integers(data.n_items, size=(len(rows), n_candidates)) if n_candidates else None
        trained = prompts.answered_token_counts(history, lengths, listed, targets)
    return {
        "train_tokens": _with_padding(trained, teacher.training, gpus),
        "longest_tokens": int(trained.max()),
        "read_tokens": float(read.mean()),
        "shortest_tokens": int(read.min()),
        "title_tokens": float(titles.mean()),
        "answer_tokens": int(titles.max()) + 1,
    }


def _with_padding(counts: NDArray[np.int64], training: TrainingSettings, gpus: int) -> float:
    """Mean tokens of a row when each is padded to the longest of its micro-batch."""
    units = TrainingUnits(np.arange(len(counts)), lengths=counts)
    batches = epoch_batches(units, training.batch_size, 0, 0)
    n_micro = micro_batch_count(training.batch_size, training.micro_batch_size, gpus)
    steps = [OptimizerStep(number, 0, batch, len(batch)) for number, batch in enumerate(batches)]
    micro = [each.units for step in steps for each in micro_batches(step, n_micro, 0, gpus)]
    sizes = np.array([len(rows) for rows in micro])
    return float((np.array([counts[rows].max() for rows in micro]) * sizes).sum() / sizes.sum())
