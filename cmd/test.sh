#!/usr/bin/env bash
# Run the tests, after setting up what is missing.
#
#   bash cmd/test.sh [pytest arguments]
#
#   bash cmd/test.sh                         the quick tests
#   bash cmd/test.sh -m "not gpu"            the slow ones too, as CI does
#   bash cmd/test.sh -n 0 tests/test_x.py    one file, in this process
#
#   LLM2REC_TEST_WORKERS=4   processes to test with (default: one a core, 8 at most)
set -euo pipefail
# shellcheck source=cmd/_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"
ensure_environment

# One thread a worker: several that each take all cores are slower than one after the other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n "${LLM2REC_TEST_WORKERS:-auto}" --maxprocesses 8 --dist worksteal "$@"
