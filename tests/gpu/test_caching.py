"""What calls leave behind on a GPU: damaged or unusable folders of kernels, several devices, forked processes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import flashtile
from flashtile import facts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CALL = """
import torch, flashtile
q = torch.randn(1, 100, 2, 64, device="cuda", dtype=torch.bfloat16)
out = flashtile.attention(q, q, q, causal=True, backend="portable")
wanted = flashtile.reference.attention(q, q, q, causal=True).out
torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=2e-2)
print("right")
"""


def _call(folder: Path, code: str = CALL) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=own)


def test_damaged_binaries_are_told(tmp_path: Path) -> None:
    """A kernel that is cut off is refused by the driver, in our words, and an emptied folder is as good as new."""
    assert "right" in _call(tmp_path / "kernels").stdout
    binaries = [*(tmp_path / "kernels").rglob("*.cubin"), *(tmp_path / "kernels").rglob("*.hsaco")]
    assert binaries
    for binary in binaries:
        binary.write_bytes(binary.read_bytes()[: binary.stat().st_size // 3])
    done = _call(tmp_path / "kernels")
    assert "right" not in done.stdout
    assert "kernel cache: got a damaged entry" in done.stderr, done.stderr[-2000:]
    assert "right" in _call(tmp_path / "other").stdout


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = _call(tmp_path / "file" / "kernels")
    assert "kernel cache: got" in done.stderr, done.stderr[-2000:]
    assert "need a folder that it can write to" in done.stderr


def test_processes_that_begin_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: _call(tmp_path / "shared"), range(4)))
    assert [process.stdout.strip() for process in done] == ["right"] * 4, [process.stderr[-500:] for process in done]


def test_a_forked_process_is_told_by_pytorch(tmp_path: Path) -> None:
    """A GPU cannot be used on both sides of a fork; nothing hangs, and the parent goes on."""
    code = (
        CALL
        + """
import os
child = os.fork()
if not child:
    try:
        flashtile.attention(q, q, q, causal=True, backend="portable")
    except RuntimeError as error:
        os._exit(0 if "forked" in str(error) or "CUDA" in str(error) else 2)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
flashtile.attention(q, q, q, causal=True, backend="portable")
torch.cuda.synchronize()
print("parent goes on")
"""
    )
    done = _call(tmp_path / "kernels", code)
    assert "parent goes on" in done.stdout, done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_devices_take_turns() -> None:
    """Tensors of one GPU, then of the other, whichever is current; everything remembered is remembered for each."""
    wanted = None
    for turn in range(6):
        device = torch.device("cuda", turn % 2)
        torch.cuda.set_device(turn // 2 % 2)
        q = torch.randn(1, 150, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
        leaves = [q.clone().requires_grad_() for _ in range(3)]
        out = flashtile.attention(
            *leaves, mask=lambda b, h, i, j: (i - j) % 7 < 4, score_mod=lambda s, b, h, i, j: s + j
        )
        grads = torch.autograd.grad(out.float().sum(), leaves)
        assert out.device == device
        assert {grad.device for grad in grads} == {device}
        found = [out.detach().cpu(), *(grad.cpu() for grad in grads)]
        wanted = wanted or found
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_the_architecture_of_this_gpu() -> None:
    assert facts.arch(torch.device("cuda")) in facts.architectures()
