#!/usr/bin/env bash
# Distil the teacher into the student (stage llm2rec.distill).
#
#   bash cmd/run_distill_dllm2rec.sh [hydra overrides]
#   bash cmd/run_distill_dllm2rec.sh dataset=toy student=sasrec distill=dllm2rec seed=1
#
#   ACCELERATE_CONFIG=multi_gpu_zero2   a file of accelerate_configs/ (default: single_a100 with an NVIDIA GPU, else cpu)
set -euo pipefail
# shellcheck source=cmd/_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"
ensure_environment

launch distill "$@"
