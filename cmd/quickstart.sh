#!/usr/bin/env bash
# The whole pipeline on generated data with a tiny random language model: no network, no GPU, a few minutes.
#
#   bash cmd/quickstart.sh [hydra overrides]
#
# Sets up .venv if it is missing, then runs cmd/run_all_pipeline.sh, which ends with the comparison table.
set -euo pipefail
# shellcheck source=cmd/_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"

exec bash "$root/cmd/run_all_pipeline.sh" dataset=toy llm=tiny_random "$@"
