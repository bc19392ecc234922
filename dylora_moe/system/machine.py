"""What this machine has: memory, disk, and what its limits leave of them. Sizes are in bytes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from ..errors import UsageError

PROC_SELF = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")


def readable(size: int) -> str:
    """A size for people, in the 1024-based units that the checkpoint sizes are given in."""
    if size >= 1 << 30:
        return f"{size / (1 << 30):.1f} GB"
    return f"{size / (1 << 20):.1f} MB"


def available_memory() -> int:
    """Bytes that this process can still allocate: the least of what machine, cgroups and RLIMIT_AS leave."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_cgroup_rooms(), *_address_space_room()]))


def free_disk(path: str | os.PathLike) -> int:
    """Bytes free where `path` is or would be: its nearest existing parent decides."""
    place = Path(os.path.expanduser(path)).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far (VmHWM, or what the system has like it)."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        info = psutil.Process().memory_info()
        return getattr(info, "peak_wset", info.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def need_memory(bytes_needed: int, what: str, cheaper: str | None = None) -> None:
    """Raise UsageError, before the kernel kills, if `what` needs more memory than there is."""
    there = available_memory()
    if bytes_needed > there:
        raise UsageError(
            f"Not enough memory for {what}: it needs about {readable(bytes_needed)}, "
            f"and {readable(there)} are available here.{_remedy(cheaper, 'Free some memory, or use a larger machine')}"
        )


def need_disk(bytes_needed: int, path: str | os.PathLike, what: str, cheaper: str | None = None) -> None:
    """Raise UsageError, before anything is written, if `what` needs more space than there is at `path`."""
    there = free_disk(path)
    if bytes_needed > there:
        raise UsageError(
            f"Not enough disk space for {what}: it needs about {readable(bytes_needed)}, "
            f"and {readable(there)} are free at {os.fspath(path)}.{_remedy(cheaper, 'Free some space')}"
        )


def describe() -> dict:
    """What a measurement was taken on: processor, cores, memory and the versions that matter."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "memory_bytes": _total_memory(),
        "available_bytes": available_memory(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _remedy(cheaper: str | None, otherwise: str) -> str:
    return f" {otherwise}, or run the cheaper\n    {cheaper}" if cheaper else f" {otherwise}."


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes, or None where there is no such file or field."""
    try:
        lines = (PROC_SELF / "status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _address_space_room() -> list[int]:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return []
    return [limit - (_status("VmSize") or 0)]


def _cgroup_rooms() -> list[int]:
    """What each cgroup above this process leaves, of either version. A limit of a parent binds its children too."""
    try:
        lines = (PROC_SELF / "cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            rooms += _rooms(CGROUP, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            rooms += _rooms(CGROUP / "memory", path, *names)
    return rooms


def _rooms(root: Path, path: str, limit_file: str, used_file: str, reclaimable: str) -> list[int]:
    # In a container the path may be the host's and lead nowhere; the root is then the container's own group.
    group = root / path.lstrip("/")
    folders = [group, *(parent for parent in group.parents if parent == root or root in parent.parents)]
    rooms = []
    for folder in folders:
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        # Version 1 writes "no limit" as a number near 2**63: far more than the machine has, so it decides nothing.
        if limit is not None and used is not None:
            rooms.append(limit - used + _stat(folder / "memory.stat", reclaimable))
    return rooms


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _stat(path: Path, field: str) -> int:
    """One field of memory.stat. Page cache counts as used there, but the kernel gives it back when asked."""
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields.get(field, 0))
    except (OSError, ValueError):
        return 0


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _total_memory() -> int:
    import psutil

    return psutil.virtual_memory().total


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
