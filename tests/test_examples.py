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
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))  # as when one is run
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> Any:
    return load("generate")


def _model(generate: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    size = generate.Size(layers=2, heads=4, heads_kv=2, headdim=16, vocabulary=64, longest=96, inner=256)
    return generate.Llama(size), size


def test_batches_answer_as_one_by_one(generate: Any) -> None:
    """Requests that join and leave in the middle of others, token by token; long prompts come in by chunks. With
    PyTorch's attention over whole rows the same model gives the same tokens."""
    model, size = _model(generate)
    generate.CHUNK = 16
    pools = [generate.Pages(model, 1, 7), generate.Pages(model, 3, 13)]
    answers, most = [], 0
    with torch.inference_mode():
        for memory, slots in ((pools[0], 1), (pools[1], 3), (generate.Rows(model, 3), 3)):
            requests = generate.drawn(7, size)
            seen: list[int] = []
            generate.generate(generate.Engine(model, memory, slots, graph=False), requests, seen.append)
            most = max(most, *seen)
            assert [len(request.answer) for request in requests] == [request.wanted for request in requests]
            answers.append([request.answer for request in requests])
        assert max(generate.shortfall(model, request) for request in requests) <= 1e-6
    assert [memory.pool.pages_free for memory in pools] == [6, 12], "all but the page of empty slots"
    assert answers[0] == answers[1] == answers[2]
    assert most > 1, "several were in the middle of theirs"


def test_a_request_that_never_fits_is_an_error(generate: Any) -> None:
    model, _ = _model(generate)
    engine = generate.Engine(model, generate.Pages(model, 1, 2), 1, graph=False)
    with torch.inference_mode(), pytest.raises(OutOfPages, match="longer than the whole cache"):
        generate.generate(engine, [generate.Request([1] * 40, 4)])


def _checkpoint(folder: Path, **more: Any) -> Any:
    """A small Llama of transformers, stored."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_a_checkpoint(generate: Any, tmp_path: Path, tied: bool) -> None:
    theirs = _checkpoint(tmp_path, tie_word_embeddings=tied)
    tokens = torch.arange(40).remainder(64)[None]
    with torch.inference_mode():
        ours = generate.from_checkpoint(tmp_path, 48).without_cache(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_positions_that_are_rescaled_are_refused(generate: Any, tmp_path: Path) -> None:
    _checkpoint(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match="need a Llama with plain positions"):
        generate.from_checkpoint(tmp_path, 48)


def test_generate_from_the_command_line(generate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _checkpoint(tmp_path)
    for weights in ([], ["--weights", str(tmp_path)]):
        arguments = ["--device", "cpu", "--requests", "3", "--slots", "2", "--layers", "1", "--longest", "24"]
        assert generate.main([*arguments, *weights]) == 0
        said = capsys.readouterr().out
        assert "SDPA: " in said
        assert "3 of 3 answers are those of the requests one by one, token by token" in said
