#!/usr/bin/env bash
# Train the iLoRA teacher and export its outputs for distillation (stage llm2rec.teacher).
#
#   bash cmd/run_teacher_train.sh [hydra overrides]
#   bash cmd/run_teacher_train.sh dataset=toy llm=tiny_random seed=1
#
#   ACCELERATE_CONFIG=multi_gpu_zero2   a file of accelerate_configs/ (default: single_a100 with an NVIDIA GPU, else cpu)
set -euo pipefail
# shellcheck source=cmd/_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"
ensure_environment

launch teacher "$@"
