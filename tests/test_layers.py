"""Who may import whom, read off the sources; and what a bare `import flashtile` must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flashtile

PACKAGE = Path(flashtile.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Rooms in the order of the imports: each may import its own room and those before it (README, "how it is laid out").
ROOMS = {
    "words": {"problem", "facts", "forgetting", "queues", "contents", "check", "masks", "mask_nodes", "spans", "scores",
              "captures", "glance", "recording", "scalar_graph", "trace", "interval_rules", "intervals", "bands",
              "dropout", "region", "predicates", "cut", "scaled"},
    "mathematics": {"state", "reference", "kvcache"},
    "triton": {"lower"},
    "kernels": {"kernels"},
    "machines": {"backends"},
    "choice": {"plan", "tuning"},
    "doors": {"sharding", "request", "autograd", "recall", "dtensors", "decoding", "gradients", "parts", "sums", "fp8",
              "api"},
    "guests": {"distributed", "integrations", "bench", "demo", "cli", "compiling", "__main__"},
}  # fmt: skip
# Words and mathematics know torch and the standard library; triton belongs to the machines that are written in it, and
# to what turns functions into its source for them.
FOREIGN = {
    "words": {"torch"},
    "mathematics": {"torch"},
    "triton": {"torch", "triton"},
    "kernels": {"torch", "triton"},
    "choice": {"torch"},
    "doors": {"torch"},
}
# What a room may use of a later one. The tables of tile sizes are data that the planner and the backends read.
EXCEPTIONS = {
    ("machines", "choice"): "tuning",
    ("doors", "machines"): "backends",
}
READS_ENVIRONMENT = {"machines", "choice", "guests"}


def _name(path: Path) -> str:
    """The dotted name below the package: `masks`, `backends.pytorch.sweep`, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str | None:
    return next((room for room, members in ROOMS.items() if module.split(".")[0] in members), None)


def _imports(path: Path, module: str) -> set[str]:
    """The full names of everything that a file imports, at its top or inside a function, type checking aside."""
    found: set[str] = set()
    for node in _executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = str(node.module)
            found |= {_resolve(base, alias.name) for alias in node.names}
    return found


def _executed(tree: ast.AST) -> list[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    nodes: list[ast.AST] = [tree]
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        nodes += _executed(child)
    return nodes


def _resolve(base: str, name: str) -> str:
    """`from flashtile import masks` imports a module, `from flashtile.masks import Mask` one too."""
    full = f"{base}.{name}"
    folder = PACKAGE.parent / Path(*full.split("."))
    return full if folder.with_suffix(".py").exists() or folder.is_dir() else base


IMPORTS = {_name(path): _imports(path, _name(path)) for path in SOURCES}
INTERNAL = {
    module: {name.removeprefix("flashtile.") for name in names if name.startswith("flashtile.")}
    for module, names in IMPORTS.items()
}


def test_every_file_has_a_room() -> None:
    assert [module for module in IMPORTS if module and _room(module) is None] == []


@pytest.mark.parametrize("module", [module for module in IMPORTS if module])
def test_imports_point_one_way(module: str) -> None:
    order = list(ROOMS)
    here = _room(module)
    assert here is not None
    for target in INTERNAL[module]:
        there = _room(target)
        assert there is not None, f"{module} imports {target}"
        allowed = order.index(there) <= order.index(here) or EXCEPTIONS.get((here, there)) == target.split(".")[0]
        assert allowed, f"{module} ({here}) imports {target} ({there})"


@pytest.mark.parametrize("room", FOREIGN)
def test_foreign_packages(room: str) -> None:
    for module in (name for name in IMPORTS if name and _room(name) == room):
        foreign = {name.split(".")[0] for name in IMPORTS[module]} - {"flashtile"} - sys.stdlib_module_names
        assert foreign <= FOREIGN[room], f"{module} imports {foreign - FOREIGN[room]}"


def test_backends_stand_alone() -> None:
    """No backend imports another, and none imports the specification that it is held to."""
    for module, targets in INTERNAL.items():
        parts = module.split(".")
        if parts[0] != "backends" or len(parts) < 2:
            continue
        others = {target for target in targets if target.startswith("backends.") and target.split(".")[1] != parts[1]}
        assert others == set(), f"{module} imports {others}"
        assert "reference" not in targets, f"{module} imports the reference"


def test_the_reference_is_independent() -> None:
    """The specification uses no tiling, no tracing and no backend."""
    assert INTERNAL["reference"] <= {"dropout", "masks", "mask_nodes", "state"}


def test_nobody_imports_a_guest() -> None:
    for module, targets in INTERNAL.items():
        if _room(module) != "guests":
            guests = {target for target in targets if _room(target) == "guests"}
            assert guests == set(), f"{module} imports {guests}"


def test_distributed_and_integrations_use_public_names() -> None:
    """bench, demo and cli may look inside; what others could have written uses what others can use. Calls over several
    processes have a door of their own, `parts`, formulas of other libraries' own autograd call `gradients`, and the
    errors of both kinds of users are in `check`."""
    public = {"", "api", "masks", "reference", "state", "dropout", "fp8", "kvcache"}
    doors = {
        "distributed": {"parts", "sums", "sharding", "check"},
        "integrations": {"check", "gradients", "request", "sharding"},
    }
    for module, targets in INTERNAL.items():
        top = module.split(".")[0]
        if top in doors:
            allowed = public | doors[top] | {top}
            inside = {target for target in targets if target.split(".")[0] not in allowed}
            assert inside == set(), f"{module} imports {inside}"


def test_only_some_rooms_read_the_environment() -> None:
    for path in SOURCES:
        text = path.read_text()
        if "os.environ" in text or "os.getenv" in text:
            assert _room(_name(path)) in READS_ENVIRONMENT, f"{_name(path)} reads the environment"


# Fresh processes.


def _python(*lines: str) -> str:
    """Runs lines in a new interpreter; what they print."""
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = "import sys; print([name for name in {names!r} if name in sys.modules])"
HEAVY = ("triton", "torch._dynamo", "torch._inductor", "rich", "matplotlib", "numpy.testing", "hypothesis")
USE = (
    "import torch, flashtile",
    "q = torch.randn(1, 8, 2, 8, requires_grad=True)",
    "bias = torch.randn(8, 8, requires_grad=True)",
    "mod = lambda score, b, h, q_idx, kv_idx: score + bias[q_idx, kv_idx]",
    "rule = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 4",
    "out = flashtile.attention(q, q, q, causal=True, score_mod=mod, mask=rule)",
    "out.sum().backward()",
    "assert q.grad is not None and bias.grad is not None",
)
BLOCK_TRITON = ("import sys", "sys.modules['triton'] = None", "sys.modules['triton.language'] = None")


def test_import_is_light() -> None:
    assert _python("import flashtile", LOADED.format(names=HEAVY)) == "[]"


def test_import_loads_no_guest_and_no_backend() -> None:
    loaded = "import sys; print(sorted(name for name in sys.modules if name.startswith('flashtile.')))"
    assert _python("import flashtile", loaded) == "[]"


def test_public_names_load_on_first_use() -> None:
    names = ", ".join(flashtile.__all__)
    found = _python(f"from flashtile import {names}; print(None in [{names}])", LOADED.format(names=HEAVY[:3]))
    assert found.splitlines() == ["False", "[]"]


def test_plain_use_loads_no_compiler() -> None:
    """Tracing a function loads PyTorch's compiler, which takes seconds; nothing else may."""
    loaded = LOADED.format(names=("torch._dynamo", "torch._inductor", "triton", "rich", "matplotlib"))
    use = [line.replace(", score_mod=mod, mask=rule", ", bias=bias") for line in USE]
    assert _python(*use, loaded) == "[]"


def test_any_module_may_be_imported_first() -> None:
    """Words and mathematics, each with nothing else of the package loaded: no import relies on an earlier one."""
    modules = [f"flashtile.{module}" for module in IMPORTS if _room(module) in ("words", "mathematics")]
    forget = "for name in [name for name in sys.modules if name.startswith('flashtile')]: del sys.modules[name]"
    lines = [line for module in modules for line in (f"import {module}", forget)]
    assert _python("import sys, torch", *lines, "print('fine')") == "fine"


def test_works_without_triton_and_leaves_the_gpu_alone() -> None:
    assert _python(*BLOCK_TRITON, *USE, "print(torch.cuda.is_initialized())") == "False"


def test_import_leaves_torch_alone() -> None:
    """No global switch, no seed and no thread count changes by importing or calling."""
    state = "(torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), \
torch.get_default_dtype(), torch.initial_seed(), torch.get_float32_matmul_precision())"
    before = ("import torch", "torch.manual_seed(3)", f"before = {state}")
    use = [line for line in USE if not line.startswith("import")]
    assert _python(*before, "import flashtile", *use, f"print(before == {state})") == "True"
