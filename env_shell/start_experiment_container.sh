#!/usr/bin/env bash
# Start the experiment container, with this checkout at /workspace, or join it when it is there already.
#
#   bash env_shell/start_experiment_container.sh                            a shell
#   bash env_shell/start_experiment_container.sh bash cmd/quickstart.sh     one command
#
# Builds the image if it is missing: that for GPUs where the host has NVIDIA ones, which are handed over, and that
# without otherwise. You are yourself inside: what is written to the checkout belongs to you. The container's .venv and caches lie in LLM2REC_CONTAINER_STATE, apart from
# the host's own .venv. The container goes when the first command ends; the state stays.
#
#   LLM2REC_DEVICE            gpu or cpu (default: what the host has)
#   LLM2REC_IMAGE             name of the image (default: llm2rec:gpu or llm2rec:cpu)
#   LLM2REC_CONTAINER         name of the container (default: llm2rec-experiment)
#   LLM2REC_CONTAINER_STATE   default: ~/.cache/llm2rec-container
#   LLM2REC_DATA              a folder with data or models to mount read-only at the same path
#   HF_TOKEN, HF_HUB_OFFLINE  handed on if set
set -euo pipefail
# shellcheck source=env_shell/_container.sh
. "$(dirname "${BASH_SOURCE[0]}")/_container.sh"
case "${1:-}" in -h | --help) print_help "${BASH_SOURCE[0]}" && exit 0 ;; esac
need_docker

if [ -n "$(container_state)" ]; then
  say "Joining the container $container"
  attach "$@"
  exit
fi

if ! docker image inspect "$image" >/dev/null 2>&1; then
  say "Building the image $image"
  docker build --tag "$image" --build-arg "DEVICE=$device" "$root"
fi

state="${LLM2REC_CONTAINER_STATE:-${XDG_CACHE_HOME:-$HOME/.cache}/llm2rec-container}"
# Made here: what docker makes for a mount belongs to root.
venv="$state/venv-$device" # neither torch nor CUDA of the one would serve in the other
mkdir -p "$state/home" "$venv" "$root/.venv"

options=(
  --rm
  "$(terminal_option)"
  --name "$container"
  --user "$(id -u):$(id -g)"
  --security-opt no-new-privileges
  --env HOME=/home/experiment
  --volume "$root:/workspace"
  --volume "$state/home:/home/experiment"
  --volume "$venv:/workspace/.venv"
  --workdir /workspace
  # Data loaders hand batches over through shared memory, of which docker gives 64 MB.
  --ipc host
  --env HF_TOKEN
  --env HF_HUB_OFFLINE
)
if [ "$device" = gpu ]; then options+=(--gpus all); fi
if [ -n "${LLM2REC_DATA:-}" ]; then
  data="$(cd "$LLM2REC_DATA" && pwd -P)" || die "LLM2REC_DATA is '$LLM2REC_DATA'; expected a folder"
  options+=(--volume "$data:$data:ro")
fi

if [ "$#" -eq 0 ]; then set -- bash; fi
# .venv first, so that both a shell and a command find it ready. It says what it does, and nothing when all is there.
docker run "${options[@]}" "$image" bash -c 'bash env_shell/setup.sh && exec "$@"' setup "$@"
