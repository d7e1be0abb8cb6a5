"""``accelerate launch`` that ends with the error of the stage, not with a traceback of the launcher; same arguments."""

import logging
import signal
import subprocess
import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Launch; returns the exit code."""
    arguments = launch_command_parser().parse_args()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, lambda *_: None)  # the stage gets Ctrl-C too and ends when it has stored its step
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        return _code(error.returncode)
    except ChildFailedError as error:
        return _code(error.get_first_failure()[1].exitcode)
    except SignalException as end:
        return 128 + int(end.sigval)
    return 0


def _code(exit_code: int) -> int:
    """The exit code of a shell; a process that was killed has reported nothing."""
    if exit_code >= 0:
        return exit_code
    sys.stderr.write(f"a process was killed by signal {-exit_code} (9: most likely the machine ran out of memory)\n")
    return 128 - exit_code


if __name__ == "__main__":
    sys.exit(main())
