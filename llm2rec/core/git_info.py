"""Code versions for run records: commit, uncommitted changes, library versions."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["git_state", "library_versions"]

_LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "hydra-core")


def git_state() -> dict[str, str | bool | None]:
    """Commit of the package's checkout, and whether it has uncommitted changes.

    Returns:
        ``{"commit": str | None, "dirty": bool | None}``; both None for an installed wheel or without git.
    """
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return {"commit": None, "dirty": None}
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(checkout, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):  # no git on PATH, or a checkout of another owner
        return {"commit": None, "dirty": None}


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect results; missing ones are left out."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
