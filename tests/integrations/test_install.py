"""`install_as_flash_attn`: found by name, by spec, by distribution and version; undone; refused beside the real one."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import flashtile
from flashtile.integrations.flash_attn.install import Installed
from tests.integrations.rule import ran

NAMES = ("flash_attn", "flash_attn_interface")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is not None for name in NAMES), reason="the real flash-attn is installed"
)


@pytest.fixture
def installed() -> Iterator[Installed]:
    handle = flashtile.install_as_flash_attn()
    yield handle
    handle.uninstall()


def test_imports(installed: Installed) -> None:
    import flash_attn
    from flash_attn import flash_attn_func
    from flash_attn.bert_padding import pad_input, unpad_input  # noqa: F401
    from flash_attn.flash_attn_interface import _flash_attn_forward, flash_attn_varlen_func  # noqa: F401
    from flash_attn_interface import flash_attn_combine  # noqa: F401
    from flash_attn_interface import flash_attn_func as version3

    assert flash_attn.__version__ == "2.8.3+flashtile"
    assert not hasattr(flash_attn, "install_as_flash_attn")
    q = torch.randn(1, 5, 2, 8)
    with ran():
        torch.testing.assert_close(flash_attn_func(q, q, q, causal=True), version3(q, q, q, causal=True))


@pytest.mark.parametrize("name", ["flash_attn.cute", "flash_attn.layers.rotary", "flash_attn.ops"])
def test_what_is_not_provided(installed: Installed, name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_found_by_those_who_ask(installed: Installed) -> None:
    for module, distribution, version in (
        ("flash_attn", "flash-attn", "2.8.3+flashtile"),
        ("flash_attn_interface", "flash-attn-3", "3.0.0+flashtile"),
    ):
        assert importlib.util.find_spec(module) is not None
        assert importlib.metadata.packages_distributions()[module] == [distribution]
        assert importlib.metadata.version(distribution) == version
        assert importlib.metadata.version(distribution.replace("-", "_")) == version
    # Those who ask for another find what they found before.
    assert importlib.metadata.version("torch") == torch.__version__


def test_it_says_what_it_did(installed: Installed) -> None:
    text = str(installed)
    assert "flashtile stands in for flash-attn 2.8.3+flashtile, flash-attn-3 3.0.0+flashtile" in text
    assert "flash_attn.bert_padding" in text
    assert ".uninstall()" in text


def test_undone() -> None:
    before = list(sys.meta_path)
    handle = flashtile.install_as_flash_attn()
    import flash_attn  # noqa: F401

    handle.uninstall()
    handle.uninstall()
    assert sys.meta_path == before
    for name in NAMES:
        assert importlib.util.find_spec(name) is None
        assert name not in sys.modules
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


def test_one_of_the_two() -> None:
    handle = flashtile.install_as_flash_attn(["flash_attn_interface"])
    try:
        assert importlib.util.find_spec("flash_attn") is None
        assert importlib.util.find_spec("flash_attn_interface") is not None
    finally:
        handle.uninstall()


def test_nothing_happens_by_importing() -> None:
    code = (
        "import importlib.util, flashtile.integrations.flash_attn; "
        "print([importlib.util.find_spec(name) for name in ('flash_attn', 'flash_attn_interface')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[None, None]"


class TestErrors:
    def test_twice(self, installed: Installed) -> None:
        with pytest.raises(ImportError, match="flash_attn: got flashtile in its place already, need it once; try"):
            flashtile.install_as_flash_attn()

    def test_the_real_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        before = list(sys.meta_path)
        with pytest.raises(ImportError, match=r"flash_attn: got the real package installed \(flash-attn of unknown"):
            flashtile.install_as_flash_attn()
        assert sys.meta_path == before

    @pytest.mark.parametrize("names", ["flash_attn", ["xformers"], []])
    def test_names(self, names: object) -> None:
        with pytest.raises(ValueError, match=r"modules: got .*, need some of \('flash_attn', 'flash_attn_interface'\)"):
            flashtile.install_as_flash_attn(names)  # type: ignore[arg-type]
