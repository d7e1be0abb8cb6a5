"""The command of a stage: compose the configuration, open the run folder, report errors, find runs to reuse."""

import inspect
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from llm2rec.command import run_command, run_folder_or_exit
from llm2rec.composition import check_added
from llm2rec.config import (
    Config,
    MetricsConfig,
    build,
    built_object,
    check_finite,
    register,
    schemas_of,
)
from llm2rec.core.errors import CheckpointError, ConfigError, DataError, Interrupted
from llm2rec.core.files import read_object, without_secrets
from llm2rec.core.git_info import git_state
from llm2rec.core.logging import duration, progress_shown, quiet_libraries
from llm2rec.core.paths import from_launch_folder, note_folder
from llm2rec.core.processes import agree, is_first_process, n_processes, sigterm_raises
from llm2rec.core.run import Run, changed_settings, discard, read_record
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.data import DatasetSpec, RecData, masks_seen, prepare
from llm2rec.overrides import check_read
from llm2rec.reporting import Failed, error_line, interrupt_as_error, is_refusal, report

__all__ = ["build", "built_object", "open_data", "open_engine", "open_masking", "same_runs", "stage"]

logger = logging.getLogger("llm2rec")
_FULL_ERROR = "HYDRA_FULL_ERROR"
_TRAINING = ("student", "teacher", "distill")
_NEXT = {
    "data": "student", "student": "distill", "teacher": "distill", "ensemble": "distill", "distill": "evaluate",
    "evaluate": "recommend",
}  # fmt: skip


def stage(
    name: str,
    reads: tuple[str, ...] | None = None,
    is_current: Callable[[Config, Path], bool] = lambda cfg, folder: True,
) -> Callable[[Callable[[Config, Run], None]], Callable[[], None]]:
    """Turn a function of configuration and run into a command.

    The command composes `conf/` with the overrides of the command line and opens the run folder. Our own errors end it
    with one line and exit code 1; their traceback goes to the run's log. An unexpected error keeps its traceback. In a
    sweep (``--multirun``) the other jobs still run after one has failed, and the exit code is 1.

    Args:
        name: Name of the stage.
        reads: Parts of the configuration, besides dataset and seed, that determine the result, so that ``reuse=true``
            can find an earlier run of the same; None if the stage cannot reuse runs.
        is_current: Whether the result of such an earlier run still exists and its inputs are unchanged.
    """

    def decorate(function: Callable[[Config, Run], None]) -> Callable[[], None]:
        failed: list[int] = []  # jobs of a sweep

        def run_stage(cfg: DictConfig) -> None:
            job = HydraConfig.get()
            quiet_libraries()
            folder = Path(job.runtime.output_dir)
            try:
                with sigterm_raises(), interrupt_as_error(), progress_shown(cfg.logging.progress):
                    _check_common(cfg, name, reads)
                    _carry_out(cfg, folder, name, function, reads or (), is_current)
            except Exception as error:
                expected = report(error)
                if job.mode == RunMode.RUN and not cfg.resume and is_refusal(error):
                    discard(folder)
                # Of several processes one may fail while the others wait for it: the launcher has to end them all.
                if job.mode == RunMode.MULTIRUN and n_processes() == 1 and not isinstance(error, Interrupted):
                    failed.append(job.job.num)
                    if not expected:
                        logger.exception("%s: job %d crashed", name, job.job.num)
                elif expected:
                    raise Failed(error) from error
                else:
                    raise

        def main() -> None:
            register(run_folder_or_exit, name, inspect.getdoc(sys.modules[function.__module__]) or name)
            run_command(run_stage, name, "config")
            if failed:
                sys.exit(f"{name}: jobs {', '.join(map(str, failed))} failed; the other jobs of the sweep are done")

        return main

    return decorate


# A run ----------------------------------------------------------------------------------------------------------------


def _carry_out(
    cfg: DictConfig,
    folder: Path,
    name: str,
    function: Callable[[Config, Run], None],
    reads: tuple[str, ...],
    is_current: Callable[[Config, Path], bool],
) -> None:
    """Run a stage in its folder, unless that run is finished, or ``reuse`` finds another that is."""
    start = time.monotonic()
    if cfg.reuse and not cfg.resume and (earlier := _earlier(cfg, name, reads, is_current)):
        note_folder(earlier)
        logger.info("%s: %s", name, _shown(earlier))
        by = f", made by commit {commit} (this is another)" if (commit := made_by_other_code(earlier)) else ""
        logger.info("%s: up to date: same configuration, same data%s; `reuse=false` runs it again", name, by)
        if is_first_process():
            discard(folder)
        return
    build(cfg.metrics, MetricsConfig)  # an unknown metric would otherwise fail after the first epoch
    note_folder(folder.parent if HydraConfig.get().mode == RunMode.MULTIRUN else folder)
    run = Run.start(folder, name, _plain(cfg))
    logger.info("%s: %s", name, _shown(folder))
    if not cfg.resume:
        run.note(overrides=without_secrets(list(HydraConfig.get().overrides.task)))
    if agree(run.record["status"] if is_first_process() else None) == "finished":
        logger.info("%s: finished already; nothing to resume", name)
        return
    remedy = shlex.join(["python", "-m", f"llm2rec.{name}", *_overrides("resume="), f"resume={_shown(folder)}"])
    try:
        with interrupt_as_error(f" Continue with: {remedy}"):
            function(cast(Config, cfg), run)
    except Interrupted:
        run.stop("interrupted", **{"continue": remedy})
        raise
    except Exception as error:
        run.stop("failed", error=error_line(error) or f"{type(error).__name__}: {error}")
        raise
    run.note(status="finished")
    if best := _best_validation(folder):
        logger.info("%s: best validation %s", name, best)
    logger.info("%s: done in %s, see %s", name, duration(time.monotonic() - start), _shown(folder))
    if following := _next_command(cfg, name, folder):
        logger.info("%s: next: %s", name, following)


def _best_validation(folder: Path) -> str | None:
    """Metric, value and step of the weights that a run kept; None without training."""
    file = folder / "metrics" / "validation.json"
    record = read_object(file) if file.is_file() else {}
    if record.get("best") is None:
        return None
    return f"{record['select_on']} {record['best']:.4f} at step {record['best_step']}"


def _next_command(cfg: DictConfig, name: str, folder: Path) -> str | None:
    """The command that follows a stage in the chain, with the overrides that it shares with this one."""
    if HydraConfig.get().mode == RunMode.MULTIRUN or name not in _NEXT:
        return None
    if name == "evaluate":
        return f"open {_shown(folder / 'report.html')}; python -m llm2rec.recommend run=RUN_FOLDER history=[...]"
    following = _NEXT[name]
    outputs = str(cfg.distill.teacher_outputs)
    if name == "student" and not from_launch_folder(outputs, cfg.paths.root).is_dir():
        following = "teacher"
    overrides = _overrides("resume=", "finish=", "reuse=", "runs=", "report.", "hydra.", "hydra/", "ensemble.")
    if name == "ensemble":
        outputs = f"{cfg.paths.teacher_outputs_dir}/{cfg.dataset.name}/{cfg.ensemble.name}"
        reads = cfg.ensemble.titles.share != 0 or "titles" in (cfg.ensemble.vectors or ())
        recipe = "listwise_reading" if reads else "listwise"
        overrides += [f"distill={recipe}", f"distill.teacher_outputs={outputs}"]
    return shlex.join(["python", "-m", f"llm2rec.{following}", *overrides])


def _overrides(*without: str) -> list[str]:
    """The overrides of this command, but for those that begin with one of ``without``."""
    overrides = [each for each in HydraConfig.get().overrides.task if not each.lstrip("+~").startswith(without)]
    return list(without_secrets(overrides))


def _check_common(cfg: DictConfig, name: str, reads: tuple[str, ...] | None) -> None:
    """Check the options that every stage has.

    Raises:
        ConfigError: If one cannot work, or not with this stage.
    """
    check_finite(cfg)
    job = HydraConfig.get()
    check_read(cfg, job.overrides.task, is_sweep=job.mode == RunMode.MULTIRUN)
    check_added(cfg, job.overrides.task, schemas_of())
    if cfg.seed < 0:
        raise ConfigError(f"`seed` is {cfg.seed}, expected 0 or more.")
    if cfg.finish and (not cfg.resume or name not in _TRAINING):
        raise ConfigError(
            f"`finish` ends the training of a resumed run; use it with `resume=FOLDER` and {', '.join(_TRAINING)}."
        )
    if cfg.reuse and reads is None:
        raise ConfigError(f"`reuse` is true, but {name} cannot reuse runs; leave it out.")
    if job.mode == RunMode.MULTIRUN and (cfg.resume or cfg.reuse):
        raise ConfigError(
            "`resume` and `reuse` do not work with `--multirun`; to resume a job of a sweep, use its own overrides "
            "and `resume=result/result_.../NUMBER` without `--multirun`."
        )


def _earlier(
    cfg: DictConfig, name: str, reads: tuple[str, ...], is_current: Callable[[Config, Path], bool]
) -> Path | None:
    """The newest finished run with the same configuration and data, or None; a collective."""
    found = None
    if is_first_process():
        result_dir = from_launch_folder(cfg.paths.result_dir, cfg.paths.root)
        runs = same_runs(result_dir, name, _plain(cfg), ("dataset", "seed", *reads))
        if runs:  # preparing the data may take a while
            fingerprint = prepare(*_sources(cfg)).fingerprint
            same = (run for run, of in runs if of == fingerprint and is_current(cast(Config, cfg), run))
            found = next(same, None)
    return cast(Path | None, agree(found))


def same_runs(result_dir: Path, stage: str, config: dict[str, Any], reads: Sequence[str]) -> list[tuple[Path, str]]:
    """Finished runs of a stage with the same configuration, as far as the stage reads it.

    Args:
        result_dir: Where runs are kept.
        stage: The stage.
        config: The resolved configuration, plain values.
        reads: The parts to compare; micro-batch sizes are ignored.

    Returns:
        Folder and fingerprint of the dataset of each, the newest first.
    """
    wanted = without_secrets({name: config[name] for name in reads})
    found = []
    for file in sorted(result_dir.glob("result_*/run.json"), reverse=True):
        folder = file.parent
        try:
            record = read_record(folder, "dataset")
            if record["stage"] != stage or record["status"] != "finished" or record.get("ended_early"):
                continue
            saved = read_object(folder / "config.json", *reads)
        except (CheckpointError, DataError):  # a damaged run, or one without a dataset
            continue
        if not changed_settings({name: saved[name] for name in reads}, wanted):
            found.append((folder, str(record["dataset"]["fingerprint"])))
    return found


def made_by_other_code(run: Path) -> str | None:
    """The commit that made a run, if it is known to differ from that of the running code."""
    commit, now = read_record(run).get("git", {}).get("commit"), git_state()["commit"]
    return str(commit)[:12] if commit and now and commit != now else None


# Data and engine of a run --------------------------------------------------------------------------------------------


def open_data(cfg: Config, run: Run) -> RecData:
    """Prepare or load the dataset of this run; the first process prepares it, then the others load it.

    Raises:
        DataError: If raw data is missing or malformed.
        ConfigError: If the dataset's settings cannot work.
        CheckpointError: If the run was started with other data.
    """
    sources = _sources(cfg)
    with run.phase("data"):
        data = prepare(*sources) if is_first_process() else None
        agree(None)  # wait for the first process
        data = data or prepare(*sources)
    run.keep(dataset={"name": data.name, "fingerprint": data.fingerprint})
    return data


def open_masking(cfg: Config, run: Run, data: RecData) -> bool:
    """Whether rankings of this run leave out the items of a user's past (`masks_seen`); recorded in ``run.json``."""
    masked = masks_seen(data, cfg.metrics.mask_seen)
    run.keep(mask_seen=masked)
    by = "as the data says" if cfg.metrics.mask_seen is None else "metrics.mask_seen"
    logger.info("%s: rankings %s the items of a user's past (%s)", run.stage, "leave out" if masked else "keep", by)
    return masked


def _sources(cfg: Any) -> tuple[DatasetSpec, Path, Path]:
    """Arguments of `prepare`."""
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
    """Open the engine of a stage as the configuration says, and log device and precision; arguments as of `Engine`."""
    engine = Engine(
        run,
        seed=cfg.seed,
        training=training,
        mixed_precision=mixed_precision,
        tensorboard=cfg.logging.tensorboard and training is not None,
        lockstep=lockstep,
        finish=cfg.finish,
    )
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else str(engine.device)
    precision = "float32" if mixed_precision == "no" else f"mixed precision {mixed_precision}"
    processes = "1 process" if engine.n_processes == 1 else f"{engine.n_processes} processes"
    logger.info("%s: on %s, %s, %s", run.stage, device, processes, precision)
    return engine


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values; missing values of groups that this stage may not need stay ``???``."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False))


def _shown(folder: Path) -> str:
    """A folder as the user would type it: relative to the folder of the launch if it is inside."""
    launched = Path(HydraConfig.get().runtime.cwd)
    return str(folder.relative_to(launched)) if folder.is_relative_to(launched) else str(folder)
