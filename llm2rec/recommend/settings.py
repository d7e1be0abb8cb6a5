"""Recommend configuration (Hydra structured config)."""

from dataclasses import dataclass, field
from typing import ClassVar

from llm2rec.core.errors import ConfigError, Ignored

__all__ = ["EncoderSettings", "RecommendSettings"]


@dataclass
class EncoderSettings:
    """The language model that encodes the titles of new items: the one of the teacher outputs.

    Attributes:
        path: Its folder; None for where it was in training.
        trust_remote_code: Whether code that comes with the model may run.
    """

    path: str | None = None
    trust_remote_code: bool = False


@dataclass
class RecommendSettings:
    """Student and request; exactly one of ``history``, ``histories`` and ``export`` is set.

    Attributes:
        run: Folder of a finished run of `llm2rec.student` or `llm2rec.distill`, or an id on the Hugging Face Hub.
        revision: Branch, tag or commit on the Hub; None is the newest.
        history: One history, oldest first; ids and titles are taken as typed, those with a comma need quotes.
        histories: File of histories, one a line: a JSON list, or an object with a list under ``history``.
        output: File for the recommendations to ``histories``; None is the terminal.
        export: Folder to write the student to for other programs.
        formats: Formats of the export; see `llm2rec.recommend.export`.
        k: Items to recommend.
        by: What histories consist of: ``id`` or ``title``.
        unknown: Items that the model was not trained on: ``error`` or ``drop``.
        mask_seen: Whether items of the history are excluded; None does as the student was validated.
        search: ``exact`` or ``hnsw``.
        index: File of the index of ``hnsw``.
        items: Table of new items, with columns ``item_id`` and ``title``, for a student that reads texts: they are
            recommended and may be in histories.
        llm: The language model that encodes the titles of new items.
    """

    run: str = "???"
    revision: str | None = None
    history: list[str] | None = None
    histories: str | None = None
    output: str | None = None
    export: str | None = None
    formats: list[str] = field(default_factory=lambda: ["pt2", "onnx"])
    k: int = 10
    by: str = "id"
    unknown: str = "error"
    mask_seen: bool | None = None
    search: str = "exact"
    index: str | None = None
    items: str | None = None
    llm: EncoderSettings = field(default_factory=EncoderSettings)

    IGNORED: ClassVar[tuple[Ignored, ...]] = (
        Ignored(("formats",), "export", (None,)),
        Ignored(("llm.path", "llm.trust_remote_code"), "items", (None,)),
    )

    def check(self) -> None:
        """Reject a command with none or several of the three requests.

        Raises:
            ConfigError: If it does.
        """
        given = [name for name in ("history", "histories", "export") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{' and '.join(f'`{name}`' for name in given) or 'nothing'} is given, expected one of "
                "`'history=[...]'`, `histories=FILE` and `export=FOLDER`."
            )
        if self.output is not None and self.histories is None:
            raise ConfigError(
                f"`output` is {self.output!r}, but only answers to `histories=FILE` are written to a file."
            )
