# shellcheck shell=bash
# Functions of the scripts in this folder. Sourced, never run. Relative paths start where the caller stands.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=env_shell/_lib.sh
. "$root/env_shell/_lib.sh"

# Print the help of the calling script if the first argument is --help; any later --help goes to Hydra.
help_if_asked() {
  case "${1:-}" in -h | --help) print_help "$0" && exit 0 ;; esac
}

ensure_environment() { bash "$root/env_shell/setup.sh"; }

# Idle OpenMP threads sleep instead of spinning, which on a busy machine makes steps 5 to 30 times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

# launch STAGE [HYDRA OVERRIDES]: run one stage of llm2rec in the caller's folder, as the launch configuration says.
launch() {
  local stage="$1" config="${ACCELERATE_CONFIG:-}" python="$root/.venv/bin/python"
  shift
  if [ -z "$config" ]; then
    config=cpu
    if has_nvidia_gpu; then config=single_a100; fi
  fi
  if [ ! -f "$config" ]; then config="$root/accelerate_configs/$config.yaml"; fi
  [ -f "$config" ] ||
    die "ACCELERATE_CONFIG is '${ACCELERATE_CONFIG:-}'; expected a file or one of: $(cd "$root/accelerate_configs" && echo *.yaml | sed 's/\.yaml//g')"
  if [[ "$(basename "$config")" == cpu* ]]; then
    # With several processes, Accelerate reads "no GPU" only from this variable.
    export ACCELERATE_USE_CPU=true
    # Otherwise Accelerate asks for the number of physical cores, which some containers do not report.
    if [ "$(basename "$config")" = cpu.yaml ]; then
      export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$python" -c 'import os; print(os.cpu_count() or 1)')}"
    fi
  fi
  say ">>> llm2rec.$stage $*"
  case "$config" in
    "$root"/accelerate_configs/*) if grep -q '^distributed_type: "NO"' "$config"; then
      # One process needs no launcher, which would add its traceback to the stage's error and take Ctrl-C from it.
      ACCELERATE_MIXED_PRECISION="$(sed -n 's/^mixed_precision: *//p' "$config" | tr -d '"')" \
        OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m "llm2rec.$stage" "$@"
      return
    fi ;;
  esac
  "$python" "$root/cmd/_launch.py" --config_file "$config" -m "llm2rec.$stage" "$@"
}
