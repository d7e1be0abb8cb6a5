"""Read `poetry.lock` with nothing but a Python and its pip.

`env_shell/setup.sh` uses this to install the locked versions on a machine that has no Poetry:

    python locked_requirements.py list --variant cpu     requirement lines with hashes, for `pip install -r`
    python locked_requirements.py torch-version          the locked version of torch
    python locked_requirements.py check --variant cpu    says which packages of this Python differ; exit 1 if any

Variants: `cuda` is the lock as it stands for this platform. `cpu` leaves out torch, which has a build of its own for
machines without a GPU, and the CUDA packages that only the GPU build of torch asks for; `base` leaves out the same,
which the Python below has.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    from packaging.markers import Marker
except ImportError:  # A fresh virtual environment has only the copy inside pip.
    from pip._vendor.packaging.markers import Marker

LOCK = Path(__file__).resolve().parent.parent / "poetry.lock"
CUDA_ONLY = re.compile(r"^(nvidia-.*|cuda-.*|triton)$")


class Locked(NamedTuple):
    """One package of the lock that belongs on this machine."""

    name: str
    version: str
    hashes: tuple[str, ...]


def _wanted(package: dict[str, Any], groups: set[str], environment: dict[str, str] | None) -> bool:
    if package.get("optional"):
        return False
    # No extra is asked for. The older `packaging` in the pip of a fresh Python 3.11 has no value for it by itself.
    environment = {"extra": "", **(environment or {})}
    markers = package.get("markers")
    for group in sorted(groups & set(package["groups"])):
        # One marker for all groups, or a table with one per group; a group that is missing there is unconditional.
        marker = markers.get(group) if isinstance(markers, dict) else markers
        if marker is None or Marker(marker).evaluate(environment):
            return True
    return False


def locked_packages(
    lock: Path = LOCK, *, variant: str = "cuda", dev: bool = True, environment: dict[str, str] | None = None
) -> Iterator[Locked]:
    """Yield the locked packages that a machine needs, torch included only where it comes from the lock.

    Args:
        lock: The lock file.
        variant: `cuda`, `cpu` or `base`, see the module's text.
        dev: Whether the development group is wanted too.
        environment: Values of marker variables that replace those of the running Python.

    Raises:
        ValueError: If the lock holds two versions of one package for the same machine.
    """
    with lock.open("rb") as file:
        packages = tomllib.load(file)["package"]
    groups = {"main", "dev"} if dev else {"main"}
    seen: dict[str, str] = {}
    for package in packages:
        name, version = package["name"], package["version"]
        if variant != "cuda" and (name == "torch" or CUDA_ONLY.match(name)):
            continue
        if not _wanted(package, groups, environment):
            continue
        if name in seen:
            raise ValueError(f"{lock}: {name} is locked at both {seen[name]} and {version} for this machine")
        seen[name] = version
        yield Locked(name, version, tuple(file["hash"] for file in package["files"]))


def torch_version(lock: Path = LOCK) -> str:
    """Return the locked version of torch."""
    with lock.open("rb") as file:
        return next(p["version"] for p in tomllib.load(file)["package"] if p["name"] == "torch")


def differences(*, variant: str, dev: bool, lock: Path = LOCK) -> list[str]:
    """Say how the packages installed beside this Python differ from the lock."""
    expected = {package.name: package.version for package in locked_packages(lock, variant=variant, dev=dev)}
    expected.setdefault("torch", torch_version(lock))
    found = []
    for name, version in sorted(expected.items()):
        try:
            # "2.13.0+cpu" is the same release as "2.13.0".
            installed = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed != version:
            found.append(f"{name}: locked {version}, installed {installed}")
    return found


def main() -> int:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "torch-version", "check"])
    parser.add_argument("--variant", choices=["cpu", "cuda", "base"], default="cuda")
    parser.add_argument("--no-dev", action="store_true", help="leave out the development tools")
    parser.add_argument("--lock", type=Path, default=LOCK)
    options = parser.parse_args()
    if options.command == "torch-version":
        print(torch_version(options.lock))
        return 0
    if options.command == "check":
        found = differences(variant=options.variant, dev=not options.no_dev, lock=options.lock)
        print("\n".join(found), end="\n" if found else "")
        return 1 if found else 0
    for package in locked_packages(options.lock, variant=options.variant, dev=not options.no_dev):
        print(" \\\n    ".join([f"{package.name}=={package.version}", *(f"--hash={h}" for h in package.hashes)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
