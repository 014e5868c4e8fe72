"""`install_as_flash_attn`: `import flash_attn` finds flashtile, until it is undone.

Libraries look for flash-attn in three ways: they import it, they ask `importlib.util.find_spec`, and they ask
`importlib.metadata` for a distribution of that name and its version. One finder on `sys.meta_path` answers all three;
no file is written.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from flashtile.check import guests as check

logger = logging.getLogger("flashtile")

_HERE = "flashtile.integrations.flash_attn"


class _Package(NamedTuple):
    """A distribution that is stood in for: its name, its version, and its modules with what each is made of."""

    distribution: str
    version: str
    modules: dict[str, tuple[str, ...]]


_PACKAGES = (
    _Package(
        "flash-attn",
        "2.8.3+flashtile",
        {
            "flash_attn": (_HERE,),
            "flash_attn.flash_attn_interface": (f"{_HERE}.version2", f"{_HERE}.lowlevel"),
            "flash_attn.bert_padding": (f"{_HERE}.bert_padding",),
        },
    ),
    _Package("flash-attn-3", "3.0.0+flashtile", {"flash_attn_interface": (f"{_HERE}.version3",)}),
)


class Installed:
    """What `install_as_flash_attn` did; printing it says so.

    Attributes:
        modules: the modules that can now be imported.
        distributions: {name: version} of the distributions that can now be asked for.
        notes: what else happened, or could not.
    """

    def __init__(self, packages: Sequence[_Package]) -> None:
        self.modules = tuple(module for package in packages for module in package.modules)
        self.distributions = {package.distribution: package.version for package in packages}
        self._finder = _Finder(packages)
        sys.meta_path.insert(0, self._finder)
        importlib.invalidate_caches()
        self.notes = _tell_transformers() + _tell_diffusers()

    def uninstall(self) -> None:
        """Undoes it. What was imported in the meantime keeps working where it is held; a new import finds nothing."""
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
            for module in self.modules:
                sys.modules.pop(module, None)
            importlib.invalidate_caches()
            _tell_transformers()

    def __str__(self) -> str:
        named = ", ".join(f"{name} {version}" for name, version in self.distributions.items())
        lines = [f"flashtile stands in for {named}: {', '.join(self.modules)}", *self.notes]
        return "\n".join([*lines, "undo it with .uninstall()"])

    __repr__ = __str__


def install_as_flash_attn(modules: Sequence[str] = ("flash_attn", "flash_attn_interface")) -> Installed:
    """Makes `import flash_attn` (2.8) and `import flash_attn_interface` (FlashAttention-3) find flashtile's functions.

    Libraries that look for them by name and version find them too, transformers' "flash_attention_2" among them (which
    besides asks for a GPU). Call it before such libraries are imported, and again in every process that is spawned:
    nothing is written to disk.

    Args:
        modules: which of the two to stand in for.

    Returns:
        Installed: says what was done; its `uninstall()` undoes it.

    Raises:
        ImportError: the real package is installed, or flashtile stands in for it already.
        ValueError: another name.

    `flash_attn.layers`, `.ops`, `.modules`, `.losses` and `.cute` are not provided: importing them fails as before.
    """
    known = {next(iter(package.modules)): package for package in _PACKAGES}
    check.flash_attn_modules(modules, tuple(known))
    chosen = [known[module] for module in modules]
    for package, module in zip(chosen, modules, strict=True):
        check.not_installed(module, package.distribution, _version_of(package.distribution), _found(module))
    installed = Installed(chosen)
    logger.info("%s", installed)
    return installed


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _found(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


class _Finder:
    """Finds the modules for the import system, and the distributions for `importlib.metadata`."""

    def __init__(self, packages: Sequence[_Package]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        for package in self.packages:
            if name in package.modules:
                holds_more = any(module.startswith(f"{name}.") for module in package.modules)
                loader = _Loader(package.modules[name], package.version)
                return ModuleSpec(name, loader, origin=_HERE, is_package=holds_more)
        return None

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        wanted = getattr(context, "name", None)
        for package in self.packages:
            if wanted is None or wanted.lower().replace("_", "-") == package.distribution:
                yield _Distribution(package)

    def invalidate_caches(self) -> None:
        """There are none."""


class _Loader(Loader):
    """Fills a module with the names of flashtile's."""

    def __init__(self, sources: tuple[str, ...], version: str) -> None:
        self.sources = sources
        self.version = version

    def exec_module(self, module: ModuleType) -> None:
        for source in self.sources:
            names = vars(importlib.import_module(source))
            own = names.get("__all__") or [name for name in names if not name.startswith("__")]
            vars(module).update({name: names[name] for name in own})
        vars(module)["__version__"] = self.version
        vars(module).pop("install_as_flash_attn", None)


class _Distribution(importlib.metadata.Distribution):
    """The metadata of a package that stands in for another."""

    def __init__(self, package: _Package) -> None:
        self._package = package

    def read_text(self, filename: str) -> str | None:
        name, version, modules = self._package
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: flashtile in its place\n",
            "top_level.txt": f"{next(iter(modules))}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(path)


def _tell_transformers() -> tuple[str, ...]:
    """It remembers what is installed; what it remembers from before is dropped."""
    module = sys.modules.get("transformers.utils.import_utils")
    forgotten = False
    for name in ("_package_distribution_mapping", "is_flash_attn_2_available", "is_flash_attn_3_available"):
        clear = getattr(getattr(module, name, None), "cache_clear", None)
        if clear is not None:
            clear()
            forgotten = True
    return ("transformers was imported before: it has been made to look again",) if forgotten else ()


def _tell_diffusers() -> tuple[str, ...]:
    if "diffusers" not in sys.modules:
        return ()
    return ("diffusers was imported before: it looks only once, import flashtile first to be found by it",)
