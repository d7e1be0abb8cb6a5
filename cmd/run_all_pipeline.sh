#!/usr/bin/env bash
# The whole pipeline: data, student (the baseline), teacher (untrained and trained), distill (DLLM2Rec), ensemble (of student,
# teacher and neighbours), distill (a student that reads titles, from the ensemble), evaluate.
#
#   bash cmd/run_all_pipeline.sh [--force] [hydra overrides]
#   bash cmd/run_all_pipeline.sh dataset=movielens dataset.raw_dir=/data/ml-100k llm=minilm seed=1
#
# The overrides go to every stage. A stage is skipped if a finished run has the same configuration and data and its outputs
# still exist; --force runs all stages. The evaluation always runs, from stored scores.
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
set -- ${overrides[@]+"${overrides[@]}"}  # bash 3 treats an empty array as unset

SECONDS=0
launch data "$@" reuse=$reuse
launch student "$@" reuse=$reuse
# The language model without any training, for the table; it exports no outputs.
launch teacher "$@" teacher.name=untrained teacher.training.epochs=0 teacher.export.enabled=false reuse=$reuse
launch teacher "$@" reuse=$reuse
launch distill "$@" reuse=$reuse
launch ensemble "$@" reuse=$reuse
launch distill distill=listwise_reading "$@" reuse=$reuse
launch evaluate "$@"
say "The whole pipeline took $SECONDS s."
