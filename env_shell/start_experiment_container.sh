#!/usr/bin/env bash
# Start the experiment container, with this checkout at /workspace, or join it if it exists.
#
#   bash env_shell/start_experiment_container.sh                            a shell
#   bash env_shell/start_experiment_container.sh bash cmd/quickstart.sh     one command
#
# Builds the image if it is missing: with GPU support if the host has an NVIDIA GPU, which the container then uses. The
# container runs as your user, so that files in the checkout belong to you. Its .venv and caches are in
# LLM2REC_CONTAINER_STATE, separate from the .venv of the host. The container is removed when the first command ends; the
# state is kept.
#
#   LLM2REC_DEVICE            gpu or cpu (default: as the host)
#   LLM2REC_IMAGE             name of the image (default: llm2rec:gpu or llm2rec:cpu)
#   LLM2REC_CONTAINER         name of the container (default: llm2rec-experiment)
#   LLM2REC_CONTAINER_STATE   default: ~/.cache/llm2rec-container
#   LLM2REC_DATA              a folder with data or models to mount read-only at the same path
#   HF_TOKEN, HF_HUB_OFFLINE  passed on if set
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
# Created here, since docker creates mounts as root.
venv="$state/venv-$device" # the two need different builds of torch
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
  # Data loaders pass batches through shared memory, which docker limits to 64 MB.
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
# Set up .venv first, for a shell and a command alike; silent if it is up to date.
docker run "${options[@]}" "$image" bash -c 'bash env_shell/setup.sh && exec "$@"' setup "$@"
