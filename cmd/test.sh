#!/usr/bin/env bash
# Run the tests, after setting up what is missing.
#
#   bash cmd/test.sh [pytest arguments]
#
#   bash cmd/test.sh -m unit                 the unit tests
#   bash cmd/test.sh                         those and whole stages at toy size
#   bash cmd/test.sh -m "not gpu"            the slow ones too, as CI does
#   bash cmd/test.sh -n 0 tests/test_x.py    one file, in this process
#
#   LLM2REC_TEST_WORKERS=4   worker processes (default: one per core, at most 8)
set -euo pipefail
# shellcheck source=cmd/_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"
ensure_environment

# One thread per worker: several workers that each take all cores are slower than one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$root"
exec .venv/bin/python -m pytest -n "${LLM2REC_TEST_WORKERS:-auto}" --maxprocesses 8 --dist worksteal "$@"
