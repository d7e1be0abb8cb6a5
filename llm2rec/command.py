"""Commands: compose the configuration of the command line, call a function with it, report errors in one line."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from llm2rec.composition import check_added, check_flags, explained
from llm2rec.config import register, schemas_of, texts_of_command
from llm2rec.core.errors import ConfigError, Llm2RecError
from llm2rec.core.logging import quiet_libraries
from llm2rec.core.paths import conf_folder, run_folder
from llm2rec.core.processes import is_first_to_report
from llm2rec.overrides import check_read
from llm2rec.reporting import Failed, error_line, interrupt_ends, report

__all__ = ["overrides_last", "question", "run_command", "run_folder_or_exit"]

_FULL_ERROR = "HYDRA_FULL_ERROR"


def question(name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Turn a function of a configuration of its own, ``conf/<name>.yaml``, into a command without a run folder.

    Errors are reported as those of a `stage`.

    Args:
        name: Name of the command and of its configuration.
    """

    def decorate(function: Callable[[Any], None]) -> Callable[[], None]:
        def answer(cfg: DictConfig) -> None:
            quiet_libraries()
            try:
                check_read(cfg, HydraConfig.get().overrides.task)
                check_added(cfg, HydraConfig.get().overrides.task, schemas_of(name))
                function(cfg)
            except Exception as error:
                if not report(error):
                    raise
                raise Failed(error) from error

        def main() -> None:
            register(name=name, about=inspect.getdoc(sys.modules[function.__module__]) or name)
            run_command(answer, name, name)

        return main

    return decorate


def run_command(function: Callable[[Any], None], name: str, config_name: str) -> None:
    """Compose the configuration from the command line and call ``function`` with it.

    Args:
        function: Called with the configuration.
        name: Name of the command.
        config_name: Name of its configuration in `conf/`.

    Raises:
        Failed: After an error was reported in one line.
    """
    # Hydra takes the task's name from the function's module, which is "__main__" for every stage.
    function.__module__ = f"llm2rec.{name}"
    schemas, arguments = schemas_of(config_name), sys.argv[1:]
    try:
        with interrupt_ends(), _raising(), explained(schemas):
            check_flags(arguments, schemas)
            sys.argv[1:] = texts_of_command(overrides_last(arguments), config_name)
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(function)()
    except ConfigError as error:
        raise _reported(error) from error


@contextmanager
def _raising() -> Iterator[None]:
    """Context in which Hydra raises errors instead of printing them and ending the process."""
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FULL_ERROR]
        else:
            os.environ[_FULL_ERROR] = before


def run_folder_or_exit(*arguments: Any) -> str:
    """`run_folder`; its errors end the command here, since Hydra would print them with a traceback."""
    try:
        return run_folder(*arguments)
    except (Llm2RecError, OSError) as error:
        if error_line(error) is None:
            raise
        raise _reported(error) from error


def _reported(error: Exception) -> Failed:
    """Report an error while no log is open."""
    line = str(error_line(error))
    if is_first_to_report(line):
        sys.stderr.write(f"{line}\n")
    return Failed(error)


def overrides_last(arguments: Sequence[str]) -> list[str]:
    """Move overrides behind all options.

    argparse, which Hydra uses, rejects overrides on both sides of an option (``a=1 --multirun b=2``).
    """
    return sorted(arguments, key=lambda each: not each.startswith("-") and ("=" in each or each.startswith("~")))
