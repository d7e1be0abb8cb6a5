#!/usr/bin/env bash
# Create .venv, the environment of all scripts, with exactly the versions in poetry.lock.
#
#   bash env_shell/setup.sh [--no-dev] [--help]
#
# Needs only Python 3.11 or newer. It may be run again at any time: it does nothing if .venv is up to date, installs
# new packages of the lock, and starts again after an interruption.
#
#   --no-dev                 without the development tools (pytest, ruff, mypy, linters)
#   PYTHON=python3.12        the Python to use (default: the first suitable one on PATH)
#   LLM2REC_TORCH=cpu|cuda   which build of torch (default: cuda with an NVIDIA GPU, else cpu)
#   LLM2REC_TORCH=base       the torch of this Python, as in our container; cuda if it is not the locked version
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=env_shell/_lib.sh
. "$root/env_shell/_lib.sh"
cd "$root"

dev_option=""
for argument in "$@"; do
  case "$argument" in
    -h | --help) print_help "${BASH_SOURCE[0]}" && exit 0 ;;
    --no-dev) dev_option="--no-dev" ;;
    *) die "unknown argument '$argument' (see: bash env_shell/setup.sh --help)" ;;
  esac
done

variant="${LLM2REC_TORCH:-}"
if [ -z "$variant" ]; then
  variant=cpu
  # Outside Linux there is one build of torch, the locked one, and no CUDA package has a marker that fits.
  if [ "$(uname -s)" != Linux ] || has_nvidia_gpu; then variant=cuda; fi
fi
case "$variant" in cpu | cuda | base) ;; *) die "LLM2REC_TORCH is '$variant'; expected cpu, cuda or base" ;; esac

venv="$root/.venv"
python="$venv/bin/python"
stamp="$venv/.llm2rec-ready"
unfinished="$venv/.llm2rec-unfinished"

# Hash of the files that the environment was built from, and the version of Python.
fingerprint() {
  { cat poetry.lock pyproject.toml env_shell/setup.sh env_shell/locked_requirements.py && echo "$variant"; } |
    "$python" -c 'import hashlib, sys; print(sys.version.split()[0], hashlib.sha256(sys.stdin.buffer.read()).hexdigest())' 2>/dev/null
}

# An environment with the development tools also serves --no-dev.
moved=""
if [ -f "$stamp" ] && [ ! -e "$unfinished" ]; then
  { read -r ready && read -r place; } <"$stamp" || place=""
  # The programs in a copied or moved environment still start the Python of the old path.
  if [ "$place" != "$root" ]; then
    moved=yes
  elif now="$(fingerprint)" && { [ "$ready" = "$now all" ] || [ "$ready" = "$now ${dev_option:-all}" ]; }; then
    exit 0
  fi
fi

# --- A Python to build on -------------------------------------------------------------------------------------------

find_python() {
  local candidate found=""
  for candidate in ${PYTHON:-python3 python python3.13 python3.12 python3.11 python3.14}; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
    found="$found $candidate ($("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo 'does not run'))"
  done
  die "Python 3.11 or newer is needed; found:${found:- none of: ${PYTHON:-python3, python3.11 to python3.14}}. Install one, or name it: PYTHON=/path/to/python3.12 bash env_shell/setup.sh"
}

if [ -e "$unfinished" ] || [ -n "$moved" ] || ! "$python" -c '' 2>/dev/null; then
  # --clear below would empty the environment that the link points to.
  if [ -L "$venv" ]; then
    die ".venv is a link to $(readlink "$venv"), not an environment of $root: remove the link (rm .venv) and run this again"
  fi
  base="$(find_python)"
  "$base" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$base has no venv module. On Debian and Ubuntu: apt-get install python3-venv"
  say "Creating .venv with $("$base" --version) ($base)"
  # --clear empties the folder but keeps it, since it is a mount in a container.
  options=(--clear)
  if [ "$variant" = base ]; then options+=(--system-site-packages); fi
  "$base" -m venv "${options[@]}" "$venv" || die "could not create $venv"
  # pip regards a half-copied package of a killed run as installed, so the environment counts as unfinished until the end.
  : >"$unfinished"
elif [ -f "$stamp" ]; then
  : >"$unfinished"
fi
# Otherwise the environment was created by another tool, such as Poetry: add missing packages and clear nothing.
rm -f "$stamp"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
  die ".venv has no pip: remove $venv and run this again"

# --- The packages ---------------------------------------------------------------------------------------------------

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
locked() { "$python" env_shell/locked_requirements.py "$@"; }
pip() { "$python" -m pip --disable-pip-version-check -qq --no-input "$@"; } # -qq: errors only

# After a regular failure pip has restored its state, so the next call can continue.
give_up() {
  rm -f "$unfinished"
  die "$@"
}

installed_torch() { "$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true; }

install_cpu_torch() {
  local version
  version="$(locked torch-version)"
  case "$(installed_torch)" in "$version" | "$version+"*) return 0 ;; esac
  say "Installing torch $version, the build for machines without a GPU"
  # The quickest way, if an index of pip has this build.
  if pip install --no-deps "torch==$version+cpu" 2>"$work/torch.log"; then return 0; fi
  # The default package index has only the CUDA build; uv knows the index of the others.
  "$python" -m venv "$work/uv"
  "$work/uv/bin/python" -m pip --disable-pip-version-check -qq install "uv>=0.7" ||
    give_up "could not install uv, which fetches the CPU build of torch (see above)"
  "$work/uv/bin/uv" pip install --quiet --python "$python" --no-deps --torch-backend cpu "torch==$version" || {
    cat "$work/torch.log" >&2
    give_up "could not install the CPU build of torch $version; see the messages of pip and uv above. LLM2REC_TORCH=cuda installs the CUDA build instead (several GB)"
  }
}

SECONDS=0
chosen="$variant" # part of the fingerprint, which must be the same at the next call
if [ "$variant" = base ]; then
  case "$(installed_torch)" in
    *+cpu | '') found="no torch with CUDA" ;;
    "$(locked torch-version)" | "$(locked torch-version)+"*) found="" ;;
    *) found="torch $(installed_torch)" ;;
  esac
  if [ -n "$found" ]; then
    say "This Python has $found, expected $(locked torch-version) as in poetry.lock; installing it from the package index"
    variant=cuda
  fi
fi
if [ "$variant" = cpu ]; then
  install_cpu_torch
elif [ "$variant" = cuda ] && [[ "$(installed_torch)" == *+cpu ]]; then
  pip uninstall --yes torch # pip regards it as the locked version
fi
# shellcheck disable=SC2086  # empty or one word
locked list --variant "$variant" $dev_option >"$work/requirements.txt"
say "Installing $(grep -c '==' "$work/requirements.txt") locked packages"
# --no-deps: the lock is complete, and pip's resolver would install the CUDA build of torch.
pip install --no-deps --use-pep517 --require-hashes -r "$work/requirements.txt" ||
  give_up "pip could not install the locked packages (see above). Run this again to continue"
say "Installing llm2rec itself, editable"
pip install --no-deps -e . || give_up "pip could not install the project (see above)"

# shellcheck disable=SC2086
locked check --variant "$variant" $dev_option >&2 || die ".venv differs from poetry.lock (see above); remove $venv and run this again"
rm -f "$unfinished"
variant="$chosen"
printf '%s\n' "$(fingerprint) ${dev_option:-all}" "$root" >"$stamp"
say "Ready in $SECONDS s: .venv (torch $(installed_torch))"
