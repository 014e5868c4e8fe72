"""The documentation holds: its code runs, its links lead somewhere, its ladder climbs, its tools name what exists."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flashtile.bench import records
from flashtile.bench.cases import Case

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNGS = sorted((ROOT / "docs" / "ladder").glob("rung*.py"))

FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

# Pages that other commands write, at the end of a measurement.
GENERATED = {ROOT / "docs" / "benchmarks.md"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(page: Path) -> list[tuple[int, str]]:
    """(line number, code) of every python block."""
    text = page.read_text()
    found = [(text[: match.start()].count("\n") + 1, match) for match in FENCE.finditer(text)]
    return [(line, match.group(2)) for line, match in found if match.group(1) == "python"]


WITH_CODE = [page for page in PAGES if _blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=_name)
def test_code_blocks_run(page: Path) -> None:
    """Every python block, in order, in one namespace a page."""
    for guest in ("transformers", "diffusers", "jax"):
        if f"import {guest}" in page.read_text():
            pytest.importorskip(guest, reason=f"{guest} is not installed")
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for line, code in _blocks(page):
        # Line numbers of a traceback are those of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_code_is_marked_as_python() -> None:
    """A block that no test runs would rot: what imports or calls flashtile says that it is python."""
    for page in PAGES:
        for match in FENCE.finditer(page.read_text()):
            if match.group(1) != "python":
                assert not re.search(r"^(import|from) |attention\(", match.group(2), re.MULTILINE), (
                    page,
                    match.group(2),
                )


@pytest.mark.parametrize("backend", ["portable", "hopper"])
def test_quoted_lines_are_those_of_the_kernels(backend: str) -> None:
    page = (ROOT / "docs" / f"{backend}.md").read_text()
    folders = (ROOT / "flashtile" / "backends" / backend, ROOT / "flashtile" / "kernels")
    files = [path for folder in folders for path in folder.glob("*.py")]
    source = {line.strip() for path in files for line in path.read_text().splitlines()}
    blocks = [match.group(2) for match in FENCE.finditer(page) if match.group(1) == "text"]
    quoted = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(quoted) > 10
    assert [line for line in quoted if line and line not in source] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() or file in GENERATED, f"{_name(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in _anchors(file), f"{_name(page)} links to {target}: no such heading"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_image_is_shown_and_small() -> None:
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in LINK.findall(page.read_text())
        if target.endswith(".png")
    }
    images = set((ROOT / "docs" / "images").glob("*.png"))
    assert images <= shown, f"shown nowhere: {sorted(path.name for path in images - shown)}"
    assert sum(path.stat().st_size for path in images) < 1.5e6


def _run(path: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_ladder_on_two_devices(tmp_path: Path) -> None:
    """Both machines are named, and a rung that ran on both has a table of each."""
    kept = next((ROOT / "benchmarks" / "results").glob("cpu-*/ladder/rungs.json"))
    record = json.loads(kept.read_text())
    other = {"device": "cuda", "name": "some GPU", "inputs": "batch 1, 8 heads"}
    last = {"rung7_shipped": [{"case": "forward, shipped sweep", "seqlen": 8192, "ms": 0.5, "extra_bytes": 2**20}]}
    second = {**record, "machine": {**record["machine"], **other}, "rungs": last, "inputs": other["inputs"]}
    for folder, found in (("a", second), ("b", record)):
        path = tmp_path / folder / "ladder" / "rungs.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(found))
    sections = _tool("fill_docs").ladder(tmp_path)
    assert sections["machine"].index(record["machine"]["name"]) < sections["machine"].index("some GPU, Triton")
    assert "batch 1, 8 heads" in sections["machine"]
    assert len(TABLE.findall(sections["rung7_shipped"])) == 2
    assert sections["rung7_shipped"].endswith("| forward, shipped sweep | 8192 | 0.5 | 1 MiB |")
    assert len(TABLE.findall(sections["rung6_states"])) == 1


def test_ratios_of_the_readme(tmp_path: Path) -> None:
    """Against the fastest other library, not memory or another of our own; runs with other peers share no table."""
    machine = {"slug": "gpu", "name": "some GPU", "device": "cuda", "date": "2026-01-02T03:04:05"}

    def cell(seqlen: int, which: str, **ms: float) -> list[dict[str, Any]]:
        case = Case("causal", seqlen=seqlen, headdim=128, device="cuda")
        return [records.row(case, name, ms={"median": value}, **{"pass": which}) for name, value in ms.items()]

    def keep(suite: str, rows: list[dict[str, Any]], kind: str = "time") -> None:
        record = {"schema": records.SCHEMA, "suite": suite, "title": f"the {suite}", "kind": kind, "machine": machine}
        records.write({**record, "rows": rows}, tmp_path)

    both = [
        *cell(1024, "backward", flashtile=4.0, fa4=5.0, fa3=6.0),
        *cell(1024, "forward", flashtile=2.0, fa4=1.0, fa3=3.0),
    ]
    keep("grid", both)
    keep("lengths", cell(2048, "forward", flashtile=2.0, fa4=5.0))
    keep("decode", cell(64, "decode", flashtile=2.0, flashtile_paged=1.0, read=1.0, fa3=3.0), "bandwidth")
    lines = _tool("speed_tables").sections(tmp_path)["bench"].splitlines()
    assert lines[0].endswith("times as fast as the fastest of FlashAttention-3 and FlashAttention-4")
    assert "| pass, headdim, mask | 1024 |" in lines
    first = lines.index("| forward, 128, causal | 0.50 |")
    assert lines[first + 1] == "| backward, 128, causal | 1.25 |"
    where = "some GPU, 2026-01-02"
    assert (
        f"| the grid | {where} | FlashAttention-3, FlashAttention-4 | 0.50 (0.50 to 0.50) | 1.25 (1.25 to 1.25) |"
        in lines
    )
    assert f"| the decode | {where} | FlashAttention-3 | 1.50 (1.50 to 1.50) |  |" in lines
    keep("lengths", cell(2048, "forward", flashtile=2.0, fa4=5.0, fa3=6.0))
    lines = _tool("speed_tables").sections(tmp_path)["bench"].splitlines()
    assert "| forward, 128, causal | 0.50 | 2.50 |" in lines
    assert "| backward, 128, causal | 1.25 |  |" in lines


def _tool(name: str) -> Any:
    found = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


TABLE = re.compile(r"^\| what \|.*time, ms \| extra memory \|$", re.MULTILINE)


def test_ladder() -> None:
    """Every rung agrees with float64 and prints its table."""
    printed = _run(ROOT / "docs" / "ladder" / "run.py", "--quick")
    titles = [ast.get_docstring(ast.parse(rung.read_text())) or "" for rung in RUNGS]
    places = [printed.index(title.splitlines()[0]) for title in titles]
    assert places == sorted(places)
    for begin, end in pairwise([*places, len(printed)]):
        assert "largest error against float64" in printed[begin:end]
        assert TABLE.search(printed[begin:end]), printed[begin:end]


def test_a_rung_alone() -> None:
    assert TABLE.search(_run(RUNGS[-1], "--quick"))


@pytest.mark.parametrize("tool", ["lines_to_read.py", "fill_docs.py"])
def test_tools_run(tool: str) -> None:
    arguments = ["--check"] if tool == "fill_docs.py" else []
    assert _run(ROOT / "tools" / tool, *arguments)
