"""bfloat16 and FP8 against torch, and tensor maps against slices."""

from typing import Any

import numpy as np
import pytest
import torch

from tools.ptx_emulation import E4M3, E5M2, TensorMap, bf2f, f2bf, f2bf_rz, f2e4m3, f2e5m2

# Every finite float16, which has a number on each side of every FP8 number and of their midpoints.
HALVES = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
FINITE = HALVES[np.isfinite(HALVES)]


def test_bfloat16() -> None:
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    bits = torch.from_numpy(values).to(torch.bfloat16)
    assert f2bf(values).tolist() == bits.view(torch.uint16).tolist()
    assert bf2f(f2bf(values)).tolist() == bits.float().tolist()
    assert (np.abs(bf2f(f2bf_rz(values))) <= np.abs(values)).all()
    assert np.isnan(bf2f(f2bf(np.array([np.nan], np.float32)))).all()


@pytest.mark.parametrize(
    ("encode", "table", "dtype", "largest"),
    [(f2e4m3, E4M3, torch.float8_e4m3fn, 448), (f2e5m2, E5M2, torch.float8_e5m2, 57344)],
    ids=["e4m3", "e5m2"],
)
def test_fp8(encode: Any, table: Any, dtype: torch.dtype, largest: int) -> None:
    expected = torch.from_numpy(FINITE).clamp(-largest, largest).to(dtype)
    assert encode(FINITE).tolist() == expected.view(torch.uint8).tolist()
    assert table[encode(FINITE)].tolist() == expected.float().tolist()
    assert np.isnan(table[encode(np.array([np.nan], np.float32))]).all()


class TestTensorMap:
    ARRAY = np.arange(6 * 16, dtype=np.float32).reshape(6, 16)

    def test_boxes_are_slices_with_zeros_around(self) -> None:
        boxes = TensorMap(self.ARRAY, (4, 8), swizzle=32)
        padded = np.pad(self.ARRAY, 8)
        for corner in ((0, 0), (4, 8), (-2, 12), (5, -3), (9, 0)):
            row, column = (place + 8 for place in corner)
            expected = padded[row : row + 4, column : column + 8]
            assert np.array_equal(boxes.read_box(corner).view(np.float32), expected)

    def test_writes_are_clipped(self) -> None:
        array = np.zeros((6, 16), np.float32)
        boxes = TensorMap(array, (4, 8), swizzle=32)
        ones = np.ones((4, 8), np.float32).view(np.uint32)
        boxes.write_box((4, -4), ones)
        boxes.write_box((4, 0), ones, "add")
        assert array.sum() == array[4:, :8].sum() == 8 + 16
        boxes.write_box((20, 0), ones)
        assert array.sum() == 24

    def test_bfloat16_is_added_as_such(self) -> None:
        array = f2bf(np.full((8, 8), 1.5, np.float32))
        TensorMap(array, (8, 8), swizzle=0, dtype="bf16").write_box((0, 0), array.copy(), "add")
        assert (bf2f(array) == 3).all()

    @pytest.mark.parametrize("swizzle", [32, 64, 128])
    def test_a_swizzle_permutes_chunks(self, swizzle: int) -> None:
        boxes = TensorMap(np.zeros((64, swizzle), np.uint8), (64, swizzle), swizzle)
        chunks = boxes.chunks(2048)
        assert sorted(chunks) == list(range(128, 128 + 64 * swizzle // 16))
        # The first row of eight stays where it is.
        assert chunks[: swizzle // 16].tolist() == list(range(128, 128 + swizzle // 16))

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"block": (4, 8), "swizzle": 16}, "swizzle: got 16"),
            ({"block": (4, 16), "swizzle": 32}, "rows of 64 bytes"),
            ({"block": (4, 2), "swizzle": 0}, "rows of 8 bytes"),
            ({"block": (300, 8), "swizzle": 32}, "need 1 to 256"),
            ({"block": (4, 8), "swizzle": 32, "strides": (16, 2)}, "need 1 as the last"),
            ({"block": (4, 8), "swizzle": 32, "strides": (15, 1)}, "multiples of 16 bytes"),
            ({"block": (4, 8), "swizzle": 32, "shape": (7, 16)}, "reach beyond the array"),
        ],
    )
    def test_what_the_hardware_refuses(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            TensorMap(self.ARRAY, **options)

    def test_arrays_must_be_contiguous(self) -> None:
        with pytest.raises(ValueError, match="C-contiguous"):
            TensorMap(self.ARRAY.T, (4, 4), swizzle=0)
