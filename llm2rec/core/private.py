"""What a record of a run keeps to itself: where somebody's home is, and secrets that got into an option."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["with_home", "without_secrets"]

_MASK = "***"
_SECRET_NAME = re.compile(r"(^|_)(token|password|passwd|secret|api_?key|credentials?)$", re.IGNORECASE)
_SECRETS = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),  # Hugging Face
    re.compile(r"\b(?:gh[opsu]_|github_pat_)[A-Za-z0-9_]{8,}"),
    re.compile(r"\bAKIA[A-Z0-9]{12,}"),  # Amazon
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user:password@ of an address
)


def without_secrets(value: Any) -> Any:
    """Write the home folder as ``~`` and mask what looks like a secret, in text or in plain values of any depth.

    Args:
        value: Text, numbers, lists and dictionaries.

    Returns:
        The same with other texts.
    """
    if isinstance(value, str):
        return _masked(value)
    if isinstance(value, Mapping):
        return {
            key: _MASK if isinstance(each, str) and each and _SECRET_NAME.search(str(key)) else without_secrets(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return value


def with_home(path: str) -> str:
    """Write ``~`` at the beginning of a path, as `without_secrets` left it, as the home folder of now."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _masked(text: str) -> str:
    for secret in _SECRETS:
        text = secret.sub(_MASK, text)
    try:
        home = str(Path.home())
    except RuntimeError:  # a user without a home, as in a container
        return text
    # Whole names only: /home/ann is not the beginning of /home/anna. And "/" is nobody's secret.
    return text if len(home) < 2 else re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])", "~", text)
