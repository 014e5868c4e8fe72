"""What warps hand to each other through shared memory, and what kernels read of memory that nobody wrote: what
`tools/sanitize.py` says of findings of NVIDIA's tools is held to here."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtile import plan
from flashtile.backends import portable
from flashtile.backends.portable import launch
from flashtile.backends.portable.launch import Machine
from flashtile.kernels import aot
from tests import caches, conformance, oracle
from tests.binding import portable_on
from tests.caches import EVERYTHING, FP8
from tests.emulated.hopper import emulated
from tests.emulated.ordering import Ordering
from tests.emulated.test_decoding import Emulated
from tests.emulated.test_hopper import WIDE
from tests.emulated.test_latent import SHORT
from tests.problems import CASES
from tests.unwritten import NAN, unwritten_holds
from tools.findings import EXPLAINED, functions_at
from tools.ptx_emulation import SWEEP, copies, memory_instructions
from tools.ptx_emulation.machine import Warp
from tools.ptx_emulation.memory import Mask
from tools.ptx_emulation.parse import Instruction
from tools.ptx_emulation.program import program

BY_NAME = {case.name: case for case in (*CASES, *WIDE)}
HANDED = ("causal_square", "document")
"""Tiles by number, and lists of them: all fields of the mailbox, and the rows' statistics in the backward kernel."""


class Built:
    """What was compiled, by kernel; `removed` is left out of the PTX that runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, removed: str = "") -> None:
        self.ptx: dict[str, str] = {}
        self.running = ""
        self._functions: dict[tuple[str, int], str] = {}
        build = aot.build

        def built(kernel: Any, *arguments: Any, **options: Any) -> Any:
            compiled = build(kernel, *arguments, **options)
            self.running = kernel.fn.__name__
            ptx = self.ptx[self.running] = compiled.asm["ptx"]
            return SimpleNamespace(
                asm={"ptx": re.sub(removed, "", ptx) if removed else ptx}, metadata=compiled.metadata
            )

        monkeypatch.setattr(aot, "build", built)

    def function_at(self, instruction: Instruction) -> str:
        """The function of the package whose line an instruction of the running kernel comes from."""
        ptx = self.ptx[self.running]
        key = (ptx, instruction.line)
        if key not in self._functions:
            before = "\n".join(text for text in ptx.splitlines()[: instruction.line] if ".loc" in text)
            name, line = re.findall(r"// (\S+\.py):(\d+)", before)[-1]
            self._functions[key] = "|".join(functions_at(name, int(line)))
        return self._functions[key]


def storing(ptx: str) -> set[str]:
    """The functions of the package whose lines store to shared memory."""
    found, place = set(), ("", "0")
    for line in ptx.splitlines():
        if ".loc" in line:
            place = (re.findall(r"// (\S+\.py):(\d+)", line) or [place])[-1]
        elif re.search(r"\bst\.shared", line):
            found.update(functions_at(place[0], int(place[1])))
    return found


@pytest.mark.parametrize("name", HANDED)
def test_lanes_meet_before_one_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bar.warp.sync the emulator complains; with it, as everywhere in these tests, it does not."""
    built = Built(monkeypatch, r"bar\.warp\.sync[^;]*;")
    with emulated(SWEEP[0]) as device:
        conformance.check_case(BY_NAME[name], torch.bfloat16, "hopper")
    alone = [complaint for complaint in device.complaints if "arrival-for-others" in complaint]
    assert alone, device.complaints
    assert {"forward_kernel", "backward_kernel"} <= built.ptx.keys()


def test_roles_are_handed_out_between_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own: what waiting warps read is written right before a barrier of all threads, and right after one; they
    read it after one, and come to the next before they do anything else."""
    built = Built(monkeypatch)
    with emulated(SWEEP[0]):
        conformance.check_case(BY_NAME["causal_square"], torch.bfloat16, "hopper")
    for kernel in ("forward_kernel", "backward_kernel"):
        lines = [line.strip() for line in built.ptx[kernel].splitlines()]
        code = [line for line in lines if line and not line.startswith((".loc", "//", "$L"))]
        barriers = [index for index, line in enumerate(code) if re.match(r"barrier\.sync\s+1;", line)]
        writes = [index for index, line in enumerate(code) if re.match(r"st\.shared\S*\s+\[\S+\], \{\d+, \d+\};", line)]
        (read,) = (index for index, line in enumerate(code) if line.startswith("ld.shared.b8"))
        first, last = writes
        assert first + 1 in barriers
        assert {last - 2, last - 1} & set(barriers)
        assert last + 1 in barriers
        assert {read - 3, read - 2, read - 1} & set(barriers)
        # One after the first write, one when a role begins and one when it ends, and so of each role.
        assert len(barriers) >= 2 + 2 * 3
    # What is handed out beside a role, in findings about one: only one of these kernels does.
    assert "hopper/schedule.write" in storing(built.ptx["forward_kernel"])
    assert "hopper/schedule.write" not in storing(built.ptx["backward_kernel"])


OF_WARPGROUPS = r"bar\.sync\s+\d+, 128;"
HANDED_OVER = {
    "wide_causal_gqa": [("schedule.write", "schedule.read"), ("backward.loader", "steps.step")],
    "widest_gqa": [
        ("backward.loader", "steps.value_step"),
        ("backward.loader", "steps.key_step"),
        ("steps.value_step", "steps.key_step"),
    ],
    "latent": [("latent.hand_over", "latent.rescaled")],
    "latent_fp8": [("latent.hand_over", "latent.rescaled")],
}
"""Problems large enough that each place is written again: who writes and who reads."""


@pytest.fixture
def decoded_anew() -> Iterator[None]:
    """What was decoded before is not watched, and what is watched is not kept."""
    program.cache_clear()
    yield
    program.cache_clear()


def _watched(name: str, monkeypatch: pytest.MonkeyPatch, removed: str = "") -> tuple[Ordering, list[str]]:
    """(what met in shared memory, complaints) of such a problem."""
    built = Built(monkeypatch, removed)
    ordering = Ordering(monkeypatch, lambda instruction: built.function_at(instruction).split("|")[0])
    with emulated(SWEEP[0]) as device:
        if name in BY_NAME:
            oracle.ours(BY_NAME[name].call(torch.bfloat16, "cpu"), "hopper")
        else:
            case = replace(SHORT, stored=FP8 if name == "latent_fp8" else None)
            caches.make(case, torch.bfloat16).run(num_splits=1, backend="hopper")
    return ordering, device.complaints


def _both_ways(name: str) -> set[tuple[str, str]]:
    """Written, then read; and read, then written again."""
    pairs = [(f"hopper/{writer}", f"hopper/{reader}") for writer, reader in HANDED_OVER[name]]
    return {*pairs, *((reader, writer) for writer, reader in pairs)}


@pytest.mark.usefixtures("decoded_anew")
@pytest.mark.parametrize("name", HANDED_OVER)
def test_what_is_handed_over_is_ordered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By barriers and mbarriers, and so is all else that warps load and store in shared memory."""
    ordering, complaints = _watched(name, monkeypatch)
    assert _both_ways(name) <= ordering.pairs.keys()
    assert not ordering.races
    assert complaints == []


@pytest.mark.usefixtures("decoded_anew")
@pytest.mark.parametrize("name", ["widest_gqa", "latent", "latent_fp8"])
def test_warpgroups_meet_before_one_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their barrier, what is handed over between warpgroups is not ordered."""
    ordering, complaints = _watched(name, monkeypatch, OF_WARPGROUPS)
    writer, reader = HANDED_OVER[name][-1]
    assert (f"hopper/{writer}", f"hopper/{reader}") in ordering.races
    assert any("arrival-for-others" in complaint for complaint in complaints)


def test_every_explanation_of_a_race_is_held() -> None:
    """Roles by their own test above."""
    roles = {
        f"hopper/{pass_}.{name}" for pass_ in ("forward", "backward") for name in ("specialize", f"{pass_}_kernel")
    }
    held = set.union(roles, *({name for pair in _both_ways(problem) for name in pair} for problem in HANDED_OVER))
    assert held == {name for each in EXPLAINED if each.tool == "racecheck" for name in each.functions}


UNWRITTEN = 0xDB
"""What each byte of memory holds that nobody has written."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many numbers of unwritten memory kernels read, by the function of the package that reads."""
    built, found = Built(monkeypatch), Counter[str]()
    load, resolve = memory_instructions.load, copies.resolve

    def watched(
        warp: Warp, addresses: Any, size: int, count: int, mask: Mask, space: str | None, instruction: Instruction
    ) -> Any:
        values = load(warp, addresses, size, count, mask, space, instruction)
        pattern = int.from_bytes(bytes([UNWRITTEN] * size), "little")
        for value in values if space == "global" and size > 1 else ():
            hits = value == value.dtype.type(pattern)
            number = int((hits if mask is None else hits & mask).sum())
            if number:
                found[built.function_at(instruction)] += number
        return values

    def copied(warp: Warp, address: int, size: int, space: str | None, instruction: Instruction) -> Any:
        views, start = resolve(warp, address, size, space, instruction)
        if (views[1][start : start + size] == UNWRITTEN).all():
            found[built.function_at(instruction)] += 1
        return views, start

    monkeypatch.setattr(copies, "resolve", copied)
    monkeypatch.setattr(memory_instructions, "load", watched)
    with unwritten_holds(UNWRITTEN):
        yield found


@pytest.mark.one_triton
@pytest.mark.parametrize("name", [*HANDED, "headdim_160", "deterministic", "varlen_used_plain"])
def test_hopper_reads_what_was_written(name: str, reads: Counter[str]) -> None:
    with emulated(SWEEP[0]):
        conformance.check_case(BY_NAME[name], torch.bfloat16, "hopper")
    assert not reads


@pytest.mark.one_triton
@pytest.mark.parametrize("name", [*HANDED, "headdim_160", "varlen_used_plain"])
def test_hopper_writes_all_of_its_results(name: str) -> None:
    """The copy engine stores outputs, which initcheck does not see: no NaN of the memory that they come to is left."""
    call = BY_NAME[name].call(torch.bfloat16, "cpu")
    with emulated(SWEEP[0]), unwritten_holds(NAN):
        found = oracle.ours(call, "hopper")
    assert [name for name, tensor in found.items() if tensor.isnan().any()] == []


def test_unwritten_memory_is_told() -> None:
    """As `test_hopper_writes_all_of_its_results` looks for it."""
    with unwritten_holds(NAN):
        assert all(torch.empty(3, dtype=dtype).isnan().all() for dtype in (torch.bfloat16, torch.float32))
        assert torch.empty_like(torch.zeros(2, 3)).isnan().all()
    with unwritten_holds(UNWRITTEN):
        assert (torch.empty(5, dtype=torch.uint8) == UNWRITTEN).all()


@pytest.mark.one_triton
def test_portable_reads_what_was_written(reads: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its kernels, as for Ampere."""
    device = Emulated(80, SWEEP[0])
    kernel = portable_on(Machine(device._launch, False), "ampere")
    monkeypatch.setattr(portable, "KERNELS", (kernel,))
    monkeypatch.setattr(portable, "unavailable", lambda: None)
    launch.forget_fitting()
    plan.choose.cache_clear()
    conformance.check_case(BY_NAME["bias_queries"], torch.bfloat16, "portable")
    plan.choose.cache_clear()
    launch.forget_fitting()
    assert device.ran == ["forward_kernel", "delta_kernel", "query_kernel", "key_kernel", "bias_kernel"]
    assert device.complaints == []
    assert not reads


@pytest.mark.one_triton
def test_parts_alone_are_read_unwritten(reads: Counter[str]) -> None:
    device = Emulated(90, SWEEP[0], splits=4)
    caches.check(caches.make(EVERYTHING, torch.bfloat16), device.run)
    assert reads.keys() == {"joining.some_parts"}
