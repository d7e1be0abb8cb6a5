"""What every stage's ``__main__`` begins with: compose the configuration, open the run, tell errors plainly."""

import logging
import math
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from llm2rec.config import Config, MetricsConfig, register
from llm2rec.core.errors import ConfigError, Interrupted, Llm2RecError
from llm2rec.core.files import without_secrets
from llm2rec.core.paths import conf_folder, from_launch_folder, run_folder
from llm2rec.core.processes import agree, is_first_process, n_processes, uses_gpu
from llm2rec.core.run import Run
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.data import DatasetSpec, RecData, prepare
from llm2rec.reuse import made_by_other_code, same_runs
from llm2rec.telling import TOLD, is_told, or_exit, tell

__all__ = ["build", "built_object", "open_data", "open_engine", "question", "stage"]

logger = logging.getLogger("llm2rec")
Settings = TypeVar("Settings")


def stage(
    name: str,
    reads: tuple[str, ...] | None = None,
    is_current: Callable[[Config, Path], bool] = lambda cfg, folder: True,
) -> Callable[[Callable[[Config, Run], None]], Callable[[], None]]:
    """Turn a function of configuration and run into a command.

    The command composes `conf/` with the overrides of the command line, opens the run folder, and turns our own errors
    into one line and exit code 1; the traceback goes to the run's log. Any other error is a defect and stays loud. In a
    sweep (``--multirun``) a job that fails leaves the others alone, and the exit code tells of it in the end.

    Args:
        name: Name of the stage.
        reads: Parts of the configuration that decide what it makes, besides dataset and seed, so that ``reuse=true``
            can find a run that has made it already; None for a stage that is always run.
        is_current: Whether what such a run has made is still there, and what it has read is still the same.
    """

    def decorate(function: Callable[[Config, Run], None]) -> Callable[[], None]:
        failed: list[int] = []  # jobs of a sweep

        def run_stage(cfg: DictConfig) -> None:
            job = HydraConfig.get()
            _quiet_libraries()
            try:
                _check_common(cfg, name, reads)
                _carry_out(cfg, Path(job.runtime.output_dir), name, function, reads or (), is_current)
            except Exception as error:
                told = is_told(error, Path(job.runtime.output_dir) / "log.txt")
                # Of several processes one may fail alone while the others wait: as ever, the launcher ends them all.
                if job.mode == RunMode.MULTIRUN and n_processes() == 1 and not isinstance(error, Interrupted):
                    failed.append(job.job.num)
                    if not told:
                        logger.exception("%s: job %d has met a defect", name, job.job.num)
                elif told:
                    # As a shell tells a signal.
                    sys.exit(128 + signal.SIGTERM if isinstance(error, Interrupted) else 1)
                else:
                    raise

        def main() -> None:
            register(or_exit(run_folder))
            # Hydra takes the task's name from the function's module, which is "__main__" for every stage.
            run_stage.__module__ = f"llm2rec.{name}"
            sys.argv[1:] = overrides_last(sys.argv[1:])
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(run_stage)()
            if failed:
                jobs = ", ".join(map(str, failed))
                sys.stderr.write(f"{name}: jobs that failed: {jobs}; the others of the sweep are done\n")
                sys.exit(1)

        return main

    return decorate


def _carry_out(
    cfg: DictConfig,
    folder: Path,
    name: str,
    function: Callable[[Config, Run], None],
    reads: tuple[str, ...],
    is_current: Callable[[Config, Path], bool],
) -> None:
    """Run a stage in its folder, unless that run is finished, or ``reuse`` finds another that is."""
    if cfg.reuse and not cfg.resume and (earlier := _earlier(cfg, name, reads, is_current)):
        logger.info("%s: %s", name, _shown(earlier))
        by = f", made by commit {commit} (this is another)" if (commit := made_by_other_code(earlier)) else ""
        logger.info("%s: up to date: same configuration, same data%s; `reuse=false` runs it again", name, by)
        if is_first_process():
            _leave_nothing(folder)
        return
    run = Run.start(folder, name, _plain(cfg))
    logger.info("%s: %s", name, _shown(folder))
    if not cfg.resume:
        run.note(overrides=without_secrets(list(HydraConfig.get().overrides.task)))
    build(cfg.metrics, MetricsConfig)  # a metric that is not there would show after an epoch only
    if agree(run.record["status"] if is_first_process() else None) == "finished":
        logger.info("%s: finished already; nothing to resume", name)
        return
    function(cast(Config, cfg), run)
    run.note(status="finished")
    logger.info("%s: done, see %s", name, _shown(folder))


def overrides_last(arguments: Sequence[str]) -> list[str]:
    """Put overrides behind all options.

    Of those on both sides of one (``a=1 --multirun b=2``), argparse, which Hydra uses, takes the second for mistakes.
    """
    return sorted(arguments, key=lambda each: not each.startswith("-") and ("=" in each or each.startswith("~")))


def _leave_nothing(folder: Path) -> None:
    """Remove what Hydra has put into the folder of a run that is none, and the folder, if that was all."""
    shutil.rmtree(folder / ".hydra", ignore_errors=True)
    (folder / "log.txt").unlink(missing_ok=True)
    with suppress(OSError):  # it was there before, and is somebody's
        folder.rmdir()


def _check_common(cfg: DictConfig, name: str, reads: tuple[str, ...] | None) -> None:
    """Refuse what no stage, or not this one, can do anything with.

    Raises:
        ConfigError: Naming it.
    """
    _refuse_endless(cfg)
    if cfg.seed < 0:
        raise ConfigError(f"`seed` is {cfg.seed}, expected 0 or more.")
    if cfg.reuse and reads is None:
        raise ConfigError(f"`reuse` is true, but {name} is always run; leave it out.")
    if HydraConfig.get().mode == RunMode.MULTIRUN and (cfg.resume or cfg.reuse):
        raise ConfigError(
            "`resume` and `reuse` are for single runs; a job of a sweep is resumed without `--multirun`, by its own "
            "overrides and `resume=result/result_.../NUMBER`."
        )


def _earlier(
    cfg: DictConfig, name: str, reads: tuple[str, ...], is_current: Callable[[Config, Path], bool]
) -> Path | None:
    """The newest finished run that has made what this one would make, if there is any; a collective."""
    found = None
    if is_first_process():
        result_dir = from_launch_folder(cfg.paths.result_dir, cfg.paths.root)
        runs = same_runs(result_dir, name, _plain(cfg), ("dataset", "seed", *reads))
        if runs:  # only then the data is worth looking at
            fingerprint = prepare(*_sources(cfg)).fingerprint
            same = (run for run, of in runs if of == fingerprint and is_current(cast(Config, cfg), run))
            found = next(same, None)
    return cast(Path | None, agree(found))


def question(name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Turn a function of a configuration of its own, ``conf/<name>.yaml``, into a command that leaves no run.

    Errors are told as those of a `stage` are.

    Args:
        name: Name of the command and of its configuration.
    """

    def decorate(function: Callable[[Any], None]) -> Callable[[], None]:
        def answer(cfg: DictConfig) -> None:
            _quiet_libraries()
            try:
                function(cfg)
            except TOLD as error:
                tell(error)
                sys.exit(1)

        def main() -> None:
            register()
            answer.__module__ = f"llm2rec.{name}"
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=name)(answer)()

        return main

    return decorate


def build(node: Any, kind: type[Settings]) -> Settings:
    """Turn a configuration node into the settings object whose schema it has, checked by its constructor.

    Raises:
        ConfigError: If a required value is missing or a value cannot work.
    """
    _refuse_endless(node)
    try:
        settings = OmegaConf.to_object(node)
    except MissingMandatoryValue as error:
        missing = ", ".join(f"`{key}`" for key in sorted(OmegaConf.missing_keys(node)))
        raise ConfigError(f"{missing} must be given: add `{error.full_key}=VALUE` to the command.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    if not isinstance(settings, kind):
        raise TypeError(f"expected {kind.__name__}, the node holds {type(settings).__name__}.")
    return settings


def built_object(node: Any) -> Any:
    """Make the object that ``_target_`` of a configuration node names, with the rest of the node as its arguments.

    Raises:
        ConfigError: If it is none of this library's, or a value cannot work.
    """
    _refuse_endless(node)
    if not str(node._target_).startswith("llm2rec."):
        raise ConfigError(
            f"`{node._get_full_key('_target_')}` is {node._target_!r}, expected a name of this library; a class of "
            "your own is given by `active=custom active.policy=module.Class`."
        )
    try:
        return instantiate(node)
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, Llm2RecError):
            raise cause from error
        raise ConfigError(f"{node._target_} cannot be made: {cause}") from error


def _refuse_endless(node: Any) -> None:
    """Refuse NaN and infinity, which no setting can do anything with and most comparisons let pass."""
    for key, value in _numbers(OmegaConf.to_container(node, resolve=False), node._get_full_key(None)):
        if not math.isfinite(value):
            raise ConfigError(f"`{key}` is {value}, expected a finite number.")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(each, f"{key}.{name}" if key else str(name))


def open_data(cfg: Config, run: Run) -> RecData:
    """Prepare the dataset of this run, or load it; the first process prepares, the others then load.

    Raises:
        DataError: If raw data is missing or malformed.
        ConfigError: If the dataset's settings cannot work.
        CheckpointError: If the run was begun with other data.
    """
    sources = _sources(cfg)
    with run.phase("data"):
        data = prepare(*sources) if is_first_process() else None
        agree(None)  # wait for the first process
        data = data or prepare(*sources)
    run.keep(dataset={"name": data.name, "fingerprint": data.fingerprint})
    return data


def _sources(cfg: Any) -> tuple[DatasetSpec, Path, Path]:
    """What `prepare` is asked with."""
    root = cfg.paths.root
    spec = build(cfg.dataset, DatasetSpec).with_base(Path(root))
    return spec, from_launch_folder(cfg.paths.processed_dir, root), from_launch_folder(cfg.paths.raw_dir, root)


def open_engine(
    cfg: Config,
    run: Run,
    training: TrainingSettings | None = None,
    mixed_precision: str = "no",
    *,
    lockstep: bool = False,
) -> Engine:
    """Open the engine of a stage as the configuration says; arguments as of `Engine`."""
    return Engine(
        run,
        seed=cfg.seed,
        training=training,
        mixed_precision=mixed_precision,
        tensorboard=cfg.logging.tensorboard and training is not None,
        show_progress=cfg.logging.progress,
        lockstep=lockstep,
    )


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values; required values of groups this stage may not need stay ``???``."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False))


def _shown(folder: Path) -> str:
    """A folder as the user would type it: relative to where the command was launched, if it lies there."""
    launched = Path(HydraConfig.get().runtime.cwd)
    return str(folder.relative_to(launched)) if folder.is_relative_to(launched) else str(folder)


def _quiet_libraries() -> None:
    """Silence chatter that tells the user nothing, library by library."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its own warning about forks, once per worker
    if not uses_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns that it looked for a GPU and found none
    for noisy in ("httpx", "httpx2", "httpcore", "matplotlib", "datasets", "fsspec", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A dozen lines of retries where the Hub cannot be reached; whoever needed it then says what was not found.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()  # ours tells one line per phase
    if "transformers" in sys.modules:  # a second to import, which only the teacher pays
        from huggingface_hub.utils import enable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar for each of "Loading weights" and "Writing model shards"
        enable_progress_bars()  # the line above also hides downloads, which may take an hour
    for message in (
        ".*is_gradient_checkpointing. is deprecated",  # PEFT 0.21 asks transformers 5 under the old name
        ".*torch.distributed.all_gather_into_tensor. is deprecated",  # Accelerate 1.15 and DeepSpeed 0.19 gather so
    ):
        warnings.filterwarnings("ignore", message, FutureWarning)
    if not is_first_process():
        for handler in logging.getLogger().handlers:  # warnings and errors, and their tracebacks for the file
            handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.exc_info is not None)
