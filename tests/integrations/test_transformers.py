"""transformers' models under "tile_attention" beside "eager": logits, gradients, greedily generated tokens.

Every comparison asserts that flashtile ran, once a layer; what a layer hands over is read off the Problems that ran.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import flashtile  # noqa: E402
from flashtile.integrations.transformers import NAME, attention_forward, attention_mask, use_flash_name  # noqa: E402
from tests.integrations.models import MODELS, compare, run, same_tokens, tokens  # noqa: E402
from tests.integrations.rule import ran  # noqa: E402


def _padded(side: str, lengths: tuple[int, ...] = (5, 9)) -> dict[str, Tensor]:
    """Tokens with padding, and the mask that says so."""
    longest = max(lengths)
    places = torch.arange(longest)
    kept = [places < n if side == "right" else places >= longest - n for n in lengths]
    mask = torch.stack(kept).long()
    return {"input_ids": tokens(len(lengths), longest) * mask, "attention_mask": mask}


def _packed_inputs() -> dict[str, Any]:
    positions = torch.cat([torch.arange(n) for n in (4, 1, 6)])[None]
    return {"input_ids": tokens(1, 11), "position_ids": positions, "use_cache": False}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    compare(MODELS[name], NAME)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.generates])
def test_generation(name: str) -> None:
    same_tokens(MODELS[name], NAME)


class TestWhatIsHandedOver:
    def test_grouped_heads_are_not_repeated(self) -> None:
        passes = compare(MODELS["LlamaForCausalLM"], NAME, gradients=False)
        assert {(plan.problem.heads, plan.problem.heads_kv) for plan in passes} == {(4, 2)}

    def test_windows(self) -> None:
        passes = compare(MODELS["MistralForCausalLM"], NAME, gradients=False)
        assert all('["window",3,0,"bottom_right"]' in plan.problem.mask for plan in passes)

    def test_only_some_layers_have_windows(self) -> None:
        passes = compare(MODELS["Gemma2ForCausalLM"], NAME, gradients=False)
        assert ["window" in plan.problem.mask for plan in passes] == [True, False]
        assert {plan.problem.softcap for plan in passes} == {2.0}

    def test_sinks(self) -> None:
        assert all(plan.problem.sinks for plan in compare(MODELS["GptOssForCausalLM"], NAME, gradients=False))

    def test_values_of_another_head_dimension(self) -> None:
        passes = compare(MODELS["DeepseekV3ForCausalLM"], NAME, gradients=False)
        assert {(plan.problem.headdim, plan.problem.headdim_v) for plan in passes} == {(24, 12)}

    def test_position_bias(self) -> None:
        """T5's learned bias goes to the kernel as it is, and its gradient comes back (`test_model` compares it)."""
        passes = compare(MODELS["T5ForConditionalGeneration"], NAME, gradients=False)
        assert sum(plan.problem.bias for plan in passes) >= 2

    def test_dropout(self) -> None:
        model = MODELS["GPT2LMHeadModel"].build(NAME).train()
        with ran() as plans:
            model(**MODELS["GPT2LMHeadModel"].inputs())
        assert {plan.problem.dropout_p for plan in plans} == {0.1}


class TestPadding:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM", "MistralForCausalLM", "GptOssForCausalLM"])
    def test_logits_and_gradients(self, name: str, side: str) -> None:
        inputs = _padded(side)
        passes = compare(MODELS[name], NAME, inputs, valid=inputs["attention_mask"])
        assert all("dense" in plan.problem.mask for plan in passes)

    def test_encoder_and_decoder(self) -> None:
        encoder = _padded("right")
        inputs = {**encoder, "decoder_input_ids": tokens(2, 7)}
        compare(MODELS["T5ForConditionalGeneration"], NAME, inputs)

    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "T5ForConditionalGeneration"])
    def test_generation(self, name: str) -> None:
        same_tokens(MODELS[name], NAME, _padded("left"))

    def test_all_ones_is_no_mask(self) -> None:
        inputs = {"input_ids": tokens(2, 9), "attention_mask": torch.ones(2, 9)}
        passes = compare(MODELS["LlamaForCausalLM"], NAME, inputs, gradients=False)
        assert {plan.problem.mask for plan in passes} == {'["causal","bottom_right"]'}


class TestPacked:
    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM"])
    def test_positions_that_begin_anew(self, name: str) -> None:
        passes = compare(MODELS[name], NAME, _packed_inputs())
        assert all("document" in plan.problem.mask for plan in passes), "a mask of all pairs was built"

    def test_rows_packed_differently(self) -> None:
        first, second = (torch.cat([torch.arange(n) for n in lengths]) for lengths in ((4, 7), (2, 3, 6)))
        inputs = {"input_ids": tokens(2, 11), "position_ids": torch.stack((first, second)), "use_cache": False}
        compare(MODELS["LlamaForCausalLM"], NAME, inputs)

    def test_offsets(self) -> None:
        """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes goes to the packed kernel."""
        offsets = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
        more = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 6, "max_length_k": 6}
        passes = compare(MODELS["MistralForCausalLM"], NAME, {**_packed_inputs(), **more}, reference=_packed_inputs())
        assert all(plan.problem.varlen for plan in passes)

    def test_offsets_where_the_model_knows_no_packing(self) -> None:
        """GPT-OSS makes no packed mask in any implementation; the offsets do it."""
        offsets = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
        more = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 6, "max_length_k": 6}
        model, inputs = MODELS["GptOssForCausalLM"].build(NAME), _packed_inputs()
        with ran() as plans:
            found = model(**inputs, **more).logits
        assert all(plan.problem.varlen and plan.problem.sinks for plan in plans)
        for begin, end in ((0, 4), (4, 5), (5, 11)):
            alone = MODELS["GptOssForCausalLM"].build()(input_ids=inputs["input_ids"][:, begin:end]).logits
            torch.testing.assert_close(found[:, begin:end], alone, rtol=1e-4, atol=1e-5)


class TestCaches:
    @pytest.mark.parametrize("cache", ["static", "dynamic"])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
    def test_generation(self, name: str, cache: str, padded: bool) -> None:
        inputs = _padded("left") if padded else None
        # Uncompiled here; what is handed over under a compiler is below.
        same_tokens(MODELS[name], NAME, inputs, cache_implementation=cache, disable_compile=True)

    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
    def test_prompt_in_parts(self, name: str) -> None:
        ids = tokens(2, 12)
        whole, parted = MODELS[name].build(), MODELS[name].build(NAME)
        expected = whole(input_ids=ids, use_cache=False).logits
        found, cache = [], None
        with ran():
            for part in ids.split(5, dim=1):
                step = parted(input_ids=part, past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                found.append(step.logits)
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-5)


class TestOwnMasks:
    """Masks that are not recognised are written out, and nothing else applies."""

    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_four_dimensions(self, kind: str) -> None:
        allowed = (torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.5) | torch.eye(9).bool()
        additive = torch.zeros(2, 1, 9, 9).masked_fill(~allowed, torch.finfo(torch.float32).min)
        model = MODELS["LlamaForCausalLM"]
        inputs, reference = ({"input_ids": tokens(2, 9), "attention_mask": mask} for mask in (allowed, additive))
        compare(model, NAME, inputs if kind == "bool" else reference, reference=reference)

    def test_blocks_see_ahead(self) -> None:
        """Image tokens see each other (Gemma 3's mask) whatever the window says."""
        config = MODELS["Gemma3ForCausalLM"].build(NAME).config
        blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1]])
        embeddings, seen = torch.zeros(1, 9, 32), torch.ones(1, 9)
        make = transformers.masking_utils.create_causal_mask
        found = make(config, embeddings, seen, None, block_sequence_ids=blocks)
        config._attn_implementation = "sdpa"
        expected = make(config, embeddings, seen, None, block_sequence_ids=blocks)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("traced", [False, True])
    def test_packed_blocks(self, traced: bool) -> None:
        """Document ids cannot say this; a compiled graph, which must choose beforehand, raises."""
        config = MODELS["Gemma3ForCausalLM"].build(NAME).config
        positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
        blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1]])

        def make(embeddings: Tensor) -> Tensor:
            return transformers.masking_utils.create_causal_mask(
                config, embeddings, None, None, positions, block_sequence_ids=blocks
            )

        if traced:
            with pytest.raises(RuntimeError, match="attention_mask: got packed sequences with blocks that look ahead"):
                torch.compile(make, backend="eager", fullgraph=True)(torch.zeros(1, 9, 32))
            return
        found = make(torch.zeros(1, 9, 32))
        config._attn_implementation = "sdpa"
        assert torch.equal(found, make(torch.zeros(1, 9, 32)))

    @pytest.mark.parametrize("padded", [False, True])
    def test_chunks(self, padded: bool) -> None:
        """Chunks are documents, unless there is padding too."""
        function = transformers.masking_utils.chunked_causal_mask_function(3, torch.tensor([0, 2]))
        given = torch.ones(2, 8, dtype=torch.bool) if padded else None
        found = attention_mask(2, 8, 8, mask_function=function, attention_mask=given, local_size=3)
        expected = transformers.masking_utils.sdpa_mask(
            2, 8, 8, mask_function=function, local_size=3, allow_is_causal_skip=False
        )
        assert found is not None
        if padded:
            assert torch.equal(found, expected)
        else:
            same = found[:, None, :, None] == found[:, None, None, :]
            assert torch.equal(same & torch.ones(8, 8, dtype=torch.bool).tril(), expected)

    def test_functions_of_the_caller(self) -> None:
        rule = lambda b, h, q, k: k % 2 == 0  # noqa: E731
        config = MODELS["LlamaForCausalLM"].build(NAME).config
        found = transformers.masking_utils.create_causal_mask(
            config, torch.zeros(1, 6, 32), None, None, and_mask_function=rule
        )
        places = torch.arange(6)
        assert torch.equal(found[0, 0], (places <= places[:, None]) & (places % 2 == 0))

    def test_both_directions_within_a_window(self) -> None:
        function = transformers.masking_utils.sliding_window_bidirectional_mask_function(2)
        found = attention_mask(1, 6, 6, mask_function=function, local_size=2, allow_is_bidirectional_skip=True)
        places = torch.arange(6)
        assert found is not None
        assert torch.equal(found[0, 0], (places - places[:, None]).abs() <= 2)

    def test_masks_that_are_built_on(self) -> None:
        """A model that joins masks itself asks for the tensor."""
        for function, skip in (
            (transformers.masking_utils.causal_mask_function, {"allow_is_causal_skip": False}),
            (transformers.masking_utils.bidirectional_mask_function, {"allow_is_bidirectional_skip": False}),
        ):
            found = attention_mask(2, 4, 4, mask_function=function, **skip)
            assert found is not None
            assert found.shape == (2, 1, 4, 4)


class TestCompiled:
    """One graph, with flashtile's operator in it once a layer."""

    @pytest.mark.parametrize("inputs", ["plain", "padded", "packed"])
    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
    def test_fullgraph(self, name: str, inputs: str) -> None:
        given = {
            "plain": {"input_ids": tokens(2, 9)},
            "padded": _padded("right"),
            "packed": _packed_inputs(),
        }[inputs]
        given = {**given, "use_cache": False}
        model = MODELS[name].build(NAME)
        graphs: list[Any] = []

        def keep(graph: Any, example: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        found = torch.compile(model, fullgraph=True, backend=keep)(**given).logits
        expected = model(**given).logits
        valid = given.get("attention_mask", torch.ones(found.shape[:2]))[..., None].bool()
        torch.testing.assert_close(found.where(valid, 0), expected.where(valid, 0), rtol=1e-4, atol=1e-5)
        assert len(graphs) == 1
        nodes = [node for node in graphs[0].graph.nodes if "flashtile" in str(node.target)]
        assert len(nodes) == 2
        masks = [argument for node in nodes for argument in node.args if isinstance(argument, str) and '["' in argument]
        assert len(masks) == 2
        kind = {"plain": "document", "padded": "dense", "packed": "document"}[inputs]
        assert all(kind in mask and '"causal"' in mask for mask in masks)

    def test_any_length(self) -> None:
        """Lengths, and the scale that a layer holds, are symbols of one graph."""
        model, graphs = MODELS["LlamaForCausalLM"].build(NAME), []

        def keep(graph: Any, example: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=keep)
        for length in (9, 12, 17):
            inputs = {"input_ids": tokens(2, length), "use_cache": False}
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
        assert len(graphs) == 1
        assert graphs[0].code.count("flashtile.forward") == 2

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM"])
    def test_export(self, name: str, strict: bool) -> None:
        model, inputs = MODELS[name].build(NAME), _padded("right")
        if name == "LlamaForCausalLM":
            inputs["use_cache"] = False  # type: ignore[assignment]
        program = torch.export.export(model, (), inputs, strict=strict)
        with ran() as plans:
            found = program.module()(**inputs).logits
        assert len(plans) == 2
        valid = inputs["attention_mask"][..., None].bool()
        expected = model(**inputs).logits
        torch.testing.assert_close(found.where(valid, 0), expected.where(valid, 0), rtol=1e-4, atol=1e-5)

    def test_static_cache(self) -> None:
        """How much of the cache is filled is not known in a graph: the mask is written out."""
        model = MODELS["LlamaForCausalLM"].build(NAME)
        inputs = MODELS["LlamaForCausalLM"].inputs()
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
        with ran():
            found = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True
            )
        assert found.tolist() == expected.tolist()


def test_gradient_checkpointing() -> None:
    model = MODELS["LlamaForCausalLM"].build(NAME)
    inputs = {**MODELS["LlamaForCausalLM"].inputs(), "use_cache": False}
    expected = run(model, inputs)
    model.gradient_checkpointing_enable()
    model.train()
    with ran() as plans:
        loss = (model(**inputs).logits * torch.linspace(-1, 1, 2 * 9 * 61).sin().reshape(2, 9, 61)).sum()
        loss.backward()
    assert sum(not plan.problem.backward for plan in plans) == 4, "the forward pass runs once more"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_loading_by_name(tmp_path: Any) -> None:
    MODELS["LlamaForCausalLM"].build().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    with ran():
        model(input_ids=tokens(1, 5))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation != NAME


def test_half_precision() -> None:
    model = MODELS["Gemma2ForCausalLM"]
    exact, rounded = model.build().double(), model.build().bfloat16()
    ours = model.build(NAME).bfloat16()
    truth = run(exact, model.inputs(), gradients=False)["logits"]
    textbook = run(rounded, model.inputs(), gradients=False)["logits"]
    with ran():
        found = run(ours, model.inputs(), gradients=False)["logits"]
    error, allowed = ((value - truth).abs().max() for value in (found, textbook))
    assert error <= 2 * allowed


class TestFlashName:
    """transformers' own flash-attention wrapper over flashtile's functions."""

    NAMES = ("LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM", "DeepseekV3ForCausalLM")

    @pytest.mark.parametrize("name", NAMES)
    def test_model(self, name: str) -> None:
        compare(MODELS[name], use_flash_name())

    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
    def test_padding_is_unpadded(self, name: str) -> None:
        inputs = _padded("right")
        passes = compare(MODELS[name], use_flash_name(), inputs, valid=inputs["attention_mask"])
        assert all(plan.problem.varlen for plan in passes)

    def test_packed(self) -> None:
        passes = compare(MODELS["MistralForCausalLM"], use_flash_name(), _packed_inputs())
        assert all(plan.problem.varlen for plan in passes)

    def test_models_with_a_list(self) -> None:
        model = MODELS["GptOssForCausalLM"]
        before = transformers.GptOssPreTrainedModel._compatible_flash_implementations
        try:
            name = use_flash_name(transformers.GptOssForCausalLM)
            use_flash_name(transformers.GptOssForCausalLM)
            assert transformers.GptOssPreTrainedModel._compatible_flash_implementations == [*before, "flashtile"]
            assert all(plan.problem.sinks for plan in compare(model, name))
        finally:
            transformers.GptOssPreTrainedModel._compatible_flash_implementations = before

    @pytest.mark.parametrize("cache", ["static", "dynamic"])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
    def test_generation(self, name: str, cache: str, padded: bool) -> None:
        inputs = _padded("left") if padded else None
        same_tokens(MODELS[name], use_flash_name(), inputs, cache_implementation=cache, disable_compile=True)

    def test_continuous_batching(self) -> None:
        """Requests of different lengths in one batch, their keys in transformers' own pages."""
        model, prompts = MODELS["LlamaForCausalLM"], [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3]]
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        alone = [model.build().generate(torch.tensor([prompt]), **settings)[0] for prompt in prompts]
        with ran() as plans:
            found = model.build(use_flash_name()).generate_batch(
                prompts,
                generation_config=transformers.GenerationConfig(**settings),
                continuous_batching_config=transformers.ContinuousBatchingConfig(
                    num_blocks=8, max_batch_tokens=16, block_size=16
                ),
                progress_bar=False,
            )
        expected = [row[len(prompt) :].tolist() for row, prompt in zip(alone, prompts, strict=True)]
        assert [request.generated_tokens for request in found.values()] == expected
        assert all(plan.problem.varlen for plan in plans)

    def test_vision_towers_hand_over_offsets(self) -> None:
        """Qwen 2.5 VL's packs its images only for a flash name; others get one call an image."""
        configuration = transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, window_size=16,
            out_hidden_size=24, fullatt_block_indexes=[1],
        )  # fmt: skip
        tower = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel
        model = tower._from_config(configuration, attn_implementation="eager").eval()
        pixels, grid = torch.randn(48, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 6], [1, 6, 4]])
        expected = model(pixels, grid_thw=grid).last_hidden_state
        for name, calls in ((NAME, 6), (use_flash_name(), 2)):
            model.set_attn_implementation(name)
            with ran() as plans:
                found = model(pixels, grid_thw=grid).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert [plan.problem.varlen for plan in plans] == [name != NAME] * calls

    def test_others_are_left_alone(self) -> None:
        use_flash_name()
        with pytest.raises((ImportError, ValueError)):
            MODELS["LlamaForCausalLM"].build("flash_attention_2")

    def test_other_versions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transformers, "__version__", "5.99.1")
        with pytest.raises(NotImplementedError, match=r"use_flash_name: got transformers 5.99.1, need 5.23 or 5.24"):
            use_flash_name()


class TestRefused:
    def test_paged_batching(self) -> None:
        q = torch.randn(1, 2, 4, 8)
        paged = type("PagedAttentionCache", (), {})()
        for options in ({"cache": paged}, {"block_table": torch.zeros(1, 1)}):
            with pytest.raises(NotImplementedError, match=r": got transformers' paged cache .* try attn_impl"):
                attention_forward(torch.nn.Module(), q, q, q, None, **options)
        attention_forward(torch.nn.Module(), q, q, q, None, cache=transformers.DynamicCache())

    def test_weights(self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        from flashtile.integrations.transformers import attention

        monkeypatch.setattr(attention, "_warned", set())
        q = torch.randn(1, 2, 4, 8)
        for _ in range(2):
            assert attention_forward(torch.nn.Module(), q, q, q, None, output_attentions=True)[1] is None
        assert caplog.text.count("output_attentions: flashtile returns no attention weights") == 1


def test_queries_shared_by_a_batch() -> None:
    """Learned queries come with batch 1."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(4, 2, 7, 8)
    with ran():
        found, _ = attention_forward(torch.nn.Module(), q, k, k, None, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(q.expand(4, -1, -1, -1), k, k)
    torch.testing.assert_close(found, expected.transpose(1, 2))


class TestInstalledAsFlashAttention:
    """With `install_as_flash_attn`, transformers' own "flash_attention_2" runs flashtile. Only a GPU is pretended."""

    @pytest.fixture
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        found = flashtile.install_as_flash_attn()
        utilities = transformers.utils.import_utils
        monkeypatch.setattr(utilities, "is_torch_cuda_available", lambda: True)
        yield found
        monkeypatch.undo()
        found.uninstall()

    def test_it_is_found(self, installed: Any) -> None:
        assert transformers.utils.import_utils.is_flash_attn_2_available()
        assert transformers.utils.import_utils.is_flash_attn_3_available()
        assert "transformers was imported before: it has been made to look again" in str(installed)

    def test_it_is_forgotten(self, installed: Any) -> None:
        installed.uninstall()
        assert not transformers.utils.import_utils.is_flash_attn_2_available()

    @pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
    def test_model(self, installed: Any, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
        loader = transformers.modeling_flash_attention_utils
        monkeypatch.setattr(loader, "_loaded_implementation", None)
        model = MODELS["MistralForCausalLM"]
        # The check that a model is on a GPU is the one thing that a CPU cannot pass.
        monkeypatch.setattr(transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda *a, **k: True)
        inputs = _padded("right")
        passes = compare(model, implementation, inputs, valid=inputs["attention_mask"])
        assert all(plan.problem.varlen for plan in passes)
