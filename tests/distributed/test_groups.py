"""Processes that disagree or die: one clear error on every one of them, within the engine's timeout."""

import gc
import os
import re
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flashtile import distributed, masks, sharding
from flashtile.check import sharding as check
from flashtile.distributed import calls, groups
from tests.distributed import processes
from tests.distributed.jobs import mesh_of


def _attend(scheme: str = "ring", **changes: Any) -> None:
    """q, k and v of 8 tokens, or as `changes` say."""
    tokens, heads, dtype = changes.pop("tokens", 8), changes.pop("heads", 4), changes.pop("dtype", torch.float32)
    q, k, v = (torch.randn(1, tokens, heads, 8, dtype=dtype) for _ in range(3))
    distributed.attention(q, k, v, scheme=scheme, **changes)


def lengths(rank: int, ranks: int) -> None:
    _attend(tokens=8 + 4 * (rank == 1))


def types(rank: int, ranks: int) -> None:
    _attend("gather", dtype=torch.bfloat16 if rank else torch.float32)


def mask_kinds(rank: int, ranks: int) -> None:
    _attend(causal=rank == 0, mask=masks.prefix(3) if rank else None)


def options(rank: int, ranks: int) -> None:
    _attend("ulysses", heads=3, softcap=3.0 if rank == 2 else None)


def heads_dealt(rank: int, ranks: int) -> None:
    _attend("ulysses", heads=12 if rank == 1 else 9)


def table_of_one(rank: int, ranks: int) -> None:
    """Rank 1 refuses its call by itself."""
    _attend(bias=torch.zeros(8 * ranks, 8 * ranks - rank % 2))


def mask_of_one(rank: int, ranks: int) -> None:
    _attend("gather", mask=torch.ones(8 * ranks - (rank == 2), 8 * ranks, dtype=torch.bool))


def uneven(rank: int, ranks: int) -> None:
    _attend(tokens=7)


def uneven_heads(rank: int, ranks: int) -> None:
    _attend("ulysses", heads=4)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft": {"softcap": 3.0},
    "dropped": {"dropout_p": 0.5},
    "gathered": {"scheme": "gather", "causal": True},
    "dealt": {"scheme": "ulysses", "heads": 3},
    "capped": {"scheme": "ulysses", "heads": 3, "softcap": 3.0},
}


def _known(usual: str, other: str) -> None:
    """All ranks make calls of both kinds; then rank 1 makes one of `other` while the others make one of `usual`."""
    for kind in (usual, other):
        _attend(**KINDS[kind])
    _attend(**KINDS[other if dist.get_rank() == 1 else usual])


def known_options(rank: int, ranks: int) -> None:
    _known("plain", "soft")


def known_dropout(rank: int, ranks: int) -> None:
    """No seed travels before all know that one must."""
    _known("plain", "dropped")


def known_schemes(rank: int, ranks: int) -> None:
    _known("gathered", "plain")


def known_dealt(rank: int, ranks: int) -> None:
    _known("plain", "dealt")


def known_capped(rank: int, ranks: int) -> None:
    _known("dealt", "capped")


def new_to_one(rank: int, ranks: int) -> None:
    """A kind that rank 1 alone has not made before."""
    _attend(causal=True, softcap=2.0)
    _attend(causal=True, softcap=5.0 if rank == 1 else 2.0)


def refused_later(rank: int, ranks: int) -> None:
    """Rank 2 refuses its arguments where the others make a call that all have made before."""
    _attend()
    _attend(window=(-3, 0) if rank == 2 else None)


def contents(rank: int, ranks: int) -> None:
    """Masks of equal shapes and other documents."""
    documents = torch.arange(8 * ranks) // 5
    _attend(mask=masks.document(documents))
    documents[7] += int(rank == 1)
    _attend(mask=masks.document(documents))


def backward_and_forward(rank: int, ranks: int) -> None:
    """Rank 0 goes on to its next call while the others differentiate."""
    q = torch.randn(1, 8, 2, 4, requires_grad=True)
    for scheme in ("ring", "ulysses"):
        heads = q.repeat(1, 1, 3, 1)
        out = distributed.attention(heads, heads, heads, scheme=scheme)
        try:
            out.sum().backward() if rank else distributed.attention(heads, heads, heads, scheme=scheme)
        except check.RanksDisagree as error:
            last = error
        else:
            raise AssertionError("nobody noticed")
    raise last


def vote_and_call(rank: int, ranks: int) -> None:
    if rank:
        _attend()
    else:
        groups.Agreement([groups.group_of(None)]).unanimous(True)


def unequal_shares(rank: int, ranks: int) -> None:
    distributed.unshard(torch.zeros(1, 4 + 2 * (rank == 2)))


def beside(rank: int, ranks: int) -> None:
    """As on NCCL, where statements go through another engine than tensors: more than once, for groups end and begin."""
    whole = groups.group_of(None)
    with mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        for _ in range(2):
            groups._lines.clear()
            _attend()
            with pytest.raises(
                check.RanksDisagree, match=r"softcap: got 0\.0 on rank 0, 3\.0 on rank 1, 0\.0 on rank 2"
            ):
                _attend(softcap=3.0 if rank == 1 else None)
            _attend()
            assert groups._lines[whole].gather.__qualname__.startswith("_beside")
    groups._lines.clear()
    assert groups._timeout(whole) == timedelta(seconds=processes.SECONDS)


def after_errors(rank: int, ranks: int) -> list[int]:
    """The group still works. How many descriptions were made, and how many calls compared, one exchange each."""
    asked: dict[str, int] = {"of": 0, "settle": 0}
    statement, settle = groups.Statement.of, groups.Question.settle
    with (
        mock.patch.object(groups.Statement, "of", lambda fields: (_count(asked, "of"), statement(fields))[1]),
        mock.patch.object(groups.Question, "settle", lambda question: (_count(asked, "settle"), settle(question))[1]),
    ):
        for scheme in ("ring", "ulysses"):
            for _ in range(3):
                _attend(scheme, heads=6, causal=True)
    return list(asked.values())


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] += 1


def unanimous(rank: int, ranks: int) -> list[bool]:
    agreement = groups.Agreement([groups.group_of(None)])
    return [agreement.unanimous(True), agreement.unanimous(rank != 1), groups.Agreement([]).unanimous(False)]


def let_go(rank: int, ranks: int) -> None:
    """A group that its owner destroys ends, with its engine's threads, although calls have used it."""
    group = dist.new_group()
    gone = weakref.ref(group)
    alone, _ = dist.new_subgroups(1)
    outs = []
    for mesh, scheme in ((group, "ring"), (group, "gather"), (group, "ulysses"), ((alone, group), "mixed")):
        q, k, v = (torch.randn(1, 8, ranks, 8, requires_grad=True) for _ in range(3))
        for beside in (False, True):
            groups._lines.clear()
            with mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl" if beside else "cpu:gloo"):
                outs.append(distributed.attention(q, k, v, mesh, scheme=scheme, dropout_p=0.5))
                distributed.attention(q, k, v, mesh, scheme=scheme).sum().backward()
    dist.destroy_process_group(group)
    del group, mesh
    gc.collect()
    assert gone() is None
    for out in outs:
        with pytest.raises(ValueError, match="group: got one that is no more, need it as long as calls use it"):
            out.sum().backward()
    _attend()


def seeds(rank: int, ranks: int) -> torch.Tensor:
    """Ranks that draw their own seeds use the first one's, backwards too."""
    torch.manual_seed(rank)
    v = torch.ones(1, 8, 1, 4, requires_grad=True)
    q = torch.zeros(1, 8, 1, 4)
    out = distributed.ring_attention(q, q, v, dropout_p=0.5)
    (grad,) = torch.autograd.grad(out.sum(), v)
    # With equal weights the sum of out is that of the gradients of v.
    found = torch.stack((out.sum(), grad.sum()))
    dist.all_reduce(found)
    return found


SAID = {
    lengths: [r"q: got \(1, 8, 4, 8\) float32 on rank 0, \(1, 12, 4, 8\) float32 on rank 1"] * 3,
    types: [r"q: got \(1, 8, 4, 8\) float32 on rank 0, \(1, 8, 4, 8\) bfloat16 on rank 1"] * 3,
    mask_kinds: [r'mask: got \["causal","bottom_right"\] on rank 0, \["prefix",3\] on rank 1'] * 3,
    options: [r"softcap: got 0.0 on rank 0, 0.0 on rank 1, 3.0 on rank 2; need the same on every rank"] * 3,
    heads_dealt: [r"q: got \(1, 8, 9, 8\) float32 on rank 0, \(1, 8, 12, 8\) float32 on rank 1"] * 3,
    table_of_one: [
        r"call: got ring forward on rank 0, ValueError: bias: got shape \(24, 23\)",
        r"ValueError: bias: got shape \(24, 23\), need one that broadcasts to .*\(1, 4, 24, 24\)",
        r"call: got ring forward on rank 0, ValueError: bias: got shape \(24, 23\)",
    ],
    mask_of_one: [
        r"call: got gather forward on rank 0, gather forward on rank 1, ValueError: mask: got shape \(23, 24\)",
        r"call: got gather forward on rank 0, gather forward on rank 1, ValueError: mask: got shape \(23, 24\)",
        r"mask: got shape \(23, 24\)",
    ],
    uneven: [r"q: tokens of a rank: got 7, need a multiple of 2 for the layout 'zigzag'; try padding to 8"] * 3,
    uneven_heads: [r"q: got 4 heads for 3 ranks, need a multiple.*try ring_attention"] * 3,
    known_options: [r": softcap: got 0.0 on rank 0, 3.0 on rank 1, 0.0 on rank 2; need the same"] * 3,
    known_dropout: [r"seed: got none on rank 0, \(\) int64 on rank 1.*dropout_p: got 0.0 on rank 0, 0.5 on rank 1"] * 3,
    known_schemes: [r"call: got gather forward on rank 0, ring forward on rank 1, gather forward on rank 2"] * 3,
    known_dealt: [r"call: got ring forward on rank 0, zigzag heads forward on rank 1, ring forward on rank 2"] * 3,
    known_capped: [r": softcap: got 0.0 on rank 0, 3.0 on rank 1, 0.0 on rank 2; need the same"] * 3,
    new_to_one: [r": softcap: got 2.0 on rank 0, 5.0 on rank 1, 2.0 on rank 2; need the same"] * 3,
    refused_later: [
        r"call: got ring forward on rank 0, ring forward on rank 1, ValueError: window",
        r"call: got ring forward on rank 0, ring forward on rank 1, ValueError: window",
        r"ValueError: window\[0\]: got -3",
    ],
    contents: [r": mask's contents: got (\w+) on rank 0, (?!\1)\w+ on rank 1, \1 on rank 2; need the same"] * 3,
    backward_and_forward: [r": call: got zigzag heads forward on rank 0, zigzag heads backward on rank 1"] * 3,
    unequal_shares: [r"tensor: got \(1, 4\) float32 on rank 0, \(1, 4\) float32 on rank 1, \(1, 6\) float32"] * 3,
    vote_and_call: [r": call: got a vote on rank 0, ring forward on rank 1, ring forward on rank 2; need"] * 3,
}


def test_ranks_that_disagree_all_raise(tmp_path: Path) -> None:
    """Each by itself: what waits for the engine's timeout would raise that."""
    jobs = [*SAID, beside, let_go, after_errors, unanimous, seeds]
    *found, other, ended, asked, votes, kept = processes.run(jobs, 3, tmp_path)
    processes.succeeded(other)
    processes.succeeded(ended)
    for job, values in zip(SAID, found, strict=True):
        for wanted, line in zip(SAID[job], processes.raised(values), strict=True):
            assert re.search(wanted, line), f"{job.__name__}: {line}"
    # Once a call by the ring, by Ulysses once for what is dealt out and once for the call; described once a kind.
    assert processes.succeeded(asked) == [[3, 9]] * 3
    assert processes.succeeded(votes) == [[True, False, False]] * 3
    for sums in processes.succeeded(kept):
        torch.testing.assert_close(sums[0], sums[1])


def one_of_a_mesh(rank: int, ranks: int) -> list[str]:
    """Rank 0 shares no group with rank 3, whose call differs; of two voters, one says no."""
    mesh, said = mesh_of((2, 2)), []
    q = torch.randn(1, 8, 4, 4)
    for softcap in (None, 3.0 if rank == 3 else None):
        try:
            distributed.mixed_attention(q, q, q, mesh, softcap=softcap)
        except check.RanksDisagree as error:
            said.append(str(error))
    assert groups.Agreement(groups.groups_of(mesh)).unanimous(rank != 2) is False
    return said


def test_all_ranks_of_a_mesh_hear_of_one(tmp_path: Path) -> None:
    for lines in processes.succeeded(processes.run([one_of_a_mesh], 4, tmp_path)[0]):
        assert len(lines) == 1
        assert re.match(r"softcap: got .*3\.0 on rank 3; need the same on every rank", lines[0]), lines


SECONDS = 4


def _dying(rank: int, ranks: int, folder: str, how: str) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS))
    if "beside" in how:
        whole = groups.group_of(None)
        groups._lines[whole] = groups._beside(whole)
    _attend(causal=True)
    if rank == ranks - 1:
        if "dies" in how:
            os._exit(0)
        begun = time.monotonic()
        while time.monotonic() - begun < 5 * SECONDS and len(list(Path(folder).glob("[01]"))) < 2:
            time.sleep(0.1)
        os._exit(0)
    begun = time.monotonic()
    try:
        for _ in range(2):
            _attend(causal=True)
    except RuntimeError as error:
        Path(folder, str(rank)).write_text(f"{time.monotonic() - begun:.1f} {type(error).__name__} {error}")
    os._exit(0)


@pytest.mark.parametrize("how", ["dies", "hangs", "hangs, beside"])
def test_a_lost_rank_is_the_engines_error_in_time(how: str, tmp_path: Path) -> None:
    mp.start_processes(_dying, (3, str(tmp_path), how), nprocs=3, start_method="forkserver")
    for rank in range(2):
        seconds, text = (tmp_path / str(rank)).read_text().split(" ", 1)
        assert float(seconds) < 4 * SECONDS, text


TO_THE_END = """
import gc, sys, weakref, torch, torch.distributed as dist
from flashtile import distributed
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
everybody = weakref.ref(dist.group.WORLD)
model = torch.nn.Linear(8, 8)
torch.optim.AdamW(model.parameters())
q = model(torch.randn(1, 8, 4, 8))
distributed.attention(q, q, q).sum().backward()
dist.destroy_process_group()
gc.collect()
assert everybody() is None
"""


def test_nobody_keeps_the_group_of_all_processes(tmp_path: Path) -> None:
    """In a process that imports PyTorch's compiler only once the group is there, as optimizers do."""
    done = subprocess.run([sys.executable, "-c", TO_THE_END, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_group() -> None:
    with pytest.raises(
        ValueError, match=r"group: got no process group, need one; try torch.distributed.init_process_group"
    ):
        _attend()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"scheme": "star"}, ValueError, "scheme: got 'star', need one of 'ring', 'ulysses', 'gather', 'mixed'"),
        ({"layout": "random"}, ValueError, "layout: got 'random', need 'zigzag'"),
        ({"cauzal": True}, TypeError, "options: got 'cauzal', need keyword arguments of flashtile.attention"),
        ({"cu_seqlens_q": torch.tensor([0, 8])}, ValueError, "cu_seqlens_k: got None beside cu_seqlens_q"),
    ],
)
def test_arguments_are_checked_before_groups(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        _attend(**options)


def test_names_of_schemes_must_be_known() -> None:
    with pytest.raises(ValueError, match="sharding: got 'Ring/zigzag/7/-', need one that this process has made"):
        sharding.of("Ring/zigzag/7/-")


def test_other_peoples_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="group: got one that this process is not part of"):
        check.member(-1)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_groups_are_checked() -> None:
    with pytest.raises(TypeError, match="group: got str, need a torch ProcessGroup, a DeviceMesh or None"):
        groups.group_of("all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group: got a mesh of 1 dimensions, need 2 for the scheme 'mixed'"):
        groups.groups_of(None)
    mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("ring", "heads"))
    with pytest.raises(ValueError, match="group: got a mesh of 2 dimensions, need 1 for the scheme 'ring'; try mesh"):
        groups.group_of(mesh)
    assert [group.size() for group in groups.groups_of(mesh)] == [1, 1]


@pytest.mark.usefixtures("one_process")
def test_a_new_group_of_an_old_name_is_another_scheme() -> None:
    name, _ = calls.names_of(None, "ring", "zigzag")
    first = calls._schemes[name]
    assert calls.names_of(None, "ring", "zigzag")[0] == name
    assert calls._schemes[name] is first
