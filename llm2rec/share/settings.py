"""Share configuration (Hydra structured config)."""

from dataclasses import dataclass

__all__ = ["ShareSettings"]


@dataclass
class ShareSettings:
    """What to upload. There is no option for a token, which would end up in logs.

    Attributes:
        run: Folder of a finished run, or of the student or teacher in it.
        repo: Hub id, ``user/name``.
        private: Whether a new repository is private.
        base_model: Hub id of a teacher's language model, if the teacher read it from a folder.
        message: Commit message.
    """

    run: str = "???"
    repo: str = "???"
    private: bool = True
    base_model: str | None = None
    message: str = "Add a model trained with llm2rec"
