"""Triton's folder of compiled kernels: unusable, full, damaged, or shared by processes that compile the same."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.runtime.cache import FileCacheManager

from flashtile.kernels import aot, merging
from flashtile.kernels.storage import kept
from flashtile.kernels.words import odd


def build(width: int = 64) -> Any:
    """A small kernel for an H100."""
    out, lse = torch.empty(1, 16, 2, width, dtype=torch.bfloat16), torch.empty(1, 2, 16)
    strides, rows = out.stride()[:-1], tuple(map(odd, lse.stride()[:-1]))
    given = {"held": out, "held_lse": lse, "out": out, "lse": lse, "sizes": tuple(map(odd, (16, 16, 2, width)))}
    given |= {"held_strides": strides, "held_lse_strides": rows, "out_strides": strides, "lse_strides": rows}
    return aot.build(merging.merge_kernel, {**given, "TILE": 4, "WIDTH": width, "WHOLE": True}, aot.HOPPER, num_warps=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one of this test's own."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def _entry(folder: Path) -> Path:
    (entry,) = [path.parent for path in folder.rglob("merge_kernel.json")]
    return entry


# What Triton's own destructor says of a kernel that it could not load.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_a_folder_that_is_none(folder: Path) -> None:
    folder.write_text("a file stands in its place")
    with pytest.raises(RuntimeError, match=r"kernel cache: got .*kernels, .*Error: .*TRITON_CACHE_DIR=another folder"):
        build()


@pytest.mark.parametrize(
    ("number", "way_out"), [(errno.EACCES, "making it writable"), (errno.EROFS, "making it writable"),
                            (errno.ENOSPC, "freeing some space"), (errno.EDQUOT, "freeing some space")]
)  # fmt: skip
def test_a_folder_that_takes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, way_out: str) -> None:
    """No permission, a disk that is full: root may write anywhere, so that the system's answer is pretended."""
    monkeypatch.setattr(os, "replace", _failing(number))
    with pytest.raises(
        RuntimeError, match=rf"kernel cache: got .*kernels, .*{os.strerror(number)}.*try {way_out}"
    ) as told:
        build()
    assert isinstance(told.value.__cause__, OSError)
    monkeypatch.undo()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(folder))
    assert build().asm["cubin"]


def _failing(number: int) -> Callable[..., None]:
    def replace(*paths: Any) -> None:
        raise OSError(number, os.strerror(number), str(paths[-1]))

    return replace


@pytest.mark.parametrize("left", ["", '{"hash": "0', "[]", "\udcff"], ids=("empty", "cut", "other", "no_text"))
def test_damaged_metadata(folder: Path, left: str) -> None:
    build()
    (_entry(folder) / "merge_kernel.json").write_bytes(left.encode(errors="surrogateescape"))
    with pytest.raises(RuntimeError, match=r"kernel cache: got a damaged entry in .*kernels .*try emptying the folder"):
        build()


@pytest.mark.parametrize("damage", ["list", "cubin", "ptx"])
def test_lost_files(folder: Path, damage: str) -> None:
    """Releases of Triton differ: one compiles anew, another says so; none gives half a kernel."""
    whole = build().asm["cubin"]
    entry = _entry(folder)
    if damage == "list":
        (entry / "__grp__merge_kernel.json").write_text("{")
    else:
        (entry / f"merge_kernel.{damage}").unlink()
    said = ""
    try:
        assert build().asm["cubin"] == whole
    except RuntimeError as error:
        said = str(error)
    assert said == "" or "kernel cache: got a damaged entry" in said
    shutil.rmtree(folder)
    assert build().asm["cubin"] == whole


@pytest.mark.parametrize("share", [0, 3, 200, 999])
def test_binaries_that_are_cut_off(folder: Path, share: int) -> None:
    """They reach no driver, which might end the process: not ours, that is, for others' kernels are theirs."""
    kernel = build()

    def load() -> None:
        knobs.runtime.kernel_load_start_hook(None, None, "merge_kernel", kernel.metadata_group, kernel.hash)

    with kept():
        load()
    binary = _entry(folder) / "merge_kernel.cubin"
    binary.write_bytes(binary.read_bytes()[: binary.stat().st_size * share // 1000])
    with (
        pytest.raises(RuntimeError, match=r"kernel cache: got a damaged entry .*cubin is cut off"),
        kept(),
    ):
        load()
    load()


def test_binaries_that_a_driver_refuses() -> None:
    with pytest.raises(RuntimeError, match=r"kernel cache: got a damaged entry .*image is invalid"), kept():
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), RuntimeError("out of memory"), OSError("no compiler")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as told, kept():
        raise error
    assert told.value is error


BUILD = "import json, sys; from tests.test_storage import build; print(json.dumps(build().asm['ptx'][-2000:]))"


def test_processes_that_compile_the_same_kernel_at_once(tmp_path: Path) -> None:
    own = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "shared"), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=own)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert len({json.loads(out) for out, _ in said}) == 1
    assert len([*(tmp_path / "shared").rglob("merge_kernel.cubin")]) == 1
    assert not [*(tmp_path / "shared").rglob("*tmp*")]


def test_the_folder_is_tritons() -> None:
    assert FileCacheManager("0" * 64).cache_dir.startswith(triton.knobs.cache.dir)
