"""Paths: the configuration, the run folder, and paths relative to the launch folder."""

import os
import re
import time
from pathlib import Path

from llm2rec.core.errors import CheckpointError
from llm2rec.core.processes import agree, is_first_process

__all__ = ["FOLDER_FILE", "conf_folder", "from_launch_folder", "note_folder", "run_folder"]

FOLDER_FILE = "LLM2REC_FOLDER_FILE"
"""Environment variable with the file to which a stage writes its run folder, for the launching program."""

_NAME = r"result_\d{8}_\d{6}"


def conf_folder() -> Path:
    """Hydra configuration folder: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def from_launch_folder(path: str | Path, root: str | Path) -> Path:
    """Make ``path`` absolute, relative to ``root``, the launch folder (Hydra changes the working directory)."""
    return (Path(root) / Path(path).expanduser()).resolve()


def run_folder(result_dir: str, resume: str | None, root: str) -> str:
    """Return the folder of this run, the same for every process of the launch.

    Args:
        result_dir: Folder of all runs.
        resume: Folder of a run to continue, or None for a new run.
        root: Launch folder.

    Returns:
        Absolute path. A new folder ``result_YYYYmmdd_HHMMSS`` is created immediately, which reserves the name.

    Raises:
        CheckpointError: If there is no run to resume at ``resume``.
    """
    if resume:
        folder = from_launch_folder(resume, root)
        # A run killed before it wrote anything restarts in its folder.
        started = folder.is_dir() and re.fullmatch(_NAME, folder.name) is not None
        if not started and not (folder / "run.json").is_file():
            raise CheckpointError(f"`resume` is {resume!r}, which has no run.json; pass the folder of an earlier run.")
        return str(folder)
    return str(agree(_new_folder(from_launch_folder(result_dir, root)) if is_first_process() else None))


def _new_folder(result_dir: Path) -> str:
    while True:
        folder = result_dir / time.strftime("result_%Y%m%d_%H%M%S")
        try:
            folder.mkdir(parents=True, exist_ok=False)
            return str(folder)
        except FileExistsError:  # another run started in this second
            time.sleep(0.1)


def note_folder(folder: Path) -> None:
    """Write the folder of this run to the file in the environment variable `FOLDER_FILE`, if it is set."""
    if (file := os.environ.get(FOLDER_FILE)) and is_first_process():
        Path(file).write_text(str(folder), encoding="utf-8")
