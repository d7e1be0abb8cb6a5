"""Download models from the Hugging Face Hub, and upload folders.

`huggingface_hub` authenticates with ``HF_TOKEN`` or the login of ``hf auth login``. No function here takes a token, so
that none gets into a configuration, a log or a message.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llm2rec.core.errors import HubError
from llm2rec.core.files import without_secrets

__all__ = ["CARD", "PLACE", "SHARED", "is_hub_id", "is_hub_name", "obtained", "upload"]

SHARED = (".safetensors", ".json", ".txt", ".md", ".arrow", ".jinja", ".model")
"""Suffixes of uploaded and downloaded files; none of these formats runs code when it is read. ``.arrow`` holds the
items' names, the last two belong to tokenizers."""
CARD = "README.md"
"""Model card; the one file of a model's folder that people edit."""
PLACE = "FOLDER"
"""Placeholder in a card's example for the model's folder; `llm2rec.share` replaces it with the Hub id."""
_OF_RUNS = re.compile(r"results?|result_\d{8}_\d{6}")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(name: str) -> bool:
    """Whether a text has the form of a Hub id, ``user/name``."""
    return _ID.fullmatch(name) is not None


def is_hub_id(place: Path | str) -> bool:
    """Whether a place is a Hub id: a text ``user/name`` with no local folder ``user`` and not named as run folders are.

    A run that is mistyped or not there is therefore not looked up on the Hub. A `Path` is always local.
    """
    if not isinstance(place, str) or not is_hub_name(place) or Path(place).parent.exists():
        return False
    return not any(_OF_RUNS.fullmatch(part) for part in place.split("/"))


def obtained(place: Path | str, revision: str | None = None) -> Path:
    """The folder of a model: a local one, or the cached download of one on the Hub.

    Args:
        place: A folder, or a Hub id.
        revision: Branch, tag or commit on the Hub; None for the newest of ``main``.

    Raises:
        HubError: If the id is not on the Hub or cannot be downloaded, or a local folder is given with a revision.
    """
    if not is_hub_id(place):
        if revision is not None:
            raise HubError(f"`revision` is {revision!r}, but {str(place)!r} is a local folder; leave `revision` out.")
        return Path(place)
    from huggingface_hub import snapshot_download  # imported here: it takes half a second

    with _hub_errors(f"download {place!r}", f", and there is no folder {place!r}"):
        # Other files, such as pickles, are not downloaded.
        return Path(snapshot_download(str(place), revision=revision, allow_patterns=[f"*{end}" for end in SHARED]))


def upload(files: Mapping[str, Path], repo: str, *, private: bool, message: str) -> str:
    """Upload files to the Hub in one commit; creates the repository if it does not exist.

    Args:
        files: Files by their path in the repository.
        repo: Hub id, ``user/name``.
        private: Whether a new repository is private; an existing one is not changed.
        message: Commit message.

    Returns:
        URL of the commit.

    Raises:
        HubError: If the id is invalid, there is no login, or the Hub is unreachable or rejects the upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token  # imported here: it takes half a second

    if not is_hub_name(repo):
        raise HubError(f"`repo` is {repo!r}, expected an id on the Hub such as 'user/name'.")
    if get_token() is None:
        raise HubError(f"uploading to {repo!r} needs a login: run `hf auth login`, or set HF_TOKEN.")
    operations = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
    api = HfApi(library_name="llm2rec")
    with _hub_errors(f"upload to {repo!r}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")  # items.arrow
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)


@contextmanager
def _hub_errors(action: str, hint: str = "") -> Iterator[None]:
    """Convert errors of the Hub and the network to `HubError`.

    Args:
        action: What failed, for the message.
        hint: Added if the Hub knows no such id.

    Raises:
        HubError: Instead of any error of the Hub, of the network, or of their libraries.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RevisionNotFoundError as error:
        raise HubError(
            f"cannot {action}: `revision` does not exist on the Hub; give a branch, tag or commit."
        ) from error
    except RepositoryNotFoundError as error:
        remedy = "check the spelling" + (
            ", or log in if it is private (`hf auth login`, or HF_TOKEN)"
            if get_token() is None
            else "; if it is private, your account may not have access"
        )
        raise HubError(f"cannot {action}: the Hub knows no such id{hint}; {remedy}.") from error
    except (LocalEntryNotFoundError, HTTPError, OSError, RuntimeError, ValueError) as error:
        refused = isinstance(error, HfHubHTTPError)
        remedy = "check the permissions of your token" if refused else "connect to the network, or give a local folder"
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HubError(f"cannot {action} ({without_secrets(why)}); {remedy}.") from error
