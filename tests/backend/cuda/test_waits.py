"""What happens while the host waits for the CUDA backend: transfers advance, and a kernel's fault ends the wait."""

from types import SimpleNamespace

import numpy as np
import pytest

from moempi.backend.cuda.backend import CudaBackend
from moempi.comm.transfers import PendingTransfers, Transfers, after_verbs
from simt.device import SimtDevice


def test_transfers_advance_while_the_host_waits_for_a_verb():
    """A transfer of another lane, which waits for an event, is started and finished inside `score` and `download`."""
    pending = PendingTransfers()
    backend = CudaBackend(SimtDevice(), precision="bfloat16", reproducible=False, progress=pending.progress)
    transfers, rows = Transfers(backend, pending), backend.tensor(np.zeros((4, 8), np.uint16))
    logits, experts = backend.tensor(np.zeros((3, 7), np.float32)), backend.upload(np.arange(24).reshape(8, 3))
    for wait in (
        lambda: backend.download(backend.group(experts, np.arange(24), num_ids=24)[2]),
        lambda: backend.score(logits, np.array([1, 2, 3]), top=2),
        lambda: backend.download(backend.add(logits, logits)),
    ):
        with backend.on_queue(1):
            backend.add(rows, rows)
            request = SimpleNamespace(Test=lambda: True)
            transfer = transfers.start(after_verbs(backend, lambda request=request: request), waiting="exchange")
        for _ in range(8):
            rows = backend.add(rows, rows)
        assert not transfer.finished
        wait()
        assert transfer.finished
        assert backend.queue == 0


def test_a_fault_is_raised_by_every_wait():
    backend = CudaBackend(SimtDevice(fault_at=1), precision="bfloat16", reproducible=False)
    rows = backend.tensor(np.zeros((4, 8), np.uint16))
    total = backend.add(rows, rows)
    for wait in (
        lambda: backend.download(total),
        lambda: backend.score(total, np.arange(4), top=2),
    ):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            wait()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        backend.record_event().is_done()
