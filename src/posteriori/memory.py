"""How much memory is free, from what the operating system itself says, and keeping what was freed."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

__all__ = ["free_memory", "keep_freed_memory"]

UNKNOWN = 2 * 2**30


def free_memory(
    device: str | torch.device = "cpu", proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that can be taken without swapping or being killed.

    On a CPU the least of what Linux states as available, what the container's limit leaves and what the process's
    address space leaves; where none of it is known, a quarter of the machine's memory, and 2 GiB failing that.

    Args:
        device: where the memory is to be taken.
        proc, cgroup: where Linux says so.
    """
    if torch.device(device).type == "cuda":
        free: int = torch.cuda.mem_get_info(torch.device(device))[0]
        return free
    limits = [_available(proc), _container(cgroup), _address_space(proc)]
    known = [v for v in limits if v is not None]
    return max(min(known), 0) if known else _quarter()


def _fields(path: Path) -> dict[str, list[str]]:
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: words[1:] for words in lines if words}


def _available(proc: Path) -> int | None:
    found = _fields(proc / "meminfo").get("MemAvailable")
    return int(found[0]) * 1024 if found else None


def _container(cgroup: Path) -> int | None:
    """What the limit of a control group (version 2 or 1) leaves; files kept in memory give way."""
    for limit, usage in (("memory.max", "memory.current"),
                         ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # fmt: skip
        try:
            most, used = int((cgroup / limit).read_text()), int((cgroup / usage).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        files = _fields((cgroup / limit).parent / "memory.stat")
        return most - used + int(files.get("total_inactive_file", files.get("inactive_file", ["0"]))[0])
    return None


def _address_space(proc: Path) -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int((proc / "self" / "statm").read_text().split()[0])
    except (ImportError, OSError, ValueError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit - pages * os.sysconf("SC_PAGE_SIZE")


def _quarter() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, OSError, ValueError):  # not on Windows
        return UNKNOWN


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensor, for the rest of the process.

    glibc returns what a tensor of over 32 MiB took to the system as soon as it is freed, and the system clears pages
    anew for the next one: a third of the time that a photo of 2048x2048 takes. The price is a larger peak, by a third
    there. It is a matter of the whole process: for commands, not for a library.

    Returns:
        Whether it could be done: other C libraries have other ways.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, most_mapped = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) == 1 for option, value in ((most_mapped, 0), (trim_threshold, 2**31 - 1)))
