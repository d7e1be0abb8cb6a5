#!/usr/bin/env bash
# From raw interactions to the comparison table: data, student (the baseline), teacher (untrained and trained), distill,
# evaluate.
#
#   bash cmd/run_all_pipeline.sh [--force] [hydra overrides]
#   bash cmd/run_all_pipeline.sh dataset=movielens dataset.raw_dir=/data/ml-100k llm=minilm seed=1
#
# The overrides go to every stage. A stage whose finished run has the same configuration and data, and whose outputs are
# still there, is not run again and says so; --force runs all of them. The comparison is always made, from stored scores.
#   ACCELERATE_CONFIG=multi_gpu_zero2   a file of accelerate_configs/ (default: single_a100 with an NVIDIA GPU, else cpu)
set -euo pipefail
# shellcheck source=cmd/_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"
ensure_environment

reuse=true
overrides=()
for each in "$@"; do
  if [ "$each" = --force ]; then reuse=false; else overrides+=("$each"); fi
done
set -- ${overrides[@]+"${overrides[@]}"}  # bash 3 takes an empty array for an unset one

SECONDS=0
launch data "$@" reuse=$reuse
launch student "$@" reuse=$reuse
# What the language model knows without any training, for the table; it writes no outputs.
launch teacher "$@" teacher.name=untrained teacher.training.epochs=0 teacher.export.enabled=false reuse=$reuse
launch teacher "$@" reuse=$reuse
launch distill "$@" reuse=$reuse
launch evaluate "$@"
say "The whole chain took $SECONDS s."
