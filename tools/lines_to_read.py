"""Counts the lines one reads to follow a forward call from `attention` to the last store.

Each row of `PATH` is a file and the functions or classes in it that lie on the way (none: the whole file). Counted are
lines of code: no blank lines, comments or docstrings.
"""

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "flashtile"

PATH: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("api.py", ("attention",)),
    ("request.py", ("Arguments", "build", "_build", "_check", "autocast", "_mask", "seed_of", "_deterministic")),
    ("recall.py", ("attention",)),
    ("autograd.py", ("Call", "eager", "plainly_eager", "watched", "_Eager", "run_forward", "_save")),
    ("problem.py", ("Inputs", "Problem", "Options", "describe")),
    ("plan.py", ("Plan", "choose", "kernel")),
    ("masks.py", ("Mask", "causal", "window")),
    ("mask_nodes.py", ("At", "Full", "Window", "Both", "parse", "_build")),
    ("spans.py", ()),
    ("scores.py", ("Tile", "Softcap", "Bias", "Alibi", "modifiers")),
    ("backends/pytorch/packed.py", ("over_sequences",)),
    ("backends/pytorch/native.py", ("refuses", "forward")),
    ("backends/pytorch/rows.py", ()),
    (
        "backends/pytorch/sweep.py",
        ("Scorer", "forward", "_query_rows", "_forward_rows", "_start", "_by_head", "_finite", "_online_softmax"),
    ),
)


def code_lines(source: str) -> set[int]:
    """Line numbers that hold code."""
    lines: set[int] = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def count(name: str, wanted: tuple[str, ...]) -> int:
    """Lines of code of the named top-level definitions.

    Raises:
        KeyError: a name is not in the file.
    """
    source = (PACKAGE / name).read_text()
    lines = code_lines(source)
    if not wanted:
        return len(lines)
    definitions = {
        node.name: range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.parse(source).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    return sum(len(lines.intersection(definitions[definition])) for definition in wanted)


def main() -> None:
    total = 0
    for name, wanted in PATH:
        lines = count(name, wanted)
        total += lines
        print(f"{lines:5d}  {name}  {', '.join(wanted) or '(whole)'}")
    print(f"{total:5d}  lines of code from attention to the last store")


if __name__ == "__main__":
    main()
