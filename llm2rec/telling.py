"""How an error is told: in one line where a user can do something about it, and once by all processes."""

import errno
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from llm2rec.core.errors import ConfigError, Llm2RecError
from llm2rec.core.processes import is_first_process

__all__ = ["TOLD", "is_told", "or_exit", "tell"]

logger = logging.getLogger("llm2rec")
TOLD = (Llm2RecError, OmegaConfBaseException, OSError)
_SECONDS_FOR_FIRST_PROCESS = 10.0
_BEGAN = time.strftime("%Y-%m-%d %H:%M:%S")  # as lines of log.txt begin
# What the place of a file is to blame for, not the code: a file where a folder is asked for, rights, room.
_OF_THE_PLACE = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


def is_told(error: Exception, log: Path) -> bool:
    """Tell an error that a user can do something about; False for a defect, of which nothing is told.

    Args:
        error: What a stage has met.
        log: The file that the first process logs to.
    """
    if not isinstance(error, TOLD):
        return False
    try:
        tell(error, log)
    except OSError:  # of which the code is to blame
        return False
    return True


def tell(error: Exception, log: Path | None = None) -> None:
    """Tell an error in one line; one of the operating system that the code is to blame for stays loud.

    Args:
        error: One of `TOLD`.
        log: The file that the first process logs to, in which others look whether it has told the same; None for a
            command of one process.

    Raises:
        OSError: The error itself, if it is such a one.
    """
    logger.debug("the error in full", exc_info=error)
    if isinstance(error, OSError) and not isinstance(error, Llm2RecError):
        error = _of_the_place(error)
    # One line, whatever library the message comes from.
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if log is None or is_first_process() or not _first_process_tells(line, log):
        logger.error("%s", line)


def _first_process_tells(line: str, log: Path) -> bool:
    """Whether the first process tells ``line`` too, in this launch and not in an earlier one that is resumed.

    What it meets as well it tells itself, and then the launcher ends us, at once or on a busy machine later. What it
    has not told after some seconds is ours alone, such as a loss that is not finite.
    """
    end = time.monotonic() + _SECONDS_FOR_FIRST_PROCESS
    while time.monotonic() < end:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        if any(each >= _BEGAN and each.endswith(f" ERROR {logger.name}: {line}") for each in lines):
            return True
        time.sleep(0.1)
    return False


def _of_the_place(error: OSError) -> ConfigError:
    """Say of an error of the operating system which place it is about.

    Raises:
        OSError: The error itself, if no place is to blame.
    """
    if error.errno not in _OF_THE_PLACE:
        raise error
    return ConfigError(f"{error.filename or 'a file'}: {error.strerror}; name another place, or make room there.")


def or_exit(function: Callable[..., str]) -> Callable[..., str]:
    """Tell an error of the run folder in one line: Hydra resolves it outside of what it guards, with a traceback."""

    def guarded(*arguments: Any) -> str:
        try:
            return function(*arguments)
        except (Llm2RecError, OSError) as error:
            told = error if isinstance(error, Llm2RecError) else _of_the_place(error)
            sys.stderr.write(f"{type(told).__name__}: {told}\n")  # no log is open yet
            sys.exit(1)

    return guarded
