# shellcheck shell=bash
# Helpers that every script of the project shares. Sourced, never run.

# Print the comment header of the script $1, which is its help text.
print_help() {
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$1"
}

say() { printf '%s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# The driver must answer: nvidia-smi alone is also found on machines whose GPU is gone.
has_nvidia_gpu() {
  command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1
}
