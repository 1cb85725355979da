"""How much memory this process may hold."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device | str = "cpu") -> tuple[int, int | None]:
    """Bytes that this process could hold on the host and on `device`, `None` for a CPU.

    What it holds already is counted in, and the limits of its control group are respected.
    """
    own = psutil.Process().memory_info().rss
    host = min(psutil.virtual_memory().available, *_cgroup_room(), float("inf")) + own
    if torch.device(device).type != "cuda":
        return int(host), None
    free, _ = torch.cuda.mem_get_info(device)
    return int(host), free + torch.cuda.memory_reserved(device)


# Of version 2, and of version 1 of control groups: the limit, what is used, and which part of that are file pages.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _cgroup_room(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Bytes left by each control group that this process is in, itself or by a parent."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = root / "memory" if "memory" in controllers.split(",") else root
        if controllers and top == root:
            continue
        group = top / path.lstrip("/")
        # In a container the path may be that outside, and only the top is there.
        for folder in (group, *group.parents):
            yield from _room(folder)
            if folder == top:
                break


def _room(folder: Path) -> Iterator[int]:
    for limit, used, files in _FILES:
        try:
            most, current = (folder / limit).read_text().strip(), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            yield max(0, int(most) - current + int(stat.get(files, 0)))
