# shellcheck shell=bash
# Functions of all scripts of the project. Sourced, never run.

# Print the comment header of the script $1, which is its help text.
print_help() {
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$1"
}

say() { printf '%s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# The driver must respond: nvidia-smi also exists on machines whose GPU was removed.
has_nvidia_gpu() {
  command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1
}
