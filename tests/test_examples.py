"""The examples run, and give what they should."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashtile.kvcache import OutOfPages

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> Any:
    return load("generate")


def _model(generate: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    size = generate.Size(layers=2, heads=4, heads_kv=2, headdim=16, vocabulary=64, longest=96)
    return generate.Llama(size), size


def test_batches_answer_as_one_by_one(generate: Any) -> None:
    """Requests that join and leave in the middle of others, token by token; long prompts come in by chunks."""
    model, size = _model(generate)
    generate.CHUNK = 16
    answers, most = [], 0
    with torch.inference_mode():
        for slots, pages in ((1, 7), (3, 13)):
            requests = generate.drawn(7, size)
            engine = generate.Engine(model, pages, slots, graph=False)
            seen: list[int] = []
            generate.generate(engine, requests, seen.append)
            most = max(most, *seen)
            assert [len(request.answer) for request in requests] == [request.wanted for request in requests]
            assert engine.pool.pages_free == pages - 1, "all but the page of empty slots"
            answers.append([request.answer for request in requests])
        assert max(generate.shortfall(model, request) for request in requests) <= 1e-6
    assert answers[0] == answers[1]
    assert most > 1, "several were in the middle of theirs"


def test_a_request_that_never_fits_is_an_error(generate: Any) -> None:
    model, _ = _model(generate)
    engine = generate.Engine(model, 2, 1, graph=False)
    with torch.inference_mode(), pytest.raises(OutOfPages, match="longer than the whole cache"):
        generate.generate(engine, [generate.Request([1] * 40, 4)])


def test_generate_from_the_command_line(generate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--requests", "3", "--slots", "2", "--layers", "1", "--longest", "24"]
    assert generate.main(arguments) == 0
    assert "tokens a second" in capsys.readouterr().out
