"""Report errors and interruptions of a command to its user, in one line each."""

import errno
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf.errors import OmegaConfBaseException

from llm2rec.core.errors import ConfigError, Interrupted, Llm2RecError, NonFiniteError, OutOfMemoryError, StorageError
from llm2rec.core.processes import is_first_to_report

__all__ = ["Failed", "error_line", "exit_code", "interrupt_as_error", "interrupt_ends", "is_refusal", "report"]

logger = logging.getLogger("llm2rec")
# Errors of the operating system that are caused by the user's path: no permission, no space, a file for a folder.
_OF_THE_PATH = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


class Failed(SystemExit):
    """Ends a command after its error was reported.

    Attributes:
        error: The error.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(exit_code(error))
        self.error = error


def error_line(error: Exception) -> str | None:
    """The line that reports an error that the user can act on; None for an unexpected one."""
    if isinstance(error, OSError) and not isinstance(error, Llm2RecError) and error.errno in _OF_THE_PATH:
        error = ConfigError(f"{error.filename or 'a file'}: {error.strerror}; use another path or free space.")
    if not isinstance(error, Llm2RecError | OmegaConfBaseException):
        return None
    return f"{type(error).__name__}: {' '.join(str(error).split())}"  # one line, whichever library wrote the message


def report(error: Exception) -> bool:
    """Log an error that the user can act on, in one line, by the first process that raises it.

    Returns:
        False for an unexpected error, of which nothing is logged.
    """
    if (line := error_line(error)) is None:
        return False
    logger.debug("the error in full", exc_info=error)
    if is_first_to_report(line):
        if logger.isEnabledFor(logging.ERROR):
            logger.error("%s", line)
        else:  # hydra/job_logging=disabled
            sys.stderr.write(line + "\n")
    return True


@contextmanager
def interrupt_as_error(remedy: str = "") -> Iterator[None]:
    """Raise `Interrupted` instead of `KeyboardInterrupt` or with the ``remedy`` added to its message."""
    try:
        yield
    except KeyboardInterrupt as error:
        number = int(error.args[0]) if error.args else signal.SIGINT
        cause = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        raise Interrupted(f"{cause} received.{remedy}", number) from error
    except Interrupted as error:
        raise Interrupted(f"{error}{remedy}", error.signal_number) from error


@contextmanager
def interrupt_ends() -> Iterator[None]:
    """End the command with one line on Ctrl-C outside a run: while it is composed, or in a `question`."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: Ctrl-C received.\n")
        sys.exit(exit_code(Interrupted("", signal.SIGINT)))


def exit_code(error: Exception) -> int:
    """1, or what a shell gives a process that is ended by a signal."""
    return 128 + error.signal_number if isinstance(error, Interrupted) else 1


def is_refusal(error: Exception) -> bool:
    """Whether an error may have ended a run before it began: not one of a training, a disk or an interruption."""
    began = NonFiniteError, OutOfMemoryError, StorageError, Interrupted
    return error_line(error) is not None and not isinstance(error, began)
