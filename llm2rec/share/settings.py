"""What `llm2rec.share` can be told; a Hydra schema and plain values at once."""

from dataclasses import dataclass

__all__ = ["ShareSettings"]


@dataclass
class ShareSettings:
    """What is put on the Hugging Face Hub; there is no option for a token, which would be written down.

    Attributes:
        run: Folder of a finished run, or of the student or teacher in it.
        repo: Id on the Hub, ``user/name``.
        private: Whether a new repository is private.
        base_model: Id on the Hub of a teacher's language model, where it was read from a folder.
        message: Of the commit.
    """

    run: str = "???"
    repo: str = "???"
    private: bool = True
    base_model: str | None = None
    message: str = "Add a model trained with llm2rec"
