"""Build the wheel and check what a user gets from it: `python tools/check_wheel.py`.

One small pure-Python wheel that needs torch and triton and nothing else, builds where no torch can be imported, and
holds every file of the package and no other; importing it pulls in neither Triton nor any optional package.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.message import Message
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MAXIMUM_BYTES = 2_000_000
REQUIREMENTS = {"torch", "triton"}
CONSOLE_SCRIPT = "flashtile = flashtile.cli:main"

# Runs in a fresh interpreter that sees the wheel's content and the installed packages. torch comes first, so that only
# what flashtile asks for is counted; what it asks for in vain, inside a try, is counted too.
IMPORT_PROBE = """
import importlib.abc, sys
sys.path.insert(0, sys.argv[1])
import torch

UNWANTED = {"triton", "rich", "matplotlib", "jax", "transformers", "diffusers", "deepspeed", "flash_attn", "xformers"}
GUESTS = tuple("flashtile." + name for name in ("integrations", "distributed", "bench", "cli"))
asked = []

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in UNWANTED:
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

before = set(sys.modules)
sys.meta_path.insert(0, Watch())
import flashtile

asked += [name for name in set(sys.modules) - before if name.startswith(GUESTS) or name.split(".")[0] in UNWANTED]
print(flashtile.__version__)
print(flashtile.__file__)
print(*sorted(set(asked)))
"""


class Failure(Exception):
    """The wheel is not what it should be."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Failure(message)


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    require(done.returncode == 0, f"{' '.join(command[:4])}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def package_files(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix()
        for path in (root / "flashtile").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def build_wheel(scratch: Path) -> Path:
    """Build the sdist and from it the wheel, from a copy of the sources, where torch and triton cannot be imported."""
    sources = scratch / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        require((REPOSITORY / name).is_file(), f"{name}: the file is missing")
        shutil.copy(REPOSITORY / name, sources)
    shutil.copytree(REPOSITORY / "flashtile", sources / "flashtile", ignore=shutil.ignore_patterns("__pycache__", ".*"))

    decoys = scratch / "decoys"
    decoys.mkdir()
    for name in ("torch", "triton"):
        (decoys / f"{name}.py").write_text(f'raise ImportError("the build must not need {name}")\n')

    environment = {**os.environ, "PYTHONPATH": str(decoys)}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(scratch / "dist")]
    run(command, sources, environment)
    wheels = list((scratch / "dist").glob("*.whl"))
    require(len(wheels) == 1, f"got {len(wheels)} wheels, need one")
    return wheels[0]


def check_metadata(wheel: Path, content: zipfile.ZipFile) -> Message:
    require(wheel.name.endswith("-py3-none-any.whl"), f"{wheel.name}: the name does not end in -py3-none-any.whl")
    size = wheel.stat().st_size
    require(size < MAXIMUM_BYTES, f"{wheel.name}: {size:,} bytes, need less than {MAXIMUM_BYTES:,}")

    folder = "-".join(wheel.name.split("-")[:2]) + ".dist-info/"
    metadata = email.message_from_string(content.read(folder + "METADATA").decode())
    requirements = [line for line in metadata.get_all("Requires-Dist", []) if not re.search(r"\bextra\s*==", line)]
    names = [re.split(r"[^\w.-]", line)[0].lower() for line in requirements]
    require(sorted(names) == sorted(REQUIREMENTS), f"requires {requirements}, need exactly {sorted(REQUIREMENTS)}")

    description = email.message_from_string(content.read(folder + "WHEEL").decode())
    require(description["Root-Is-Purelib"] == "true", "the wheel is not pure Python")
    scripts = content.read(folder + "entry_points.txt").decode()
    require(CONSOLE_SCRIPT in scripts, f"entry points are {scripts!r}, need {CONSOLE_SCRIPT!r}")
    return metadata


def check_content(content: zipfile.ZipFile) -> int:
    names = {name for name in content.namelist() if not name.endswith("/")}
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    expected = package_files(REPOSITORY)
    require(packed >= expected, f"not in the wheel: {sorted(expected - packed)}; is the suffix in package-data?")
    require(packed <= expected, f"in the wheel, not in the package: {sorted(packed - expected)}")
    return len(packed)


def check_import(content: zipfile.ZipFile, version: str, scratch: Path) -> None:
    site = scratch / "site"
    content.extractall(site)
    # -I keeps the working directory, the environment and user folders out; the path given outranks an editable install.
    output = run([sys.executable, "-I", "-c", IMPORT_PROBE, str(site)], scratch)
    found_version, found_file, asked = output.split("\n")[:3]
    require(Path(found_file).is_relative_to(site), f"imported {found_file}, need the wheel's own copy")
    require(found_version == version, f"flashtile.__version__ is {found_version}, the metadata says {version}")
    require(not asked, f"importing flashtile asks for {asked}; import it where it is used instead")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="flashtile-wheel-") as name:
        scratch = Path(name).resolve()
        try:
            wheel = build_wheel(scratch)
            with zipfile.ZipFile(wheel) as content:
                metadata = check_metadata(wheel, content)
                count = check_content(content)
                check_import(content, metadata["Version"], scratch)
        except Failure as failure:
            print(f"check_wheel: {failure}", file=sys.stderr)
            return 1
        print(f"check_wheel: {wheel.name}: {wheel.stat().st_size:,} bytes, {count} files, as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
