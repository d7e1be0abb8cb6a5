"""Free memory of the host, so that a run that cannot fit fails early instead of being killed."""

import os
from pathlib import Path

from llm2rec.core.errors import ConfigError

__all__ = ["available_bytes", "check_host_memory", "resident_bytes"]

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_STATM = Path("/proc/self/statm")


def available_bytes() -> int | None:
    """Free bytes of this machine, or of the container of this process; None if unknown."""
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
    """Bytes of host memory that this process holds; None if unknown."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def check_host_memory(needed: int, what: str, remedy: str) -> None:
    """Check that an allocation fits into the memory of the host.

    Args:
        needed: Bytes, over all processes of this machine.
        what: Name of the allocation.
        remedy: What to do instead.

    Raises:
        ConfigError: If less is free.
    """
    available = available_bytes()
    if available is not None and needed > available:
        raise ConfigError(
            f"{what} on the host needs {needed / 1e9:.1f} GB, but only {available / 1e9:.1f} GB are free; {remedy}."
        )
