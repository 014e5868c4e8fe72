"""Which lines of a folder raise, and which of them calls reach."""

import ast
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

Lines = set[tuple[str, int]]
"""(file, line)."""


def raises(paths: Iterable[Path]) -> Lines:
    """Each `raise` of the files."""
    return {
        (path.name, node.lineno)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
    }


def lines_run(folder: Path, calls: Iterable[tuple[Callable[[], Any], type[Exception]]]) -> Lines:
    """Every line of files in `folder` that the calls execute; each may raise the error beside it."""
    seen: Lines = set()

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.parent != folder:
            return None
        seen.add((path.name, frame.f_lineno))
        return watch

    before = sys.gettrace()
    for call, error in calls:
        sys.settrace(watch)
        try:
            call()
        except error:
            pass
        finally:
            sys.settrace(before)
    return seen
