"""Free memory and processors: what the system has, within the limits of control groups of both versions."""

import pytest

from moempi.backend.cpu.control_groups import available_bytes, processors

MIB = 1 << 20
V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
ENTRIES = {V1: "7:cpu,memory:/job/step\n0::/elsewhere\n", V2: "0::/job/step\n"}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 999999 kB\nMemAvailable: 204800 kB\n")
    return tmp_path


def make_group(root, version, path, *, limit, usage=0, reclaimable=0):
    mounted, limit_name, usage_name, reclaimable_name = version
    (root / "proc/self/cgroup").write_text(ENTRIES[version])
    group = root / mounted / path
    group.mkdir(parents=True, exist_ok=True)
    (group / limit_name).write_text(f"{limit}\n")
    (group / usage_name).write_text(f"{usage}\n")
    (group / "memory.stat").write_text(f"anon 5\n{reclaimable_name} {reclaimable}\n")


def test_without_control_groups_the_system_s_memory_counts(root):
    assert available_bytes(root) == 200 * MIB


@pytest.mark.parametrize("version", [V1, V2])
def test_a_limit_leaves_what_is_not_used_or_can_be_freed(root, version):
    make_group(root, version, "job/step", limit=64 * MIB, usage=40 * MIB, reclaimable=10 * MIB)
    assert available_bytes(root) == 34 * MIB


@pytest.mark.parametrize("version", [V1, V2])
def test_the_narrowest_group_on_the_path_decides(root, version):
    make_group(root, version, "job/step", limit=128 * MIB)
    make_group(root, version, "job", limit=100 * MIB, usage=30 * MIB)
    assert available_bytes(root) == 70 * MIB


@pytest.mark.parametrize(("version", "limit"), [(V1, 9223372036854771712), (V2, "max")])
def test_a_group_without_a_limit_limits_nothing(root, version, limit):
    make_group(root, version, "job/step", limit=limit)
    assert available_bytes(root) == 200 * MIB


@pytest.mark.parametrize("version", [V1, V2])
def test_in_a_container_that_sees_only_its_own_group_the_mounted_one_counts(root, version):
    make_group(root, version, "", limit=50 * MIB)
    assert available_bytes(root) == 50 * MIB


def test_a_full_group_has_nothing_left(root):
    make_group(root, V2, "job/step", limit=MIB, usage=2 * MIB)
    assert available_bytes(root) == 0


def test_without_a_quota_processors_are_not_limited(root):
    assert processors(root) == float("inf")
    make_group(root, V2, "job/step", limit="max")
    (root / "sys/fs/cgroup/job/step/cpu.max").write_text("max 100000\n")
    assert processors(root) == float("inf")


def test_the_narrowest_quota_on_the_path_limits_processors(root):
    make_group(root, V2, "job/step", limit="max")
    (root / "sys/fs/cgroup/job/step/cpu.max").write_text("400000 100000\n")
    (root / "sys/fs/cgroup/job/cpu.max").write_text("150000 100000\n")
    assert processors(root) == 1.5


def test_a_quota_of_the_first_version_limits_processors(root):
    make_group(root, V1, "job/step", limit=MIB)
    for group, quota in (("job/step", -1), ("job", 300000)):
        folder = root / "sys/fs/cgroup/cpu" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert processors(root) == 3.0
