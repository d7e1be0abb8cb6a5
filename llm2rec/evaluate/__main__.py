"""``python -m llm2rec.evaluate``: finished runs side by side on the test split."""

import logging
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from llm2rec.config import Config
from llm2rec.core.division import divides_frozen
from llm2rec.core.errors import ConfigError
from llm2rec.core.git_info import git_state, library_versions
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.private import without_secrets
from llm2rec.core.run import Run
from llm2rec.evaluate.report import write_report
from llm2rec.evaluate.scoring import Protocol, find_runs, score_popularity, score_run
from llm2rec.stage import open_data, open_engine, stage

logger = logging.getLogger("llm2rec.evaluate")


@stage("evaluate")
def main(cfg: Config, run: Run) -> None:
    """Score the runs asked for and write the comparison."""
    metrics = cfg.metrics
    protocol = Protocol(tuple(metrics.ks), metrics.mask_seen, metrics.n_candidates, metrics.candidates_seed)
    data = open_data(cfg, run)
    engine = open_engine(cfg, run, lockstep=divides_frozen())  # a teacher may be among the runs
    result_dir = from_launch_folder(cfg.paths.result_dir, cfg.paths.root)
    folders = _folders(cfg.runs, Path(cfg.paths.root), result_dir, data.fingerprint)
    gate_dir = from_launch_folder(cfg.paths.llm_dir, cfg.paths.root) / "gate_inputs"
    rows = [score_popularity(data, protocol)]
    with run.phase("scoring"):
        told = engine.progress(folders, "evaluate", len(folders), "run")
        rows += [score_run(folder, data, engine, protocol, gate_dir) for folder in told]
    if engine.is_main:
        about = {
            "dataset": data.name,
            "fingerprint": data.fingerprint,
            "n_items": data.n_items,
            "rows": len(data.splits["test"]),
            "mask_seen": protocol.mask_seen,
            "n_candidates": protocol.n_candidates,
            "candidates_seed": protocol.candidates_seed,
            "overrides": without_secrets(list(HydraConfig.get().overrides.task)),
            "git": git_state(),
            "versions": library_versions(),
        }
        logger.info("\n%s", write_report(run.folder, rows, protocol.ks, about))
    engine.close()


def _folders(runs: object, root: Path, result_dir: Path, fingerprint: str) -> list[Path]:
    if runs == "latest":
        found = find_runs(result_dir, fingerprint)
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
