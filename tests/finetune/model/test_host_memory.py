"""The room of a container: limits of control groups, of both versions, and of groups above."""

from pathlib import Path

import psutil
import pytest

from finetune.model.host_memory import container_room, free_host_memory

GIB = 2**30
NO_LIMIT_V1 = 9223372036854771712


def write_group(
    folder: Path, limit: int | str, usage: int, page_cache: int = 0, version: int = 2
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_file, usage_file, prefix = {
        2: ("memory.max", "memory.current", ""),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    }[version]
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / usage_file).write_text(f"{usage}\n")
    stat = f"anon 5\n{prefix}inactive_file {page_cache - 1}\n{prefix}active_file 1\n"
    (folder / "memory.stat").write_text(stat)


def write_groups(root: Path, *lines: str) -> Path:
    """Write the groups of this process; return the folder of their mounts."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    return root / "sys/fs/cgroup"


def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    mount = write_groups(tmp_path, "0::/")
    write_group(mount, 8 * GIB, 3 * GIB, page_cache=GIB)

    assert container_room(tmp_path) == 6 * GIB


def test_the_tightest_of_the_groups_above_counts(tmp_path: Path) -> None:
    mount = write_groups(tmp_path, "0::/slurm/job_7/step_0")
    write_group(mount / "slurm", 100 * GIB, 10 * GIB)
    write_group(mount / "slurm/job_7", 8 * GIB, 3 * GIB)
    write_group(mount / "slurm/job_7/step_0", "max", 2 * GIB)

    assert container_room(tmp_path) == 5 * GIB


@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_version_1_has_a_mount_of_its_own(tmp_path: Path, controllers: str) -> None:
    mount = write_groups(tmp_path, "3:cpuset:/", f"4:{controllers}:/docker/abc", "0::/")
    # Where the host's path is not visible in the container.
    write_group(mount / "memory", 4 * GIB, 3 * GIB, page_cache=GIB, version=1)

    assert container_room(tmp_path) == 2 * GIB


@pytest.mark.parametrize("lines", [(), ("0::/",), ("0::/gone", "4:memory:/gone")])
def test_without_a_limit_there_is_none(tmp_path: Path, lines: tuple[str, ...]) -> None:
    mount = write_groups(tmp_path, *lines)
    mount.mkdir(parents=True)

    assert container_room(tmp_path) is None


def test_no_limit_is_none_or_more_than_any_machine_has(tmp_path: Path) -> None:
    mount = write_groups(tmp_path, "0::/", "4:memory:/")
    write_group(mount, "max", GIB)
    write_group(mount / "memory", NO_LIMIT_V1, GIB, version=1)

    room = container_room(tmp_path)

    assert room is not None
    assert room > 2**60


def test_free_memory_is_within_what_the_host_has() -> None:
    free = free_host_memory()

    assert 0 < free <= psutil.virtual_memory().total
