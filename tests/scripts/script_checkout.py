"""A checkout whose programs only write down how they were called."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA_NAMES = re.compile(r"^(nvidia|cuda|triton)", re.MULTILINE)

FAKE_PYTHON = """#!/usr/bin/env bash
here="$(dirname "$0")"
printf '%s\\n' "python $*" >>"$CALLS"
case "$*" in
  "-m venv"*)
    place="${!#}"
    case "$*" in *--clear*) rm -rf "$place" ;; esac
    mkdir -p "$place/bin" && cp "$0" "$place/bin/python" && exit ;;
  "-m pip"*"+cpu") exit "${CPU_TORCH_STATUS:-0}" ;;
  "-m pip"*"install uv"*) printf '#!/bin/sh\\necho "uv $*" >>"$CALLS"\\n' >"$here/uv" && chmod +x "$here/uv" && exit ;;
  "-m pip"*"-r "*) cp "${!#}" "$CALLS.requirements" && exit "${PIP_STATUS:-0}" ;;
  "-m pip"*) exit ;;
  "-m llm2rec."* | *"/cmd/_launch.py "*)
    echo "precision ${ACCELERATE_MIXED_PRECISION:-of the file}" >>"$CALLS"
    case "$*" in *"${FAILING_STAGE:-nothing fails}"*) exit 3 ;; esac
    exit 0 ;;
  "-m ruff check"*) exit "${RUFF_STATUS:-0}" ;;
  "-m ruff"* | "-m mypy"* | "-m pytest"*) exit ;;
  *" check "*) exit "${CHECK_STATUS:-0}" ;;
  *'m.version("torch")'*) [ -n "${FAKE_TORCH:-}" ] && echo "$FAKE_TORCH" ; exit ;;
esac
exec "$REAL_PYTHON" "$@"
"""


class Checkout:
    """A copy of what the scripts need, and the calls that they make from it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.root.mkdir()
        for part in ("cmd", "env_shell", "accelerate_configs", ".ci"):
            shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("poetry.lock", "pyproject.toml", "Dockerfile"):
            shutil.copy(ROOT / part, self.root / part)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls_file = folder / "calls"
        self.program("fakepython", FAKE_PYTHON)
        self.gpu(False)
        drop = ("LLM2REC_", "ACCELERATE_", "OMP_", "PYTEST_", "FAKE_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "PYTHON": str(self.bin / "fakepython"),
            "REAL_PYTHON": sys.executable,
            "LLM2REC_TORCH": "cpu",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def gpu(self, there: bool) -> None:
        self.program("nvidia-smi", f"#!/bin/sh\nexit {0 if there else 9}\n")

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        return subprocess.run(
            ["bash", self.root / script, *arguments],
            env=self.environment | environment,
            cwd=self.bin,  # not the checkout: scripts work from anywhere
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    def calls(self, pattern: str) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if re.search(pattern, line)]


def linter(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
