#!/usr/bin/env bash
# Open another shell in the experiment container, or run a command in it. Starts a stopped container.
#
#   bash env_shell/attach_experiment_container.sh [command ...]
#
#   LLM2REC_CONTAINER   name of the container (default: llm2rec-experiment)
set -euo pipefail
# shellcheck source=env_shell/_container.sh
. "$(dirname "${BASH_SOURCE[0]}")/_container.sh"
case "${1:-}" in -h | --help) print_help "${BASH_SOURCE[0]}" && exit 0 ;; esac
need_docker

if [ -z "$(container_state)" ]; then
  die "there is no container '$container'. Start one: bash env_shell/start_experiment_container.sh"
fi
attach "$@"
