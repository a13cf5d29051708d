"""What a rank is near to inside its node: GPUs that NVLink joins to its own, or the socket of its processor cores."""

import os
from importlib.util import find_spec
from pathlib import Path

CORES = Path("/sys/devices/system/cpu")


def cpu_island(cores: Path = CORES) -> str:
    """The socket that all cores of this process are on; "" when they are on several, or the system does not say."""
    try:
        sockets = {
            (cores / f"cpu{core}/topology/physical_package_id").read_text().strip() for core in os.sched_getaffinity(0)
        }
    except OSError:
        return ""
    return f"socket {sockets.pop()}" if len(sockets) == 1 else ""


def gpu_island(bus_id: str) -> str:
    """The GPUs that NVLink joins to the one at a PCI address, itself included; "" when none, or nothing says.

    Asks the driver by NVML. GPUs of one switched fabric all see each other.
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
