"""The domain of a rank: sockets as the system reports them, NVLink as the driver's library reports it."""

import os
import subprocess
import sys
from itertools import chain

import pytest

from moempi.backend.locality import cpu_island, gpu_island

# A driver library for four GPUs, of which NVLink joins 0 with 1 and 2 with 3; GPU n has the PCI address n.
DRIVER = """
#include <stdlib.h>
typedef int status;
status nvmlInit_v2(void) { return 0; }
status nvmlInitWithFlags(unsigned flags) { return 0; }
status nvmlShutdown(void) { return 0; }
status nvmlDeviceGetCount_v2(unsigned *count) { *count = 4; return 0; }
status nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(long)(index + 1); return 0; }
status nvmlDeviceGetIndex(void *device, unsigned *index) { *index = (unsigned)(long)device - 1; return 0; }
status nvmlDeviceGetHandleByPciBusId_v2(const char *address, void **device) {
    *device = (void *)(strtol(address, 0, 16) + 1);
    return 0;
}
status nvmlDeviceGetP2PStatus(void *one, void *other, int kind, int *found) {
    *found = kind == 2 && ((long)one - 1) / 2 == ((long)other - 1) / 2 && NVLINK ? 0 : 5;
    return 0;
}
"""


@pytest.mark.parametrize(
    ("sockets", "domain"),
    [({"0"}, "socket 0"), ({"1"}, "socket 1"), ({"0", "1"}, ""), (set(), "")],
)
def test_the_numa_domain_is_the_socket_of_all_cores(tmp_path, sockets, domain):
    for core, socket in zip(os.sched_getaffinity(0), chain(sockets, [max(sockets, default="")] * 1000), strict=False):
        if socket:
            (tmp_path / f"cpu{core}" / "topology").mkdir(parents=True)
            (tmp_path / f"cpu{core}" / "topology" / "physical_package_id").write_text(socket + "\n")
    if len(sockets) > len(os.sched_getaffinity(0)):
        pytest.skip("needs a core for each socket")
    assert cpu_island(tmp_path) == domain


def test_the_sockets_of_this_machine_can_be_read():
    assert cpu_island() in {"", *(f"socket {number}" for number in range(64))}


def test_without_a_driver_there_is_no_nvlink_domain():
    assert gpu_island("0000:01:00.0") == ""


@pytest.mark.parametrize(
    ("address", "nvlink", "domain"),
    [("0", 1, "NVLink of GPUs 0, 1"), ("3", 1, "NVLink of GPUs 2, 3"), ("1", 0, "")],
)
def test_the_nvlink_domain_is_the_gpus_that_nvlink_joins(tmp_path, address, nvlink, domain):
    pytest.importorskip("pynvml")
    source, library = tmp_path / "driver.c", tmp_path / "libnvidia-ml.so.1"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", f"-DNVLINK={nvlink}", "-o", library, source], check=True)
    code = f"from moempi.backend.locality import gpu_island; print(gpu_island({address!r}))"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    outcome = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == domain
