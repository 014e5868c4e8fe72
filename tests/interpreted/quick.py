"""Triton's interpreter without what it does again at each call of a device function, a third of its time."""

import inspect
from functools import cache, partial
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache
def _languages(function: Any) -> list[Any]:
    """The modules of Triton's language that a function names, as the interpreter looks for them."""
    modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return [module for module in (tl, tl.core) if module in modules]


def _patch(original: Any, function: Any) -> Any:
    """Puts the interpreter's builtins into the language, unless they are there since the launch began."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return original(function)
    return interpreter._LangPatchScope()


def install() -> None:
    """For this process."""
    if not isinstance(interpreter._patch_lang, partial):
        interpreter._patch_lang = partial(_patch, interpreter._patch_lang)
