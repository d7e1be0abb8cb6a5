#!/usr/bin/env bash
# From raw interactions to the comparison table: data, student (the baseline), teacher (untrained and trained), distill,
# evaluate.
#
#   bash cmd/run_all_pipeline.sh [hydra overrides]
#   bash cmd/run_all_pipeline.sh dataset=movielens dataset.raw_dir=/data/ml-100k llm=minilm seed=1
#
# The overrides go to every stage.
#   ACCELERATE_CONFIG=multi_gpu_zero2   a file of accelerate_configs/ (default: single_a100 with an NVIDIA GPU, else cpu)
set -euo pipefail
# shellcheck source=cmd/_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"
ensure_environment

SECONDS=0
launch data "$@"
launch student "$@"
# What the language model knows without any training, for the table; it writes no outputs.
launch teacher "$@" teacher.name=untrained teacher.training.epochs=0 teacher.export.enabled=false
launch teacher "$@"
launch distill "$@"
launch evaluate "$@"
say "The whole chain took $SECONDS s."
