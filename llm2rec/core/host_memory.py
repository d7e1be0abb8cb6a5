"""How much memory the host has left, so that what cannot fit is refused instead of killed."""

import os
from pathlib import Path

from llm2rec.core.errors import ConfigError

__all__ = ["available_bytes", "check_host_memory", "resident_bytes"]

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_STATM = Path("/proc/self/statm")


def available_bytes() -> int | None:
    """Bytes that this machine, or the container this process is in, has left; None where that cannot be told."""
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        return min(available, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available


def resident_bytes() -> int | None:
    """Bytes of the host's memory that this process holds; None where that cannot be told."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def check_host_memory(needed: int, what: str, remedy: str) -> None:
    """Refuse what does not fit.

    Args:
        needed: Bytes, over all processes of this machine.
        what: What they are for.
        remedy: What to do instead.

    Raises:
        ConfigError: If the host has less left.
    """
    available = available_bytes()
    if available is not None and needed > available:
        raise ConfigError(
            f"{what} on the host takes {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are left there; {remedy}."
        )
