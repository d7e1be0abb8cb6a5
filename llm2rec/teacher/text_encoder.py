"""Encode texts by pooled hidden states of a language model without training, and cache the vectors of titles."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import replaced_file, with_home, without_secrets
from llm2rec.core.logging import Progress
from llm2rec.core.train.engine import Engine
from llm2rec.teacher.llm import (
    load_model,
    load_tokenizer,
    model_identity,
    readable,
    resolve_precision,
    weights_changed,
    weights_hash,
    without_head,
)
from llm2rec.teacher.model_limits import check_hidden_states, check_positions, check_vocabulary
from llm2rec.teacher.prompt_layout import TokenBatch, padded_batch
from llm2rec.teacher.settings import LLMSettings, PromptSettings
from llm2rec.teacher.text_vectors import pooled_states
from llm2rec.teacher.tokenising import SegmentTokenizer, shortened

__all__ = ["TextEncoder", "about_encoder", "cached_vectors"]

_PROBE = ("A title", "Another one, part 2")  # not the dataset's: a text's tokens must not depend on other texts
_VERSION = 1  # increase when the same model and texts give other vectors


class TextEncoder:
    """Encodes texts, such as titles, by pooled hidden states of a frozen language model.

    A text is read as `PromptBuilder.titles` reads a title: special tokens around it, the separator behind.

    Args:
        model: The language model, in evaluation mode.
        tokenizer: Its tokenizer.
        settings: Pooling, separator and limits of a text.
        about: Return value of `about_encoder`.

    Attributes:
        device: Device of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: LLMSettings,
        about: Mapping[str, Any],
    ) -> None:
        self._model, self._settings, self._about = model, settings, dict(about)
        self._segments = SegmentTokenizer(tokenizer, _PROBE, settings.prompt.separator)
        self.device = cast(Tensor, model.get_input_embeddings().weight).device
        around = len(self._segments.begin) + len(self._segments.end)
        self._room = settings.prompt.max_tokens - around  # tokens of a text with its separator

    @classmethod
    def load(
        cls, settings: LLMSettings, device: torch.device, *, source: str | None = None, precision: str = "auto"
    ) -> "TextEncoder":
        """Load a language model and its tokenizer.

        Args:
            settings: The language model's settings; ``prompt`` gives separator and limits of a text.
            device: Device of the model.
            source: Return value of `llm2rec.teacher.llm.locate`; None for ``settings.path``.
            precision: Number format of the weights; ``auto`` is bfloat16 on a GPU, float32 on a CPU.

        Raises:
            ConfigError: If it cannot be loaded, or does not give hidden states of texts of this length.
        """
        source = settings.path if source is None else source
        precision = resolve_precision(precision, device)
        with readable(ConfigError, f"llm: {source!r} cannot be loaded", "Fetch its files again, or name another."):
            tokenizer = load_tokenizer(source, settings)
            model = load_model(source, settings, precision, device)
        check_positions(model, settings.prompt)
        check_hidden_states(model, source, "reading texts")
        return cls(model, tokenizer, settings, about_encoder(settings, source, precision))

    @classmethod
    def from_about(
        cls, about: Mapping[str, Any], device: torch.device, *, trust_remote_code: bool = False
    ) -> "TextEncoder":
        """Load the encoder that made some vectors, to encode further texts.

        Args:
            about: What `about` returned.
            device: Device of the model.
            trust_remote_code: Whether the model's own code may run, if it has any.

        Raises:
            CheckpointError: If ``about`` is damaged, the model has other weights now, or it runs code of its own
                and ``trust_remote_code`` is false.
            ConfigError: If the model cannot be loaded.
        """
        try:
            source, prompt = with_home(about["source"]), PromptSettings(**about["prompt"])
            needs_code, weights, revision = about["trust_remote_code"], about["weights"], about["revision"]
            settings = LLMSettings(about["name"], source, about["pooling"], prompt, bool(needs_code))
            precision = str(about["precision"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the record of a text encoder is damaged ({error!r}): {about!r}.") from error
        if needs_code and not trust_remote_code:
            raise CheckpointError(f"{source!r} runs code of its own; review it, then pass `trust_remote_code=True`.")
        if weights_changed(source, weights) or (revision and _revision(source, settings) != revision):
            raise CheckpointError(
                f"the language model at {source!r} is not the one that encoded the other texts (its weights or its "
                "revision differ); restore the original."
            )
        return cls.load(settings, device, precision=precision)

    def about(self) -> dict[str, Any]:
        """What identifies the encoder, as plain values for a manifest; see `about_encoder`."""
        return dict(self._about)

    def encode(self, texts: Sequence[str], progress: Progress | None = None, batch_tokens: int = 8192) -> Tensor:
        """Encode texts.

        Args:
            texts: M texts; longer ones than ``llm.prompt.max_tokens`` are cut at the end.
            progress: An open one counts the texts; None shows one, with speed and time left.
            batch_tokens: Tokens per forward pass, padding included.

        Returns:
            Shape ``(M, d)``, float32, on the CPU, neither centred nor scaled. A text's vector depends on no other text,
            up to rounding.

        Raises:
            ConfigError: If the tokenizer gives a token that the model does not have.
        """
        if progress is None:
            with Progress("texts", len(texts), "text") as shown:
                return self.encode(texts, shown, batch_tokens)
        if not len(texts):
            return torch.empty(0, self._model.config.get_text_config().hidden_size)
        rows = self._tokens(texts)
        counts = np.array([len(row) for row in rows], np.int64)
        largest = max(self._segments.pad_id, *(int(row.max()) for row in rows))
        check_vocabulary(self._model, largest, self._segments.tokenizer, self._about["source"])

        def batch(numbers: NDArray[np.int64]) -> TokenBatch:
            return padded_batch([rows[number] for number in numbers.tolist()], self._segments.pad_id)

        pooling, llm = self._settings.pooling, without_head(self._model)
        return pooled_states(llm, counts, batch, pooling, self.device, batch_tokens, progress=progress)

    def _tokens(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Tokens of each text, at least one."""
        segments, prompt = self._segments, self._settings.prompt
        cut = shortened(texts, segments, prompt.max_title_tokens)
        spaced = [f"{segments.space}{text}{prompt.separator}" for text in cut]
        begin, end = (np.asarray(part, np.int64) for part in (segments.begin, segments.end))
        rows = [
            np.concatenate([begin, np.asarray(tokens[: self._room], np.int64), end])
            for tokens in segments.all(spaced, split_special=True)
        ]
        return [row if len(row) else np.array([segments.pad_id]) for row in rows]


def about_encoder(settings: LLMSettings, source: str, precision: str) -> dict[str, Any]:
    """What identifies an encoder, without loading its weights.

    Args:
        settings: The language model's settings.
        source: Return value of `llm2rec.teacher.llm.locate`.
        precision: Number format of the weights, resolved.

    Returns:
        ``name``, ``source`` (a folder, with the home folder as ``~``, or a Hub id), ``revision`` (of a Hub id),
        ``weights`` (`weights_hash` of a folder), ``pooling``, ``precision``, ``prompt`` (arguments of
        `PromptSettings` that decide a text's tokens) and ``trust_remote_code``.
    """
    of_text = ("separator", "max_tokens", "max_title_tokens")
    return {
        "name": settings.name,
        "source": without_secrets(source),
        "revision": _revision(source, settings),
        "weights": weights_hash(source),
        "pooling": settings.pooling,
        "precision": precision,
        "prompt": {name: getattr(settings.prompt, name) for name in of_text},
        "trust_remote_code": settings.trust_remote_code,
    }


def _revision(source: str, settings: LLMSettings) -> str | None:
    """Commit of a model on the Hub; None for a folder."""
    if Path(source).is_dir():
        return None
    config = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    return getattr(config, "_commit_hash", None)


def cached_vectors(
    texts: Sequence[str],
    settings: LLMSettings,
    source: str,
    folder: Path,
    engine: Engine,
    *,
    precision: str = "auto",
    block_rows: int = 2048,
) -> tuple[Tensor, dict[str, Any]]:
    """Vectors of the titles of a dataset, from disk or computed in blocks that are kept; a collective.

    Args:
        texts: M texts, at least 1.
        settings: The language model's settings.
        source: Return value of `llm2rec.teacher.llm.locate`.
        folder: Folder of the caches; a subfolder is named after encoder and texts.
        engine: Splits the blocks among processes, and gives the device.
        precision: As of `TextEncoder.load`.
        block_rows: Texts per file.

    Returns:
        Shape ``(M, d)``, float32, as `TextEncoder.encode` returns; and `TextEncoder.about` of the encoder.

    Raises:
        ConfigError: If the language model cannot be loaded or cannot read texts.
    """
    about = about_encoder(settings, source, resolve_precision(precision, engine.device))
    identity = {key: value for key, value in about.items() if key != "name"}
    parts = [_VERSION, block_rows, identity, model_identity(source), list(texts)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    place = folder / digest.hexdigest()[:16]
    files = [place / f"block_{number:06d}.npy" for number in range(-(-len(texts) // block_rows))]
    if mine := engine.my_missing(files):
        encoder = TextEncoder.load(settings, engine.device, source=source, precision=precision)
        blocks = {number: texts[number * block_rows : (number + 1) * block_rows] for number in mine}
        with engine.rows_progress("text vectors", sum(map(len, blocks.values()))) as progress:
            for number, block in blocks.items():
                vectors = encoder.encode(block, progress).numpy()
                with replaced_file(files[number]) as aside, open(aside, "wb") as file:
                    np.save(file, vectors, allow_pickle=False)
    engine.wait()
    return torch.from_numpy(np.concatenate([np.load(file, allow_pickle=False) for file in files])), about
