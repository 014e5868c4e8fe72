"""Single instructions against the same in plain Python, on lanes with extreme and random numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tools.ptx_emulation import EmuError, Unsupported, bf2f, emulate, f2bf

FULL = 0xFFFFFFFF

# Each lane has four numbers in %r2 to %r5 and its own in %r1, and leaves two in %r10 and %r11.
HEADER = """.version 8.7
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry one(.param .u64 .ptr .global .align 1 p0, .param .u64 .ptr .global .align 1 p1)
.reqntid 32
{
 .reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
 ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1];
 mov.u32 %r1, %tid.x;
 mul.wide.u32 %rd3, %r1, 16; add.s64 %rd4, %rd1, %rd3;
 ld.global.v4.b32 {%r2,%r3,%r4,%r5}, [%rd4];
 mul.wide.u32 %rd5, %r1, 8; add.s64 %rd6, %rd2, %rd5;
 mov.b32 %r11, 0;
"""
FOOTER = "\n st.global.v2.b32 [%rd6], {%r10,%r11};\n ret;\n}\n"


def inputs() -> np.ndarray[Any, Any]:
    numbers = np.random.default_rng(0).integers(0, 2**32, (32, 4), dtype=np.uint32)
    numbers[0], numbers[1], numbers[2] = 0, FULL, (0x80000000, FULL, 31, 1)
    numbers[3, 2] = 40
    return numbers


def outputs(body: str, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found = np.full((32, 2), 0xDEADBEEF, np.uint32)
    emulate(HEADER + body + FOOTER, args=[np.ascontiguousarray(numbers), found])
    return found


def signed(value: int) -> int:
    return (value ^ 0x80000000) - 0x80000000


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def permuted(a: int, b: int, selectors: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = []
    for place in range(0, 16, 4):
        selector = selectors >> place & 15
        byte = source[selector & 7]
        chosen.append((0xFF if byte & 128 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


# What an instruction gives in a lane with the numbers a, b, c and d.
BY_LANE: list[tuple[str, Callable[[int, int, int, int], int]]] = [
    ("lop3.b32 %r10,%r2,%r3,%r4,0xe8;", lambda a, b, c, d: (a & b) | (a & c) | (b & c)),
    ("lop3.b32 %r10,%r2,%r3,%r4,0x96;", lambda a, b, c, d: a ^ b ^ c),
    ("prmt.b32 %r10,%r2,%r3,%r4;", lambda a, b, c, d: permuted(a, b, c)),
    ("prmt.b32 %r10,%r2,%r3,0x5410;", lambda a, b, c, d: permuted(a, b, 0x5410)),
    ("div.s32 %r10,%r2,%r3;", lambda a, b, c, d: towards_zero(signed(a), signed(b)) if b else -1),
    (
        "rem.s32 %r10,%r2,%r5;",
        lambda a, b, c, d: signed(a) - signed(d) * towards_zero(signed(a), signed(d)) if d else a,
    ),
    ("div.u32 %r10,%r2,%r3;", lambda a, b, c, d: a // b if b else FULL),
    ("mul.hi.s32 %r10,%r2,%r3;", lambda a, b, c, d: signed(a) * signed(b) >> 32),
    ("mul.hi.u32 %r10,%r2,%r3;", lambda a, b, c, d: a * b >> 32),
    ("min.relu.s32 %r10,%r2,%r3;", lambda a, b, c, d: max(min(signed(a), signed(b)), 0)),
    ("max.relu.s32 %r10,%r2,%r3;", lambda a, b, c, d: max(signed(a), signed(b), 0)),
    ("mad.lo.s32 %r10,%r2,%r3,%r4;", lambda a, b, c, d: a * b + c),
    ("shl.b32 %r10,%r2,%r4;", lambda a, b, c, d: a << c if c < 32 else 0),
    ("and.b32 %r4,%r4,63; shr.s32 %r10,%r2,%r4;", lambda a, b, c, d: signed(a) >> min(c & 63, 31)),
    ("shf.l.wrap.b32 %r10,%r2,%r3,%r4;", lambda a, b, c, d: (b << 32 | a) << (c & 31) >> 32),
    ("shf.r.clamp.b32 %r10,%r2,%r3,%r4;", lambda a, b, c, d: (b << 32 | a) >> min(c, 32)),
    ("bfe.s32 %r10,%r2,5,7;", lambda a, b, c, d: ((a >> 5 & 127) ^ 64) - 64),
    (
        "and.b32 %r4,%r4,31; and.b32 %r5,%r5,15; bfe.u32 %r10,%r2,%r4,%r5;",
        lambda a, b, c, d: a >> (c & 31) & ((1 << (d & 15)) - 1),
    ),
    ("bfi.b32 %r10,%r2,%r3,8,12;", lambda a, b, c, d: b & ~(0xFFF << 8) | (a & 0xFFF) << 8),
    ("popc.b32 %r10,%r2;", lambda a, b, c, d: a.bit_count()),
    ("clz.b32 %r10,%r2;", lambda a, b, c, d: 32 - a.bit_length()),
    ("brev.b32 %r10,%r2;", lambda a, b, c, d: int(f"{a:032b}"[::-1], 2)),
    ("cvt.s32.s8 %r10,%r2;", lambda a, b, c, d: ((a & 255) ^ 128) - 128),
    ("mov.b64 %rd7,{%r2,%r3}; mov.b64 {_,%r10},%rd7;", lambda a, b, c, d: b),
    (
        "setp.gt.u32 %p1,%r2,%r3; mov.b32 %r10,1; @%p1 add.s32 %r10,%r10,%r4;",
        lambda a, b, c, d: 1 + c if a > b else 1,
    ),
    (
        "setp.gt.u32 %p1,%r2,%r3; setp.lt.and.s32 %p2|%p3,%r2,0,%p1; selp.b32 %r10,1,0,%p2; @%p3 mov.b32 %r10,2;",
        lambda a, b, c, d: (1 if signed(a) < 0 else 2) if a > b else 0,
    ),
]


@pytest.mark.parametrize(("body", "expected"), BY_LANE, ids=[body for body, _ in BY_LANE])
def test_by_lane(body: str, expected: Callable[[int, int, int, int], int]) -> None:
    numbers = inputs()
    found = outputs(body, numbers)[:, 0].tolist()
    assert found == [expected(*lane) & FULL for lane in numbers.tolist()]


# What an instruction gives in lane i, where lanes hold the numbers a.
ACROSS_LANES: list[tuple[str, Callable[[int, Sequence[int]], int]]] = [
    ("shfl.sync.down.b32 %r10,%r2,3,31,-1;", lambda i, a: a[i + 3] if i < 29 else a[i]),
    ("shfl.sync.up.b32 %r10|%p1,%r2,3,0,-1; selp.b32 %r11,1,0,%p1;", lambda i, a: a[i - 3] if i >= 3 else a[i]),
    ("shfl.sync.bfly.b32 %r10,%r2,4,0x181f,-1;", lambda i, a: a[i ^ 4]),
    ("shfl.sync.idx.b32 %r10,%r2,%r1,31,-1;", lambda i, a: a[i]),
    ("redux.sync.add.u32 %r10,%r2,-1;", lambda i, a: sum(a)),
    (
        "setp.lt.s32 %p1,%r2,0; vote.sync.ballot.b32 %r10,%p1,-1;",
        lambda i, a: sum(1 << lane for lane in range(32) if signed(a[lane]) < 0),
    ),
    ("mov.b32 %r10,7; elect.sync %r12|%p1,-1; @%p1 mov.b32 %r10,9;", lambda i, a: 7 if i else 9),
]
# Branches that lanes take differently.
BRANCHES: list[tuple[str, Callable[[int, Sequence[int]], int]]] = [
    (
        "setp.gt.u32 %p1,%r1,15; mov.b32 %r10,0; @%p1 bra L1; add.s32 %r10,%r10,100; setp.gt.u32 %p2,%r1,7;"
        "@%p2 bra L3; add.s32 %r10,%r10,5; L3: bra.uni L2; L1: add.s32 %r10,%r10,200;"
        "L2: add.s32 %r10,%r10,1; shfl.sync.bfly.b32 %r10,%r10,16,31,-1;",
        lambda i, a: 201 if (i ^ 16) > 15 else 101 if (i ^ 16) > 7 else 106,
    ),
    (
        "mov.b32 %r10,0; mov.b32 %r12,%r1; L4: setp.eq.u32 %p1,%r12,0; @%p1 bra L5; add.s32 %r10,%r10,%r12;"
        "sub.s32 %r12,%r12,1; bra.uni L4; L5: add.s32 %r10,%r10,1000;",
        lambda i, a: 1000 + i * (i + 1) // 2,
    ),
    (
        "mov.b32 %r10,5; mov.b32 %r11,6; setp.gt.u32 %p1,%r1,15; @%p1 st.global.v2.b32 [%rd6],{%r10,%r11};"
        "@%p1 ret; mov.b32 %r10,8;",
        lambda i, a: 5 if i > 15 else 8,
    ),
]


@pytest.mark.parametrize(
    ("body", "expected"), ACROSS_LANES + BRANCHES, ids=[body[:40] for body, _ in ACROSS_LANES + BRANCHES]
)
def test_across_lanes(body: str, expected: Callable[[int, Sequence[int]], int]) -> None:
    numbers = inputs()
    column = numbers[:, 0].tolist()
    assert outputs(body, numbers)[:, 0].tolist() == [expected(i, column) & FULL for i in range(32)]


class TestPackedFloats:
    """Pairs of 16-bit numbers in one register, and FP8."""

    def test_float16(self) -> None:
        pairs = np.random.default_rng(1).standard_normal((32, 4, 2)).astype(np.float16)
        found = outputs("fma.rn.f16x2 %r10,%r2,%r3,%r4; mul.f16x2 %r11,%r2,%r3;", pairs.view(np.uint32)[:, :, 0])
        a, b, c, _ = pairs.astype(np.float64).transpose(1, 0, 2)
        assert np.array_equal(found.view(np.float16).reshape(32, 2, 2)[:, 0], (a * b + c).astype(np.float16))
        assert np.array_equal(found.view(np.float16).reshape(32, 2, 2)[:, 1], (a * b).astype(np.float16))

    def test_bfloat16(self) -> None:
        pairs = f2bf(np.random.default_rng(2).standard_normal((32, 4, 2)))
        found = outputs("fma.rn.bf16x2 %r10,%r2,%r3,%r4; max.bf16x2 %r11,%r2,%r3;", pairs.view(np.uint32)[:, :, 0])
        a, b, c, _ = bf2f(pairs).astype(np.float64).transpose(1, 0, 2)
        halves = found.view(np.uint16).reshape(32, 2, 2)
        assert np.array_equal(halves[:, 0], f2bf((a * b + c).astype(np.float32)))
        assert np.array_equal(halves[:, 1], f2bf(np.maximum(a, b)))

    def test_fp8(self) -> None:
        values = np.random.default_rng(3).standard_normal((32, 4)).astype(np.float32)
        body = "cvt.rn.satfinite.e4m3x2.f32 %rs1,%r2,%r3; cvt.u32.u16 %r10,%rs1; cvt.rn.f16x2.e4m3x2 %r11,%rs1;"
        found = outputs(body, values.view(np.uint32))
        codes = torch.from_numpy(values[:, :2]).to(torch.float8_e4m3fn)
        high, low = codes.view(torch.uint8).T.tolist()
        assert found[:, 0].tolist() == [h << 8 | v for h, v in zip(high, low, strict=True)]
        assert found[:, 1].copy().view(np.float16).reshape(32, 2)[:, ::-1].tolist() == codes.half().tolist()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("ld.global.b32 %r10,[%rd1+4096];", r"global access out of bounds: argument 0 .* bytes 4096\.\.4100 of 512"),
        ("mov.b64 %rd7,5; ld.global.b32 %r10,[%rd7];", "unmapped address 0x5"),
        ("add.s64 %rd7,%rd1,2; ld.global.b32 %r10,[%rd7];", "misaligned 4-byte global access"),
        ("ld.shared.b32 %r10,[global_smem+64];", r"shared access out of bounds: bytes 64\.\.68 of 0"),
        ("L9: bra.uni L9;", "more than 1000 warp-instructions: endless loop"),
        ("mov.b32 %r12,global_smem; mbarrier.arrive.shared.b64 _,[%r12];", r"uninitialised mbarrier at shared\+0"),
        ("bar.sync 1, 64;", r"deadlock\n.*warp 0: waits at barrier 1 \(32 of 64 threads arrived\)"),
        ("setp.gt.u32 %p1,%r1,3; @%p1 bar.sync 0;", "warp-collective instruction with inactive lanes"),
    ],
)
def test_what_a_gpu_forbids(body: str, said: str) -> None:
    with pytest.raises(EmuError, match=said):
        emulate(HEADER + body + FOOTER, args=[inputs(), np.zeros((32, 2), np.uint32)], max_instr=1000)


def test_unknown_instructions_matter_when_they_are_reached() -> None:
    body = "setp.gt.u32 %p1,%r1,{}; @%p1 bra L1; bra.uni L2; L1: match.any.sync.b32 %r10,%r2,-1; L2: mov.b32 %r10,3;"
    assert (outputs(body.format(99), inputs())[:, 0] == 3).all()
    with pytest.raises(Unsupported, match=r"match.any.sync.b32 \(ptx line"):
        outputs(body.format(5), inputs())


def test_arguments_must_fit() -> None:
    with pytest.raises(EmuError, match=r"3 arguments .* for 2 PTX parameters: p0.u64\[8\], p1.u64\[8\]"):
        emulate(HEADER + FOOTER, args=[1, 2, 3])
    with pytest.raises(EmuError, match="no entry two"):
        emulate(HEADER + FOOTER, entry="two")


# Lane 0 initialises a barrier at byte 1024 and lets 512 bytes come; all wait for them, and each reads its own.
BULK = """
 mov.b32 %r12,global_smem; add.s32 %r13,%r12,1024; setp.eq.u32 %p1,%r1,0;
 @%p1 mbarrier.init.shared::cta.b64 [%r13],1;
 @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _,[%r13],512;
 @%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r12],[%rd1],512,[%r13];
 {WAIT}
 shl.b32 %r14,%r1,4; add.s32 %r14,%r12,%r14; ld.shared.b32 %r10,[%r14];
 add.s32 %r11,%r10,1; st.shared.b32 [%r14],%r11;
 {FENCE}
 @%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1],[%r12],512;
 cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
"""
WAIT = "L1: mbarrier.try_wait.parity.shared::cta.b64 %p2,[%r13],0; @!%p2 bra L1;"
FENCE = "fence.proxy.async.shared::cta;"


@pytest.mark.parametrize("mode", ["late", "early"])
def test_bulk_copies(mode: str) -> None:
    numbers = inputs()
    expected = 2 * numbers
    expected[:, 0] += 1
    first = numbers[:, 0].copy()
    found = np.zeros((32, 2), np.uint32)
    body = BULK.replace("{WAIT}", WAIT).replace("{FENCE}", FENCE)
    report = emulate(HEADER + body + FOOTER, args=[numbers, found], shared=2048, async_mode=mode)
    assert np.array_equal(found[:, 0], first)
    assert np.array_equal(numbers, expected)
    assert not report.warnings


@pytest.mark.parametrize(("removed", "shown"), [("{WAIT}", "not-waited"), ("{FENCE}", "missing-proxy-fence")])
def test_bulk_copies_with_a_mistake(removed: str, shown: str) -> None:
    body = BULK.replace(removed, "").replace("{WAIT}", WAIT).replace("{FENCE}", FENCE)
    args = [inputs(), np.zeros((32, 2), np.uint32)]
    assert shown in emulate(HEADER + body + FOOTER, args=args, shared=2048).kinds()


MEETING = "bar.warp.sync -1;"


@pytest.mark.parametrize("touch", ["st.shared.b32 [%r14],%r2;", "ld.shared.b32 %r10,[%r14];"])
@pytest.mark.parametrize(("meeting", "kinds"), [(MEETING, []), ("", ["arrival-for-others"])])
def test_a_lane_that_arrives_for_others(touch: str, meeting: str, kinds: list[str]) -> None:
    body = f"""
 mov.b32 %r12,global_smem; add.s32 %r13,%r12,1024; setp.eq.u32 %p1,%r1,0;
 @%p1 mbarrier.init.shared::cta.b64 [%r13],1;
 {MEETING}
 shl.b32 %r14,%r1,4; add.s32 %r14,%r12,%r14; {touch}
 {meeting}
 @%p1 mbarrier.arrive.shared::cta.b64 _,[%r13];
 {WAIT}
"""
    args = [inputs(), np.zeros((32, 2), np.uint32)]
    assert list(emulate(HEADER + body + FOOTER, args=args, shared=2048).kinds()) == kinds


def test_named_barriers() -> None:
    """Warp 1 arrives at a barrier and goes on; warp 0, which waits there, reads what it stored."""
    body = """
 and.b32 %r13,%r1,32; setp.ne.u32 %p1,%r13,0; mov.b32 %r12,global_smem; @%p1 bra L1;
 bar.sync 3,64; ld.shared.b32 %r10,[%r12]; bra.uni L2;
 L1: mov.b32 %r10,17; st.shared.b32 [%r12],%r10; bar.arrive 3,64; L2:
"""
    found = np.zeros((64, 2), np.uint32)
    numbers = np.zeros((64, 4), np.uint32)
    emulate(HEADER + body + FOOTER, args=[numbers, found], shared=16, num_threads=64)
    assert (found[:, 0] == 17).all()


@pytest.mark.parametrize(
    ("instruction", "old", "operand", "expected"),
    [
        ("add.u32", 5, 7, 5 + 32 * 7),
        ("max.s32", 5, FULL, 5),
        ("inc.u32", 5, 9, (5 + 32) % 10),
        ("exch.b32", 5, 7, 7),
        ("add.noftz.bf16x2", 0x3F803F80, 0x3F803F80, 0x42044204),
    ],
)
def test_atomics(instruction: str, old: int, operand: int, expected: int) -> None:
    numbers = np.full((32, 4), old, np.uint32)
    outputs_before = np.zeros((32, 2), np.uint32)
    body = f"mov.b32 %r12,{operand}; atom.global.{instruction} %r10,[%rd1+4],%r12;"
    emulate(HEADER + body + FOOTER, args=[numbers, outputs_before])
    assert numbers[0, 1] == expected
    assert outputs_before[0, 0] == old


def test_compare_and_swap() -> None:
    """One lane takes the lock."""
    numbers = np.zeros((32, 4), np.uint32)
    found = np.zeros((32, 2), np.uint32)
    body = "add.s32 %r12,%r1,1; atom.global.cas.b32 %r10,[%rd1],0,%r12;"
    emulate(HEADER + body + FOOTER, args=[numbers, found])
    assert numbers[0, 0] == 1
    assert found[:, 0].tolist() == [0] + [1] * 31
