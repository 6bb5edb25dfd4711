"""Memory of the host that is free for this process, within the limit of its container."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUP_FILES = {
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
"""Of versions 2 and 1 of control groups, by the controller in `/proc/self/cgroup`: the files of
the limit and the use, and the prefix of the entries in `memory.stat`."""


def free_host_memory() -> int:
    """Return the bytes that this process may take in all, those that it has included.

    Other processes' memory does not count as free, nor what the limit of a container or of a
    cluster's job forbids. The page cache does: the system gives it up when memory is needed.
    """
    memory = psutil.Process().memory_info()
    # Mapped files, such as libraries, are page cache too. Only Linux tells them apart.
    resident = memory.rss - getattr(memory, "shared", 0)
    free = psutil.virtual_memory().available
    room = container_room()
    if room is not None:
        free = min(free, room)
    return int(resident + free)


def container_room(root: Path = Path("/")) -> int | None:
    """Return the bytes that the control groups of this process may still take.

    Args:
        root: The folder that holds `proc` and `sys`.

    Returns:
        The least room of its group and those above; None without a limit, or without groups.
    """
    rooms = []
    for controller, group in _memory_groups(root):
        limit_file, usage_file, prefix = CGROUP_FILES[controller]
        mount = root / "sys/fs/cgroup" / controller
        # In a container the path may be the host's, whose folders are not visible: the mount is the
        # container's own group then.
        for folder in [mount, *_folders_below(mount, group)]:
            with contextlib.suppress(OSError, ValueError):
                # `max`, for no limit, is no number.
                limit = int((folder / limit_file).read_text())
                usage = int((folder / usage_file).read_text())
                rooms.append(limit - usage + _page_cache(folder, prefix))
    return min(rooms, default=None)


def _memory_groups(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the controller (empty in version 2) and the path of each memory group."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                if controller in CGROUP_FILES:
                    yield controller, path.strip("/")


def _folders_below(mount: Path, group: str) -> list[Path]:
    """Return the folders of a group and of those above it, below the mount."""
    folder = mount
    folders = []
    for name in Path(group).parts:
        folder = folder / name
        folders.append(folder)
    return folders


def _page_cache(folder: Path, prefix: str) -> int:
    """Return the bytes of a group's page cache."""
    names = {f"{prefix}active_file", f"{prefix}inactive_file"}
    pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return sum(int(value) for name, value in pairs if name in names)
