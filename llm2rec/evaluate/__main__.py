"""``python -m llm2rec.evaluate``: compare finished runs on the test split.

Writes ``comparison.txt``, ``.json`` and ``.png``, and a report: ``report.html`` (self-contained), ``report.md`` and
``report.json``. In the report, runs that differ only in their seed form one entry, and all entries are tested against
``report.baseline``. Everything that needs a language model is stored when a run is scored.
"""

import datetime
import logging
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from llm2rec.config import Config
from llm2rec.core.errors import ConfigError
from llm2rec.core.files import without_secrets
from llm2rec.core.git_info import git_state, library_versions
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.run import Job, Run, is_sweep, jobs_of, latest_runs, read_record
from llm2rec.core.train.sharding import shards_frozen_weights
from llm2rec.data import RecData
from llm2rec.evaluate.labels import labels_of, unlike
from llm2rec.evaluate.report.analyses import gather
from llm2rec.evaluate.report.comparison import check_baseline, read_run
from llm2rec.evaluate.report.findings import Findings
from llm2rec.evaluate.report.pages import write_pages
from llm2rec.evaluate.scoring.scoring import WITH_A_MODEL, Protocol, score_popularity, score_run
from llm2rec.evaluate.scoring.slices import Slice, slice_metrics, slices
from llm2rec.evaluate.settings import ReportSettings
from llm2rec.evaluate.sweeps import write_sweep
from llm2rec.evaluate.table import write_comparison
from llm2rec.stage import build, open_data, open_engine, open_masking, stage

logger = logging.getLogger("llm2rec.evaluate")


@stage("evaluate")
def main(cfg: Config, run: Run) -> None:
    """Score the chosen runs, write the comparison and the report."""
    metrics, settings = cfg.metrics, build(cfg.report, ReportSettings)
    data = open_data(cfg, run)
    masked = open_masking(cfg, run, data)
    protocol = Protocol(tuple(metrics.ks), masked, metrics.n_candidates, metrics.candidates_seed)
    engine = open_engine(cfg, run, lockstep=shards_frozen_weights())  # a teacher may be among the runs
    result_dir = from_launch_folder(cfg.paths.result_dir, cfg.paths.root)
    named = _folders(cfg.runs, Path(cfg.paths.root), result_dir, data.fingerprint)
    sweeps = {each: jobs_of(each) for each in named if is_sweep(each)}
    jobs = [job for each in sweeps.values() for job in each]
    folders = _each_once([folder for each in named for folder in _finished(each, sweeps.get(each))])
    check_baseline(settings.baseline, folders)
    gate_dir = from_launch_folder(cfg.paths.llm_dir, cfg.paths.root) / "gate_inputs"
    rows = [score_popularity(data, protocol)]
    with run.phase("scoring"):
        shown = engine.progress(folders, "evaluate", len(folders), "run")
        scores = [score_run(folder, data, engine, protocol, gate_dir) for folder in shown]
    rows += [replace(row, label=label) for row, label in zip(scores, labels_of(folders), strict=True)]
    if engine.is_main:
        parts = slices(data)
        about = _about(data, protocol, parts) | {"unlike": unlike(folders, masked)}
        for sentence in about["unlike"]:
            logger.warning("%s", sentence)
        runs = [read_run(row, folder, _command(folder)) for row, folder in zip(rows[1:], folders, strict=True)]
        rows[1:] = [
            replace(each.scored, slices=slice_metrics(torch.from_numpy(each.ranks), parts, protocol.ks))
            for each in runs
        ]
        logger.info("\n%s", write_comparison(run.folder, rows, protocol.ks, about))
        if jobs:
            scored = dict(zip(folders, scores, strict=True))
            logger.info("\n%s", write_sweep(run.folder, jobs, scored, protocol.ks, about))
        with run.phase("report"):
            findings = gather(
                rows[0],
                runs,
                data,
                protocol,
                about | {"date": datetime.datetime.now().astimezone().isoformat(timespec="minutes")},
                baseline=settings.baseline,
                locate=lambda path: from_launch_folder(path, cfg.paths.root),
                device=engine.device,
            )
            write_pages(run.folder, findings)
        logger.info("\n%s", "\n".join([*findings.conclusions, "", *in_words(findings)]))
        logger.info("report: %s", run.folder / "report.html")
    engine.close()


def in_words(findings: Findings) -> list[str]:
    """Lines with three recommendations of the newest student for one test user; none without students."""
    sample = next((each for each in findings.samples if each.answers), None)
    if sample is None:
        return []
    name, answers = list(sample.answers.items())[-1]
    lines = [f"{number}. {title}" for number, (title, _) in enumerate(answers[:3], 1)]
    return [f"{name} recommends after {'; '.join(sample.history[-3:])}:", *lines]


def _finished(folder: Path, jobs: Sequence[Job] | None) -> list[Path]:
    """The runs to score: the folder itself, or the finished jobs of a sweep."""
    return [folder] if jobs is None else [job.folder for job in jobs if job.is_finished]


def _each_once(folders: list[Path]) -> list[Path]:
    """The folders; reject a run that is named twice, such as a sweep and one of its jobs."""
    if again := next((each for each, count in Counter(map(Path.resolve, folders)).items() if count > 1), None):
        raise ConfigError(f"`runs` names {again} twice, and would count it as two seeds; name each run once.")
    return folders


def _about(data: RecData, protocol: Protocol, parts: Sequence[Slice]) -> dict[str, Any]:
    """Facts on dataset, protocol and this evaluation."""
    return {
        "dataset": data.name,
        "fingerprint": data.fingerprint,
        "n_items": data.n_items,
        "rows": len(data.splits["test"]),
        "slices": {each.name: {"title": each.title, "rows": len(each.rows)} for each in parts},
        "split": data.manifest["settings"]["split"],
        "mask_seen": protocol.mask_seen,
        "n_candidates": protocol.n_candidates,
        "candidates_seed": protocol.candidates_seed,
        "overrides": without_secrets(list(HydraConfig.get().overrides.task)),
        "git": git_state(),
        "versions": library_versions(),
    }


def _command(folder: Path) -> str | None:
    """The command that started a run, without its launcher; None if it is not recorded."""
    record = read_record(folder)
    overrides = record.get("overrides")
    return None if overrides is None else shlex.join(["python", "-m", f"llm2rec.{record['stage']}", *overrides])


def _folders(runs: object, root: Path, result_dir: Path, fingerprint: str) -> list[Path]:
    if runs == "latest":
        found = latest_runs(result_dir, fingerprint, WITH_A_MODEL)
        if not found:
            raise ConfigError(
                f"there is no finished run on this dataset in {result_dir}; train one with the same dataset overrides "
                "(`python -m llm2rec.student`), or name folders with `runs=[...]`."
            )
        return found
    if isinstance(runs, str) or not isinstance(runs, Sequence):
        raise ConfigError(f"`runs` is {runs!r}, expected `latest` or a list such as `runs=[result/result_...]`.")
    if not runs:
        raise ConfigError("`runs` is empty, expected `latest` or a list such as `runs=[result/result_...]`.")
    return [from_launch_folder(str(each), root) for each in runs]


if __name__ == "__main__":
    main()
