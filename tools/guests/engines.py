"""Serving engines' own interfaces, as their sources have them, beside what flashtile's backends use of them.

    python tools/guests/engines.py vllm=CLONE sglang=FOLDER

vLLM: the tests of the backend (`tests/integrations/test_serving.py`) run on vLLM's own base classes and registry, whose
files need few others; those are replaced. SGLang's files need most of SGLang: each name that the backend uses is looked
up in their text. FOLDER holds the package `sglang`.
"""

import ast
import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from doors import _module

ROOT = Path(__file__).resolve().parent.parent.parent

USED = {
    "srt/layers/attention/attention_registry.py": {"": ["register_attention_backend", "ATTENTION_BACKENDS"]},
    "srt/layers/attention/base_attn_backend.py": {
        "AttentionBackend": ["init_forward_metadata", "forward_extend", "forward_decode", "forward_metadata"]
    },
    "srt/arg_groups/choices.py": {"": ["add_attention_backend_choices"]},
    "srt/mem_cache/memory_pool.py": {
        "KVWriteLoc": ["for_batch"],
        "MHATokenToKVPool": ["set_kv_buffer", "get_key_buffer", "get_value_buffer"],
        "ReqToTokenPool": ["req_to_token"],
    },
    "srt/mem_cache/swa_memory_pool.py": {"SWAKVPool": ["swa_layer_nums"]},
    "srt/model_executor/forward_batch_info.py": {
        "ForwardMode": ["is_decode", "is_target_verify", "is_draft_extend_v2"],
        "ForwardBatch": [
            "forward_mode", "seq_lens", "seq_lens_cpu", "extend_seq_lens_cpu", "req_pool_indices", "out_cache_loc"
        ],
    },
    "srt/model_executor/model_runner.py": {
        "ModelRunner": ["token_to_kv_pool", "req_to_token_pool", "page_size", "use_mla_backend"]
    },
    "srt/layers/radix_attention.py": {
        "RadixAttention": [
            "tp_q_head_num", "qk_head_dim", "v_head_dim", "scaling", "layer_id", "logit_cap", "sliding_window_size",
            "is_cross_attention", "attn_type",
        ],
        "AttentionType": ["DECODER"],
    },
    "srt/plugins/__init__.py": {"": ["GENERAL_PLUGINS_GROUP"]},
}  # fmt: skip
"""File: class (or none): names that `flashtile/integrations/serving/sglang.py` relies on."""

SIGNATURES = {
    "forward_extend": ["self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"],
    "forward_decode": ["self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"],
    "init_forward_metadata": ["self", "forward_batch"],
    "for_batch": ["cls", "forward_batch"],
    "register_attention_backend": ["name"],
}
"""Positional parameters of some of them."""


def sglang(folder: Path) -> list[str]:
    """What is not as the backend takes it to be."""
    wrong = []
    for path, classes in USED.items():
        tree = ast.parse((folder / "sglang" / path).read_text())
        for owner, names in classes.items():
            node = next(
                (each for each in tree.body if getattr(each, "name", None) == owner), tree if not owner else None
            )
            known = {} if node is None else _names(node)
            wrong += [f"{path}: no {owner}.{name}" for name in names if name not in known]
            for name in set(names) & set(SIGNATURES) & set(known):
                found = [argument.arg for argument in known[name].args.args]
                if found != SIGNATURES[name]:
                    wrong.append(f"{path}: {name} takes {found}, not {SIGNATURES[name]}")
    return wrong


def _names(node: Any) -> dict[str, Any]:
    """Functions, fields and attributes that a class or a module defines, by name."""
    found: dict[str, Any] = {}
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef):
            found.setdefault(each.name, each)
        for target in getattr(each, "targets", [getattr(each, "target", None)]):
            if isinstance(target, ast.Name):
                found.setdefault(target.id, each)
            elif isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == "self":
                found.setdefault(target.attr, each)
        if isinstance(each, ast.Assign):
            names = [own for target in each.targets if isinstance(target, ast.Tuple) for own in target.elts]
            found.update({own.attr: each for own in names if isinstance(own, ast.Attribute)})
    return found


def _resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _alone() -> Any:
    """vLLM's groups of processes, of which there are none; it expects this error then."""
    raise AssertionError


def vllm(clone: Path) -> dict[str, dict[str, Any]]:
    """The modules that `tests.integrations.engines.vllm_modules` stands in for, from vLLM's own files."""
    quantities = dict.fromkeys(("kFp8Dynamic64Sym", "kFp8Dynamic128Sym", "kFp8StaticTensorSym", "kNvfp4Dynamic"))
    needed: dict[str, dict[str, Any]] = {
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.utils.import_utils": {"resolve_obj_by_qualname": _resolved},
        "vllm.model_executor.layers.quantization.utils.quant_utils": quantities,
        "vllm.v1.kv_cache_interface": {"get_kv_quant_mode": None},
        "vllm.distributed.parallel_state": {"get_dcp_group": _alone, "get_pcp_group": _alone},
    }
    for name, members in needed.items():
        for dot in (place for place, letter in enumerate(name) if letter == "."):
            sys.modules.setdefault(name[:dot], ModuleType(name[:dot]))
        _module(name, **members)
    backend = _loaded("vllm.v1.attention.backend", clone)
    registry = _loaded("vllm.v1.attention.backends.registry", clone)
    registry.paths = registry._ATTN_OVERRIDES
    return {module.__name__: vars(module) for module in (backend, registry)} | needed


def _loaded(name: str, clone: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, clone / f"{name.replace('.', '/')}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str]) -> int:
    """The command; 1 if something is not as it should be."""
    given = {name: Path(path).resolve() for name, path in (each.split("=", 1) for each in arguments)}
    if set(given) - {"vllm", "sglang"} or not given:
        print(__doc__)
        return 2
    failed = 0
    if "sglang" in given:
        wrong = sglang(given["sglang"])
        count = sum(len(names) for classes in USED.values() for names in classes.values())
        print("\n".join(wrong) or f"sglang: all {count} names are there")
        failed |= bool(wrong)
    if "vllm" in given:
        sys.path.insert(0, str(ROOT))
        from tests.integrations import engines

        modules = vllm(given["vllm"])
        engines.vllm_modules = lambda: modules
        test = str(ROOT / "tests/integrations/test_serving.py")
        failed |= pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", f"--rootdir={ROOT}", test, "-k", "TestVllm"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
