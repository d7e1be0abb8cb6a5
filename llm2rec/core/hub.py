"""The Hugging Face Hub: models fetched by their id, folders put there.

Who is asking is the business of `huggingface_hub`, which reads ``HF_TOKEN`` or what ``hf auth login`` left; no function
here takes a token, so that none can get into a configuration, a log or a message.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llm2rec.core.errors import HubError
from llm2rec.core.files import without_secrets

__all__ = ["SHARED", "is_hub_id", "is_hub_name", "obtained", "upload"]

SHARED = (".safetensors", ".json", ".txt", ".md", ".arrow", ".jinja", ".model")
"""Ends of the files that are put on the Hub and fetched from it: none of them can hold code that runs when it is read.
``.arrow`` names the items, the last two belong to tokenizers."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(name: str) -> bool:
    """Whether a text is written like an id on the Hub, ``user/name``."""
    return _ID.fullmatch(name) is not None


def is_hub_id(place: Path | str) -> bool:
    """Whether a place means a model on the Hub: written ``user/name``, and neither it nor ``user`` lies here.

    A mistyped run of a folder of results is therefore looked for here alone. A `Path` always lies here.
    """
    return isinstance(place, str) and is_hub_name(place) and not Path(place).parent.exists()


def obtained(place: Path | str, revision: str | None = None) -> Path:
    """The folder of a model: the one named, or a copy of one on the Hub, fetched once.

    Args:
        place: A folder, or an id on the Hub.
        revision: Branch, tag or commit there; None is the newest of ``main``.

    Raises:
        HubError: If the id is not on the Hub or cannot be fetched, or a folder here is to have a revision.
    """
    if not is_hub_id(place):
        if revision is not None:
            raise HubError(
                f"`revision` is {revision!r}, but {str(place)!r} is a place here, which has none; leave it out."
            )
        return Path(place)
    from huggingface_hub import snapshot_download  # half a second to import, which folders need not pay

    with _told(f"fetch {place!r}", f", and there is no folder {place!r} here"):
        # Whatever else lies there, such as pickles, stays there.
        return Path(snapshot_download(str(place), revision=revision, allow_patterns=[f"*{end}" for end in SHARED]))


def upload(files: Mapping[str, Path], repo: str, *, private: bool, message: str) -> str:
    """Put files on the Hub in one commit; a repository that is not there yet is made.

    Args:
        files: What to put there, by its path in the repository.
        repo: Its id, ``user/name``.
        private: Whether a new repository is private; one that is there stays what it is.
        message: Of the commit.

    Returns:
        The commit's address.

    Raises:
        HubError: If the id cannot be one, nobody is logged in, or the Hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token  # half a second to import

    if not is_hub_name(repo):
        raise HubError(f"`repo` is {repo!r}, expected an id on the Hub such as 'user/name'.")
    if get_token() is None:
        raise HubError(f"nobody is logged in to put {repo!r} on the Hub; `hf auth login`, or set HF_TOKEN.")
    operations = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
    api = HfApi(library_name="llm2rec")
    with _told(f"put {repo!r} there"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")  # items.arrow
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)


@contextmanager
def _told(doing: str, besides: str = "") -> Iterator[None]:
    """Tell what the Hub's library raises in one form.

    Args:
        doing: What is being done.
        besides: What else to say where the Hub knows no such id.

    Raises:
        HubError: Instead of any error of the Hub, of the network, or of either's libraries.
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
        raise HubError(f"cannot {doing}: the Hub knows no such `revision`; name a branch, tag or commit.") from error
    except RepositoryNotFoundError as error:
        remedy = "look at the spelling" + (
            ", or log in if it is private (`hf auth login`, or HF_TOKEN)"
            if get_token() is None
            else "; if it is private, whoever is logged in may not read it"
        )
        raise HubError(f"cannot {doing}: the Hub knows no such id{besides}; {remedy}.") from error
    except (LocalEntryNotFoundError, HTTPError, OSError, RuntimeError, ValueError) as error:
        refused = isinstance(error, HfHubHTTPError)
        remedy = "look at what your token may do" if refused else "connect to the network, or name a folder"
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HubError(f"cannot {doing} ({without_secrets(why)}); {remedy}.") from error
