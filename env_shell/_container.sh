# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this use its variables
# Functions of the two container scripts. Sourced, never run.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=env_shell/_lib.sh
. "$root/env_shell/_lib.sh"

device="${LLM2REC_DEVICE:-}"
if [ -z "$device" ]; then
  device=cpu
  if has_nvidia_gpu; then device=gpu; fi
fi
case "$device" in cpu | gpu) ;; *) die "LLM2REC_DEVICE is '$device'; expected cpu or gpu" ;; esac
image="${LLM2REC_IMAGE:-llm2rec:$device}"
container="${LLM2REC_CONTAINER:-llm2rec-experiment}"

need_docker() {
  command -v docker >/dev/null 2>&1 || die "docker is not on PATH. Install Docker (and, for GPUs, NVIDIA's Container Toolkit)"
  docker info >/dev/null 2>&1 || die "the Docker engine does not respond: is it running, and may $(id -un) use it?"
}

# running, exited, created, paused, ... or nothing if there is no such container
container_state() {
  docker container inspect --format '{{.State.Status}}' "$container" 2>/dev/null || true
}

# Print -it on a terminal, otherwise -i: docker fails if there is no terminal.
terminal_option() {
  if [ -t 0 ] && [ -t 1 ]; then echo -it; else echo -i; fi
}

# Join the container, starting it first if it is stopped; run the command given, or a shell.
attach() {
  case "$(container_state)" in
    running) ;;
    paused) docker unpause "$container" >/dev/null ;;
    *) docker start "$container" >/dev/null ;;
  esac
  if [ "$#" -eq 0 ]; then set -- bash; fi
  docker exec "$(terminal_option)" "$container" "$@"
}
