"""Export a student as one file for other programs: padded histories in, top-k items out."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pyarrow import feather
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError
from llm2rec.core.files import replaced_folder, write_json
from llm2rec.core.logging import progress
from llm2rec.recommend.names import ItemNames
from llm2rec.student.models import SequentialRecommender

__all__ = ["EXPORTED", "BestItems", "export_onnx", "export_program", "export_student"]

EXPORTED = {"pt2": "model.pt2", "onnx": "model.onnx"}
"""Files by format."""
_ONE_FILE = 1_500_000_000  # bytes of weights; larger ones go to a separate file, since an ONNX file holds up to 2 GB
_INPUTS, _OUTPUTS = ("history", "lengths"), ("scores", "items")


class BestItems(nn.Module):
    """A student and an exact search in one graph.

    All items are scored in one matrix product with the rounding of the runtime. `Recommender` scores more precisely, so
    that the order of items with nearly equal scores may differ.

    Args:
        model: The student.
        k: How many items.
        mask_seen: Whether items of the (truncated) history are excluded.

    Raises:
        ConfigError: If the catalogue has fewer than ``k`` items.
    """

    def __init__(self, model: SequentialRecommender, k: int = 10, mask_seen: bool = True) -> None:
        super().__init__()
        if not 1 <= k <= model.n_items:
            raise ConfigError(f"`k` is {k}, expected 1 to the {model.n_items} items of the catalogue.")
        self.model, self.k, self.mask_seen = model.eval(), k, mask_seen

    def forward(self, history: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Find the best items.

        Args:
            history: Item ids of shape ``(B, L)``, int64, oldest first, padded on the right with N; L is the longest
                history that the student reads.
            lengths: Real items per row, shape ``(B,)``, int64, at least 1.

        Returns:
            Scores and item ids, shape ``(B, k)``, best first. Where a row leaves fewer than k items, scores are
            ``-inf``.
        """
        scores = self.model.score(self.model(history, lengths))
        if self.mask_seen:
            with_padding = nn.functional.pad(scores, (0, 1))  # a column for the padding id
            scores = with_padding.scatter(1, history, -torch.inf)[:, :-1]
        values, items = scores.topk(self.k)
        return values, items


def _example(model: SequentialRecommender) -> tuple[Tensor, Tensor]:
    history = torch.full((3, model.max_length), model.n_items)
    history[:, 0] = 0
    return history, torch.ones(3, dtype=torch.int64)


_DYNAMIC = {"history": {0: torch.export.Dim("batch", min=1)}, "lengths": {0: torch.export.Dim("batch", min=1)}}


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence warnings from inside the exporters: deprecations in torch, folded constants, torchvision."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for category in (UserWarning, FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def export_program(module: BestItems, file: Path) -> None:
    """Write the module with `torch.export`; ``torch.export.load(file).module()`` runs it, for any number of rows."""
    with _quietly():
        program = torch.export.export(module.eval(), _example(module.model), dynamic_shapes=_DYNAMIC)
        torch.export.save(program, file)


def export_onnx(module: BestItems, file: Path) -> None:
    """Write the module as ONNX, for any number of rows.

    Raises:
        ConfigError: If onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401  # only those who export need them
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "ONNX needs onnx and onnxscript, which are not installed: `pip install 'llm2rec[serve]'`, or leave `onnx` "
            "out of `formats`."
        ) from error
    n_bytes = sum(each.numel() * each.element_size() for each in module.state_dict().values())
    with _quietly():
        torch.onnx.export(
            module.eval(),
            _example(module.model),
            str(file),
            input_names=_INPUTS,
            output_names=_OUTPUTS,
            dynamic_shapes=_DYNAMIC,
            dynamo=True,
            external_data=n_bytes > _ONE_FILE,
            verbose=False,
        )


def export_student(
    model: SequentialRecommender,
    names: ItemNames,
    folder: Path,
    *,
    k: int = 10,
    mask_seen: bool = True,
    formats: tuple[str, ...] = ("pt2",),
) -> None:
    """Write a student in some formats, with ``export.json``, which describes inputs and outputs.

    Args:
        model: The student.
        names: Ids and titles of its items, written to ``items.arrow``.
        folder: Folder to write; an earlier export there is replaced.
        k: How many items.
        mask_seen: Whether items of the history are excluded.
        formats: Keys of `EXPORTED`.

    Raises:
        ConfigError: If a format is unknown, a package is missing, the catalogue has fewer than ``k`` items, or the
            folder is not an earlier export.
    """
    writers = {"pt2": export_program, "onnx": export_onnx}
    if not formats or set(formats) - writers.keys():
        raise ConfigError(f"`formats` is {list(formats)}, expected some of {', '.join(writers)}.")
    if folder.exists() and not (folder / "export.json").is_file():
        raise ConfigError(f"`export` is {str(folder)!r}, which exists and is not an earlier export; give a new folder.")
    module = BestItems(model, k, mask_seen)
    about: dict[str, Any] = {
        "inputs": {
            "history": f"int64 (batch, {model.max_length}): items, oldest first, then {model.n_items} as padding",
            "lengths": "int64 (batch,): real items of each row, at least 1",
        },
        "outputs": {"scores": f"float32 (batch, {k}), best first", "items": f"int64 (batch, {k}): rows of items.arrow"},
        "padding": model.n_items,
        "max_length": model.max_length,
        "k": k,
        "mask_seen": mask_seen,
    }
    with replaced_folder(folder) as aside:
        for name in progress(formats, "export", len(formats), "format"):
            writers[name](module, aside / EXPORTED[name])
        feather.write_feather(names.table(), str(aside / "items.arrow"), compression="uncompressed")
        write_json(aside / "export.json", about)
