"""The domain of a rank inside its node (NVLink or NUMA): GPUs joined by NVLink, or the socket of its cores.

A domain is called `island` in topology.json and in the names of these functions.
"""

import os
from importlib.util import find_spec
from pathlib import Path

CORES = Path("/sys/devices/system/cpu")


def cpu_island(cores: Path = CORES) -> str:
    """The NUMA domain: the socket of all cores of this process; "" if there are several or the system gives none."""
    try:
        sockets = {
            (cores / f"cpu{core}/topology/physical_package_id").read_text().strip() for core in os.sched_getaffinity(0)
        }
    except OSError:
        return ""
    return f"socket {sockets.pop()}" if len(sockets) == 1 else ""


def usable_cores() -> str:
    """The cores on which this process may run, as a text that is equal on ranks that share them."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


def gpu_island(bus_id: str) -> str:
    """The NVLink domain: the GPUs joined by NVLink to the GPU at a PCI address, itself included.

    Queries the driver through NVML. Returns "" if NVLink joins no other GPU, or NVML is not installed or fails. GPUs of
    one switched fabric are all joined to each other.
    """
    if find_spec("pynvml") is None:
        return ""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ""
    try:
        own = nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        own_index = nvml.nvmlDeviceGetIndex(own)
        joined = [own_index]
        for index in range(nvml.nvmlDeviceGetCount()):
            if index != own_index:
                other = nvml.nvmlDeviceGetHandleByIndex(index)
                status = nvml.nvmlDeviceGetP2PStatus(own, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
                if status == nvml.NVML_P2P_STATUS_OK:
                    joined.append(index)
    except nvml.NVMLError:
        return ""
    finally:
        nvml.nvmlShutdown()
    return "NVLink of GPUs " + ", ".join(map(str, sorted(joined))) if len(joined) > 1 else ""
