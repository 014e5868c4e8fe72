"""Address spaces: from 32 addresses to places in numpy arrays, checked for bounds and alignment."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tools.ptx_emulation.errors import EmuError, Unsupported
from tools.ptx_emulation.formats import U8, UNSIGNED, Array

if TYPE_CHECKING:
    from tools.ptx_emulation.machine import Cta, Warp
    from tools.ptx_emulation.parse import Instruction

# Shared memory starts here in its window, as on Hopper; a multiple of 1024, so that swizzles do not see it.
SHARED_BASE = 1024
# Below 4 GiB: Triton 3.9 keeps addresses of parameters in 32 bits; the same address in the generic space.
PARAMETER_BASE = 1 << 28
# The generic address of shared address 0.
SHARED_WINDOW = 1 << 38
_SHARED_WINDOW_BYTES = 1 << 24
# Each global array has an address range of its own: those of arguments count from 1, those of variables from 900.
ARRAY_SHIFT = 40
FIRST_VARIABLE = 900

Views: TypeAlias = dict[int, Array]
Mask: TypeAlias = Array | None


class Buffer:
    """An array in global memory or the parameters; views: the same bytes as unsigned numbers of each width."""

    def __init__(self, base: int, array: Array, name: str) -> None:
        self.base, self.name = base, name
        data = array.reshape(-1).view(U8)
        self.bytes = data.size
        self.views: Views = {size: data[: data.size // size * size].view(UNSIGNED[size]) for size in (1, 2, 4, 8)}


def active(mask: Mask) -> Sequence[int]:
    """Numbers of the active lanes; a mask of None stands for all 32."""
    return range(32) if mask is None else np.nonzero(mask)[0].tolist()


def need_all_lanes(mask: Mask, instruction: "Instruction") -> None:
    """Of instructions that a warp executes together.

    Raises:
        EmuError: some lanes are inactive.
    """
    if mask is not None and not mask.all():
        raise EmuError(f"warp-collective instruction with inactive lanes ({instruction.where()})")


def shared_offsets(warp: "Warp", addresses: Array, size: int, mask: Mask, instruction: "Instruction") -> Array:
    """Bytes from the start of shared memory; 0 for inactive lanes."""
    offsets: Array = addresses - SHARED_BASE
    used = offsets if mask is None else offsets[mask]
    if used.size:
        low, high = int(used.min()), int(used.max()) + size
        if low < 0 or high > warp.cta.shared_bytes:
            raise _outside_shared(warp, low, high, instruction)
        if (used & (size - 1)).any():
            raise EmuError(f"misaligned {size}-byte shared access, warp {warp.index} ({instruction.where()})")
    return offsets if mask is None else np.where(mask, offsets, 0)


def _outside_shared(warp: "Warp", low: int, high: int, instruction: "Instruction") -> EmuError:
    limit = warp.cta.shared_bytes
    where = f"warp {warp.index} ({instruction.where()})"
    return EmuError(f"shared access out of bounds: bytes {low}..{high} of {limit}, {where}")


def resolve(warp: "Warp", address: int, size: int, space: str | None, instruction: "Instruction") -> tuple[Views, int]:
    """Views and byte offset of one address; a space of None is the generic one.

    Raises:
        EmuError: nothing lies there.
    """
    if space is None:
        space = "global"
        if SHARED_WINDOW <= address < SHARED_WINDOW + _SHARED_WINDOW_BYTES:
            space, address = "shared", address - SHARED_WINDOW
    if space == "shared":
        offset = address - SHARED_BASE
        if offset < 0 or offset + size > warp.cta.shared_bytes:
            raise _outside_shared(warp, offset, offset + size, instruction)
        return warp.cta.views, offset
    if space in ("global", "const"):
        return _resolve_global(warp, address, size, instruction)
    if space == "param":
        offset = address - PARAMETER_BASE
        if offset < 0 or offset + size > warp.launch.parameters.bytes:
            raise EmuError(f"param access out of bounds ({instruction.where()})")
        return warp.launch.parameters.views, offset
    raise Unsupported(f"space {space} ({instruction.where()})")


def _resolve_global(warp: "Warp", address: int, size: int, instruction: "Instruction") -> tuple[Views, int]:
    """Each array has its own range of addresses, so that a number out of bounds hits no other array."""
    buffer = warp.launch.buffers.get(address >> ARRAY_SHIFT)
    if buffer is None:
        where = f"warp {warp.index} ({instruction.where()})"
        raise EmuError(f"global access to unmapped address {address:#x}, {where}")
    offset = address - buffer.base
    if offset + size > buffer.bytes:
        where = f"warp {warp.index} of cta {warp.cta.place} ({instruction.where()})"
        limit = f"bytes {offset}..{offset + size} of {buffer.bytes}"
        raise EmuError(f"global access out of bounds: {buffer.name} {limit}, {where}")
    return buffer.views, offset


def _places(
    warp: "Warp", addresses: Array, size: int, mask: Mask, space: str | None, instruction: "Instruction"
) -> Iterator[tuple[Views, Array, Mask]]:
    """32 addresses as (views, offsets, mask); more than one only if lanes read several arrays."""
    if space == "shared":
        yield warp.cta.views, shared_offsets(warp, addresses, size, mask, instruction), mask
        return
    used = addresses if mask is None else addresses[mask]
    if used.size == 0:
        return
    low, high = int(used.min()), int(used.max())
    if space == "param" or (space is None and PARAMETER_BASE <= int(used[0]) < SHARED_WINDOW):
        views, _ = resolve(warp, high, size, "param", instruction)
        known = addresses if mask is None else np.where(mask, addresses, PARAMETER_BASE)
        yield views, known - PARAMETER_BASE, mask
    elif space is None and SHARED_WINDOW <= low < SHARED_WINDOW + _SHARED_WINDOW_BYTES:
        offsets = shared_offsets(warp, addresses - SHARED_WINDOW, size, mask, instruction)
        yield warp.cta.views, offsets, mask
    elif low >> ARRAY_SHIFT == high >> ARRAY_SHIFT:
        views, _ = resolve(warp, high, size, "global", instruction)
        base = low >> ARRAY_SHIFT << ARRAY_SHIFT
        offsets = (addresses if mask is None else np.where(mask, addresses, base)) - base
        if (offsets & (size - 1)).any():
            raise EmuError(f"misaligned {size}-byte global access, warp {warp.index} ({instruction.where()})")
        yield views, offsets, mask
    else:
        lanes = np.ones(32, bool) if mask is None else mask
        for number in np.unique(used >> ARRAY_SHIFT):
            one_array = lanes & ((addresses >> ARRAY_SHIFT) == number)
            yield from _places(warp, addresses, size, one_array, space, instruction)


def load(
    warp: "Warp",
    addresses: Array,
    size: int,
    count: int,
    mask: Mask,
    space: str | None,
    instruction: "Instruction",
) -> list[Array]:
    """`count` numbers of `size` bytes from each address; anything in inactive lanes."""
    places = list(_places(warp, addresses, size * count, mask, space, instruction))
    if len(places) == 1:
        views, offsets, _ = places[0]
        if views is warp.cta.views:
            warp.touches_shared(mask)
        first = offsets // size
        view = views[size]
        return [view[first + i] if i else view[first] for i in range(count)]
    values: list[Array] = [np.zeros(32, UNSIGNED[size]) for _ in range(count)]
    for views, offsets, lanes in places:
        first = offsets // size
        for i in range(count):
            values[i] = np.where(True if lanes is None else lanes, views[size][first + i], values[i])
    return values


def store(
    warp: "Warp",
    addresses: Array,
    size: int,
    mask: Mask,
    space: str | None,
    instruction: "Instruction",
    values: list[Array],
) -> None:
    """Writes side by side at each address; of lanes with the same address the last one wins."""
    for views, offsets, lanes in _places(warp, addresses, size * len(values), mask, space, instruction):
        first = offsets // size
        view = views[size]
        if lanes is None:
            for i, value in enumerate(values):
                view[first + i] = value
        else:
            first = first[lanes]
            for i, value in enumerate(values):
                view[first + i] = value[lanes]
        if views is warp.cta.views:
            warp.touches_shared(lanes)
            warp.cta.unfenced[(offsets if lanes is None else offsets[lanes]) >> 4] = warp.index + 1
    warp.launch.version += 1


def check_fenced(cta: "Cta", chunks: Array, instruction: "Instruction", reader: str) -> None:
    """Warns where the asynchronous proxy reads what a warp stored and did not fence."""
    writers = cta.unfenced[chunks]
    if writers.any():
        warps = sorted(set((writers[writers > 0] - 1).tolist()))
        message = (
            f"{reader} reads shared memory written by the generic proxy of warps {warps} "
            f"without fence.proxy.async: {instruction.where()}"
        )
        cta.launch.report.warn("missing-proxy-fence", message)
