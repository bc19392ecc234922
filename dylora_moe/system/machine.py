"""The resources of this machine and how much of them is free. All sizes are in bytes."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from ..errors import UsageError

PROC_SELF = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")


def readable(size: int) -> str:
    """Format a size for people, in units of 1024 like all sizes of checkpoints: "14.1 MB", "2.0 GB"."""
    if size >= 1 << 30:
        return f"{size / (1 << 30):.1f} GB"
    return f"{size / (1 << 20):.1f} MB"


def available_memory() -> int:
    """Return how much this process can still allocate, by the tightest of machine, cgroups and RLIMIT_AS."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_free_in_cgroups(), *_free_address_space()]))


def free_disk(path: str | os.PathLike) -> int:
    """Return the free space of the disk that `path` is on, or would be on if it existed."""
    existing = Path(os.path.expanduser(path)).absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def peak_memory() -> int:
    """Return the peak resident memory of this process: VmHWM on Linux, its counterpart elsewhere."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        info = psutil.Process().memory_info()
        return getattr(info, "peak_wset", info.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """Return the processor's model name, such as "AMD EPYC 7B13"."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def need_memory(bytes_needed: int, what: str, cheaper: str | None = None) -> None:
    """Check that `what` fits into the available memory, rather than let the kernel kill the process.

    Args:
        bytes_needed: an estimate.
        what: for the message, such as "the base model".
        cheaper: a command that needs less, for the message.

    Raises:
        UsageError: if it does not fit.
    """
    free = available_memory()
    if bytes_needed > free:
        raise UsageError(
            f"Not enough memory for {what}: it needs about {readable(bytes_needed)}, "
            f"and {readable(free)} are available here.{_remedy(cheaper, 'Free some memory, or use a larger machine')}"
        )


def need_disk(bytes_needed: int, path: str | os.PathLike, what: str, cheaper: str | None = None) -> None:
    """Check that `what` fits on the disk of `path`, before anything is written; see `need_memory`."""
    free = free_disk(path)
    if bytes_needed > free:
        raise UsageError(
            f"Not enough disk space for {what}: it needs about {readable(bytes_needed)}, "
            f"and {readable(free)} are free at {os.fspath(path)}.{_remedy(cheaper, 'Free some space')}"
        )


def _remedy(cheaper: str | None, otherwise: str) -> str:
    return f" {otherwise}, or run the cheaper\n    {cheaper}" if cheaper else f" {otherwise}."


def _status(field: str) -> int | None:
    """Return a field of /proc/self/status in bytes; None without such a file or field."""
    try:
        lines = (PROC_SELF / "status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _free_address_space() -> list[int]:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return []
    return [limit - (_status("VmSize") or 0)]


def _free_in_cgroups() -> list[int]:
    """Return what each cgroup of this process leaves, of version 1 and 2. The limit of a parent binds its children."""
    try:
        lines = (PROC_SELF / "cgroup").read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            free += _free_below(CGROUP, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            free += _free_below(CGROUP / "memory", path, *names)
    return free


def _free_below(root: Path, path: str, limit_file: str, used_file: str, reclaimable: str) -> list[int]:
    # In a container, `path` may be that of the host and not exist here. The root is then the container's own cgroup.
    group = root / path.lstrip("/")
    free = []
    for folder in [group, *(parent for parent in group.parents if parent == root or root in parent.parents)]:
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        # Version 1 writes "no limit" as a number near 2**63, which is never the smallest.
        if limit is not None and used is not None:
            free.append(limit - used + _stat(folder / "memory.stat", reclaimable))
    return free


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _stat(path: Path, field: str) -> int:
    """Return a field of memory.stat: the page cache, which counts as used although the kernel frees it on demand."""
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields.get(field, 0))
    except (OSError, ValueError):
        return 0
