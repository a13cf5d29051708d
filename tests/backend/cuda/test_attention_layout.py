"""The layout of a step is one upload, of which each array is an aligned part."""

import numpy as np
import pytest

from moempi.backend.cuda.attention_layout import WARP_TILES, lay_out_rows
from moempi.backend.values import Segment
from simt.device import SimtDevice

SEGMENTS = [Segment(0, 1, 70, np.array([4, 9])), Segment(1, 66, 10, np.array([3, 5])), Segment(67, 3, 0, np.array([7]))]


@pytest.mark.parametrize("segments", [SEGMENTS, SEGMENTS[:1], []])
@pytest.mark.parametrize("tile_kernel", [WARP_TILES, None])
def test_a_step_is_one_upload(segments, tile_kernel):
    device, uploads = SimtDevice(eager=True), []

    def upload(values):
        uploads.append(values)
        return device.upload(values.astype(np.int32))

    layout = lay_out_rows(segments, tile_kernel=tile_kernel, upload=upload)
    assert len(uploads) == 1
    positions = [position for s in segments for position in range(s.start, s.start + s.length)]
    assert layout.spans.shape == (len(positions), 2)
    assert layout.spans[:, 0].tolist() == positions
    assert layout.pages.tolist() == [page for s in segments for page in s.pages]
    tiles = [[1, 10, 64, 2], [65, 74, 2, 2]] if tile_kernel and len(segments) == 3 else []
    assert layout.tiles.tolist() == tiles
    assert layout.tiles.ctypes.data % 16 == layout.spans.ctypes.data % 8 == 0
