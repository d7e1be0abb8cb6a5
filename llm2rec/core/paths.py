"""Where things lie: the configuration, the run folder, the folder the user launched from."""

import re
import time
from pathlib import Path

from llm2rec.core.errors import CheckpointError
from llm2rec.core.processes import agree, is_first_process

__all__ = ["conf_folder", "from_launch_folder", "run_folder"]

_NAME = r"result_\d{8}_\d{6}"


def conf_folder() -> Path:
    """The Hydra configuration: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def from_launch_folder(path: str | Path, root: str | Path) -> Path:
    """Make ``path`` absolute: relative ones count from ``root``, where the user typed them (Hydra changes folders)."""
    return (Path(root) / Path(path).expanduser()).resolve()


def run_folder(result_dir: str, resume: str | None, root: str) -> str:
    """Decide the folder of this run, the same for every process of the launch.

    Args:
        result_dir: Where runs are kept.
        resume: Folder of a run to continue, however early it was killed, or None for a new run.
        root: Folder the user launched from.

    Returns:
        Absolute path. A new folder ``result_YYYYmmdd_HHMMSS`` has been made, so that no other run can take the name.

    Raises:
        CheckpointError: If there is no run to resume at ``resume``.
    """
    if resume:
        folder = from_launch_folder(resume, root)
        # A run that was killed before it had written anything begins anew in its own folder.
        began = folder.is_dir() and re.fullmatch(_NAME, folder.name) is not None
        if not began and not (folder / "run.json").is_file():
            raise CheckpointError(
                f"`resume` is {resume!r}, which holds no run.json; name the folder of an earlier run."
            )
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
