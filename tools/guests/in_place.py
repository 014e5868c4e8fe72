"""A pytest plugin that puts flashtile in the place of another library's attention while that library's tests run.

`run.py` starts pytest with it. `--door` says which attention; `--most N` takes N cases, drawn from a fixed seed, of a
test that has more, none of them with a sequence beyond `--longest`; `--outcomes` names a file that gets a line of JSON
for every test: its name, what became of it, how many of flashtile's kernels ran, and why it failed or was skipped.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import doors
import pytest

import flashtile.plan

HEADDIM = 128
"""The largest head dimension that is drawn; larger ones take as much time as all others together."""

_kernels = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    parser.addoption("--door", choices=doors.DOORS, default="none")
    parser.addoption("--most", type=int, default=0)
    parser.addoption("--longest", type=int, default=400)
    parser.addoption("--outcomes", type=Path)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before anything of the library is imported: many look at their import for what is installed, and some libraries'
    conftest puts the checkout before the installed version."""
    for name in ("kernel", "decoder"):
        setattr(flashtile.plan, name, _counting(getattr(flashtile.plan, name)))
    doors.DOORS[early_config.known_args_namespace.door]()


def _counting(choose: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def counted(chosen: Any) -> Any:
        global _kernels
        _kernels += 1
        return choose(chosen)

    return counted


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Draws cases before pytest makes the product of all parameters, which may be a hundred thousand."""
    most, longest = metafunc.config.getoption("--most"), metafunc.config.getoption("--longest")
    marks = [mark for mark in metafunc.definition.own_markers if mark.name == "parametrize"]
    for mark in marks:
        if mark.args[0] in doors.PARAMETERS:
            metafunc.definition.own_markers.remove(mark)
            metafunc.parametrize(mark.args[0], doors.PARAMETERS[mark.args[0]])
    if not most or not marks:
        return
    names = [[name.strip() for name in mark.args[0].split(",")] for mark in marks]
    values = [
        [value if len(own) > 1 else (value,) for value in mark.args[1]] for own, mark in zip(names, marks, strict=True)
    ]
    small = [
        [value for value in found if all(_is_small(*named, longest) for named in zip(own, value, strict=True))]
        for own, found in zip(names, values, strict=True)
    ]
    cases = list(_drawn(small, most, metafunc.function.__name__))
    metafunc.definition.own_markers[:] = [mark for mark in metafunc.definition.own_markers if mark not in marks]
    metafunc.parametrize(
        [name for own in names for name in own], [tuple(itertools.chain(*case)) for case in cases], ids=map(str, cases)
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Once the modules are imported."""
    for module in {getattr(item, "module", None) for item in items}:
        for name in set(vars(module or doors)) & set(doors.REPLACED):
            setattr(module, name, doors.REPLACED[name])


def _is_small(name: str, value: Any, longest: int) -> bool:
    if not isinstance(value, int):
        return True
    return value <= (longest if name.startswith("seqlen") else HEADDIM if name == "d" else value)


def _drawn(lists: list[list[Any]], most: int, seed: str) -> Iterator[tuple[Any, ...]]:
    """`most` members of the product of the lists, all if there are no more."""
    total = 1
    for found in lists:
        total *= len(found)
    chosen = range(total) if total <= most else sorted(random.Random(seed).sample(range(total), most))
    for number in chosen:
        case = []
        for found in lists:
            number, place = divmod(number, len(found))
            case.append(found[place])
        yield tuple(case)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Counts the kernels of a test."""
    before = _kernels
    try:
        return (yield)
    finally:
        item.user_properties.append(("kernels", _kernels - before))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line of the outcome: that of the call, or of a setup that failed or was skipped. A subtest is part of its test,
    and fails it."""
    if isinstance(report, getattr(pytest, "SubtestReport", ())):
        return
    path = _config.getoption("--outcomes")
    # Where tests are spread over processes, the one that hands them out writes.
    if path is None or hasattr(_config, "workerinput") or not (report.when == "call" or report.outcome != "passed"):
        return
    why = ""
    if report.skipped:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else str(report.longrepr)[-300:]
    kernels = dict(report.user_properties).get("kernels", 0)
    line = {"test": report.nodeid, "outcome": report.outcome, "kernels": kernels, "why": why.strip()[:400]}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


_config: Any = None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Reports know nothing of the configuration."""
    global _config
    _config = session.config
