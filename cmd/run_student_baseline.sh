#!/usr/bin/env bash
# Train the student on the interactions alone, the baseline (stage llm2rec.student).
#
#   bash cmd/run_student_baseline.sh [hydra overrides]
#   bash cmd/run_student_baseline.sh dataset=toy student=gru4rec seed=1
#
#   ACCELERATE_CONFIG=multi_gpu_zero2   a file of accelerate_configs/ (default: single_a100 with an NVIDIA GPU, else cpu)
set -euo pipefail
# shellcheck source=cmd/_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"
ensure_environment

launch student "$@"
