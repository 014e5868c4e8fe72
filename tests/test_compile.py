"""Kernels compiled for GPUs that are not there: nothing spills, all fits, the matrix units are used."""

import itertools
import json
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from flashtile import cli, request
from flashtile.backends.portable import kind_of
from flashtile.compiling import build, matrix, report, usage
from flashtile.compiling.build import Row
from flashtile.compiling.matrix import Entry
from flashtile.compiling.targets import TARGETS
from flashtile.kernels import aot, merging
from flashtile.kernels.words import odd
from flashtile.problem import describe
from flashtile.request import Arguments
from flashtile.tuning import portable

FIELDS = {
    *("target", "backend", "kernel", "headdim", "dtype", "variant", "tiles", "registers", "accumulators", "scalars"),
    *("spills", "spills_allowed", "scratch", "occupancy", "shared_accesses", "shared", "shared_limit", "products"),
    *("seconds", "broken"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_a_target(target: str) -> None:
    rows = [Row(**row) for row in build.rows(Entry(target, 64, "bfloat16", "causal"))]
    kernels = ["forward_kernel", "delta_kernel", "query_kernel", "key_kernel"]
    # Each pass once for every length that has tiles of its own.
    names = [*3 * ["forward_kernel"], *("before_kernel", "backward_kernel", "query_kernel")]
    names += ["before_kernel", "backward_kernel", "after_kernel"]
    hopper = names if target == "sm_90a" else []
    assert [row.kernel for row in rows] == kernels + hopper
    assert {row.backend for row in rows} == ({"portable", "hopper"} if hopper else {"portable"})
    assert [str(row) for row in rows if row.broken] == []
    assert all(row.registers > 0 and row.occupancy > 0 and row.shared <= row.shared_limit for row in rows)
    assert all((row.scalars > 0) == target.startswith("gfx") for row in rows)
    expected = {"sm_90a": "wgmma", "sm_100": "tcgen05", "gfx": "v_mfma", "gfx1": "v_wmma"}
    name = next((key for key in ("gfx1", "gfx", target) if target.startswith(key)), "")
    assert any(product.startswith(expected.get(name, "mma.sync")) for product in rows[0].products)


@pytest.mark.parametrize("variant", ["bias", "score_mod", "table", "mask_mod", "varlen", "dropout"])
def test_variants_on_the_gpu_that_is_measured(variant: str) -> None:
    rows = build.rows(Entry("sm_90a", 128, "bfloat16", variant))
    assert [row["broken"] for row in rows if row["broken"]] == []
    assert ("bias_kernel" in [row["kernel"] for row in rows]) == (variant == "bias")
    assert "hopper" in [row["backend"] for row in rows]


@pytest.mark.parametrize(
    ("target", "variant"),
    [
        *(("sm_90a", variant) for variant in matrix.CACHED if variant != "decode_some_fp8"),
        *(("sm_80", "decode_many"), ("gfx942", "decode_int8")),
    ],
)
def test_kernels_over_a_cache(target: str, variant: str) -> None:
    rows = [Row(**row) for row in build.rows(Entry(target, 128, "bfloat16", variant))]
    assert [row.kernel for row in rows] == ["append_kernel", "decode_kernel", "combine_kernel"]
    assert [str(row) for row in rows if row.broken] == []
    # One query of four heads shares a tile of the least size; 64 of them fill those of the forward kernel.
    filled = portable.portable_config(128, "modified", TARGETS[target].family).forward.tile_q
    assert rows[1].tiles[0] == {"decode_some": 8 * 4, "decode_many": filled}.get(variant, 16)
    assert rows[1].products


@pytest.mark.parametrize(
    ("variant", "headdim"),
    [
        *itertools.product(["plain", "causal", "window", "softcap"], [64, 128, 256]),
        *itertools.product(["causal", "mask_mod"], [96, 192]),
        *(("heads_plain", 128), ("heads_alibi", 128), ("heads_values", 192)),
    ],
)
def test_hopper_kernels(variant: str, headdim: int) -> None:
    """Products are in flight together, none waits for another, and spills do not grow, nor do they where heads have
    fewer columns than the row that serves them."""
    rows = build._hopper(Entry("sm_90a", headdim, "bfloat16", variant))
    assert [str(row) for row in rows if row.broken] == []
    # Wide heads, and short sequences, have dQ in a kernel of its own.
    apart = headdim > 128 or variant in ("plain", "causal", "heads_plain")
    passes = {"forward_kernel", "backward_kernel", *(["query_kernel"] if apart else [])}
    assert {row.kernel for row in rows if row.products} == passes
    lengths = [row for row in rows if row.kernel == "forward_kernel"]
    assert len(lengths) == ({"plain": 2, "causal": 3, "window": 2}.get(variant, 1) if headdim == 64 else 1)
    assert all(row.products["wgmma"] >= 16 for row in rows if row.products)


@pytest.mark.parametrize(
    ("target", "headdim", "variant", "product"),
    [
        *(("sm_90a", headdim, "fp8_causal", "wgmma") for headdim in (64, 128, 256)),
        ("sm_90a", 128, "fp8_softcap", "wgmma"),
        *(("sm_90a", headdim, "fp8_varlen", "wgmma") for headdim in (64, 128, 256)),
        ("sm_90a", 64, "fp8_varlen_heads", "wgmma"),
        ("sm_89", 64, "fp8", "mma.sync"),
        ("sm_80", 64, "fp8", "mma.sync"),
        ("gfx942", 64, "fp8_causal", "v_mfma"),
        ("gfx942", 64, "fp8_mask_mod", "v_mfma"),
    ],
)
def test_kernels_with_8_bits(target: str, headdim: int, variant: str, product: str) -> None:
    """Where the target multiplies no 8-bit floats they become 16 bits."""
    entry = Entry(target, headdim, "bfloat16", variant)
    # In a process that has not compiled for other targets, see `report.compiled`.
    rows = [*report.compiled([entry], print)] if target == "sm_80" else [Row(**row) for row in build.rows(entry)]
    turning = {"turn_kernel"} if "varlen" in variant else set()
    assert {row.kernel for row in rows} == {"forward_kernel"} | turning
    assert {row.backend for row in rows} == ({"portable", "hopper"} if target == "sm_90a" else {"portable"})
    assert [str(row) for row in rows if row.broken] == []
    multiplying = [row for row in rows if row.kernel not in turning]
    assert all(any(name.startswith(product) for name in row.products) for row in multiplying)


def test_smaller_tiles_are_taken_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    short = TARGETS["sm_90a"]._replace(shared=48 * 1024)
    monkeypatch.setitem(TARGETS, "sm_90a", short)
    rows = build._portable(Entry("sm_90a", 128, "bfloat16", "plain"))
    usual = portable.portable_config(128, "half").forward
    assert all(row.shared <= 48 * 1024 for row in rows)
    assert rows[0].tiles != usual.chosen()


class TestCommand:
    def _rows(self, monkeypatch: pytest.MonkeyPatch, **broken: Any) -> None:
        row = Row(
            "sm_90a",
            "portable",
            "key_kernel",
            64,
            "bfloat16",
            "plain",
            (64, 64, 4, 2),
            registers=128,
            shared=1024,
            shared_limit=2048,
            products={"wgmma": 8},
        )
        row.broken = ["7 spills, 0 allowed"] if broken else []
        monkeypatch.setattr("flashtile.compiling.report.compiled", lambda entries, note: iter([row]))

    def test_json(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._rows(monkeypatch)
        assert cli.main(["compile", "--report", "json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert set(found["versions"]) == {"flashtile", "triton", "torch"}
        assert set(found["rows"][0]) == FIELDS
        assert found["broken"] == []

    def test_table(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._rows(monkeypatch)
        assert cli.main(["compile", "--arch", "sm_90", "gfx942"]) == 0
        text = capsys.readouterr().out
        for part in ("sm_90a", "key", "64x64x4x2", "128", "1 of 2", "8 wgmma"):
            assert part in text

    def test_a_broken_limit_fails(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._rows(monkeypatch, broken=True)
        assert cli.main(["compile"]) == 1
        assert "key_kernel headdim 64 bfloat16 plain (64, 64, 4, 2): 7 spills, 0 allowed" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--arch", "sm_70"], "--arch: got 'sm_70', need one of sm_80, sm_86"),
            (["--variant", "magic"], "--variant: got 'magic', need one of plain, causal"),
        ],
    )
    def test_a_wrong_call_ends_with_2(self, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
        assert cli.main(["compile", *options]) == 2
        assert said in capsys.readouterr().err


def test_latent_attention() -> None:
    """Keys in two tiles of columns, the first of which are the values; many heads to a tile."""
    rows = [Row(**row) for row in build.rows(Entry("sm_90a", matrix.LATENT, "bfloat16", "decode_paged"))]
    assert [str(row) for row in rows if row.broken] == []
    assert rows[1].tiles[0] == 16


@pytest.mark.parametrize(("variant", "stages"), [("decode_some", 3), ("decode_some_fp8", 2)])
def test_latent_attention_with_many_rows(variant: str, stages: int) -> None:
    """Hopper has a kernel for it, whose warpgroups hold what they need in registers."""
    rows = [Row(**row) for row in build.rows(Entry("sm_90a", matrix.LATENT, "bfloat16", variant))]
    (row,) = [row for row in rows if row.kernel == "latent_kernel"]
    assert (row.backend, row.broken, row.tiles) == ("hopper", [], (64, 64, 12, stages))
    assert row.products == {"wgmma": 44}


@pytest.mark.parametrize(
    ("target", "registers", "shared", "waves", "expected"),
    [
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 129, 0, 4, 3),
        ("gfx942", 129, 0, 8, 2),  # a program is on all SIMD units or on none
        ("gfx942", 64, 24 * 1024, 4, 2),
        ("gfx950", 64, 24 * 1024, 4, 6),
        ("gfx1100", 97, 0, 4, 12),
        ("gfx1100", 256, 0, 1, 5),
        ("gfx1201", 64, 64 * 1024, 8, 4),
        ("sm_80", 255, 0, 4, 2),
        ("sm_86", 32, 0, 4, 12),
        ("sm_86", 32, 50 * 1024, 4, 1),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, waves: int, expected: float) -> None:
    assert TARGETS[target].unit.occupancy(registers, shared, waves) == expected


def test_what_a_target_cannot_convert_is_not_compiled() -> None:
    assert build.rows(Entry("sm_86", 64, "bfloat16", "decode_fp8")) == []


def test_limits_are_checked() -> None:
    named = ("sm_90a", "portable", "key_kernel", 64, "bfloat16", "plain", (64, 64, 4, 2))
    row = Row(*named, registers=255, spills=9, shared=4096, shared_limit=2048)
    assert list(build._breaches(row)) == [
        "9 spills, 0 allowed",
        "4096 bytes of shared memory, 2048 allowed",
        "no matrix instruction",
    ]


def test_only_what_is_loaded_again_is_a_spill() -> None:
    text = """
        /*0010*/                   STL.64 [R1], RZ ;
        /*0020*/                   STL [R1+0x8], R3 ;
        /*0030*/                   STL.128 [R1+0x10], R4 ;
        /*0040*/              @!P0 LDL.LU R3, [R1+0x8] ;
        /*0050*/                   LDL.64 R6, [R1+0x18] ;
    """
    assert usage._spills(text) == 2


def test_every_variant_is_a_call() -> None:
    for variant in matrix.CACHED:
        cached = matrix.cached_call(Entry("sm_80", 32, "float16", variant))
        assert (cached.cache.block_table is None) == (variant in ("decode", "decode_some_fp8"))
    for variant in matrix.VARIANTS:
        inputs, options = matrix.call(Entry("sm_80", 32, "float16", variant))
        assert (inputs.cu_seqlens_q is not None) == (variant == "varlen")
        assert options.scale == 32**-0.5


@pytest.mark.parametrize(
    "target", [GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)]
)
def test_two_states_merge_in_long_loads(target: GPUTarget) -> None:
    out, lse = torch.empty(1, 64, 4, 128, dtype=torch.bfloat16), torch.empty(1, 4, 64)
    strides, rows = out.stride()[:-1], tuple(map(odd, lse.stride()[:-1]))
    given = {"held": out, "held_lse": lse, "out": out, "lse": lse, "sizes": tuple(map(odd, (4, 64, 4, 128)))}
    given |= {"held_strides": strides, "held_lse_strides": rows, "out_strides": strides, "lse_strides": rows}
    compiled = aot.build(merging.merge_kernel, {**given, "TILE": 16, "WIDTH": 128, "WHOLE": True}, target, num_warps=4)
    assert compiled.metadata.shared == 0
    if target.backend == "cuda":
        assert compiled.asm["ptx"].count("ld.global.v4.b32") == 4
        assert compiled.asm["ptx"].count("st.global.v4.b32") == 2


@pytest.mark.parametrize(
    ("target", "headdim", "variant"),
    [
        ("gfx942", 64, "mask_mod"),
        ("gfx1100", 64, "fp8_mask_mod"),
        ("gfx1100", 128, "table"),
        ("gfx1100", matrix.LATENT, "decode_fp8"),
        ("sm_80", 128, "mask_mod"),
        ("sm_86", 64, "score_mod"),
        ("sm_80", matrix.LATENT, "decode_many"),
        ("sm_80", 512, "decode_paged"),
        ("sm_100", 512, "decode_paged"),
        ("gfx1100", 512, "decode_many"),
    ],
)
def test_calls_that_have_rows_of_their_own(target: str, headdim: int, variant: str) -> None:
    """With the tiles of their neighbours these spill, by one Triton or the other."""
    rows = report.compiled([Entry(target, headdim, "bfloat16", variant)], print)
    assert [str(row) for row in rows if row.spills] == []


@pytest.mark.parametrize(
    ("target", "variant"),
    [
        *(("sm_86", "mask_mod"), ("sm_120", "dropout"), ("sm_100", "bias")),
        *(("gfx942", "table"), ("gfx942", "window"), ("gfx1100", "dropout")),
    ],
)
def test_rows_of_512_columns(target: str, variant: str) -> None:
    """They spill nothing, and fit with the table's tiles, no smaller ones."""
    entry = Entry(target, 512, "bfloat16", variant)
    inputs, options = matrix.call(entry)
    config = portable.portable_config(512, kind_of(describe(inputs, options)), TARGETS[target].family)
    rows = [row for row in build._portable(entry) if row.kernel != "delta_kernel"]
    assert [str(row) for row in rows if row.broken or row.spills] == []
    bias = [config.bias or config.query] if variant == "bias" else []
    expected = [config.forward, config.query, *config.passes_over_keys().values(), *bias]
    assert [row.tiles for row in rows] == [tiles.chosen() for tiles in expected]


def test_every_family_has_a_row_for_every_kind() -> None:
    for family in portable.TABLES:
        for kind in portable.KINDS:
            assert portable.portable_config(portable.TABLES[family]["half"][-1][0], kind, family)


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        *(("causal", "half"), ("varlen", "packed"), ("mask_mod", "masked"), ("dropout", "modified")),
        *(("score_mod", "function"), ("table", "table")),
    ],
)
def test_which_rows_hold_for_a_call(variant: str, kind: str) -> None:
    inputs, options = matrix.call(Entry("sm_90a", 64, "bfloat16", variant))
    assert kind_of(describe(inputs, options)) == kind


def test_a_function_that_captures_a_number_has_no_table() -> None:
    slope = torch.tensor(0.5)
    q = torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16)
    inputs, options = request.build(q, q, q, Arguments(score_mod=lambda score, b, h, q_idx, kv_idx: score * slope))
    assert kind_of(describe(inputs, options)) == "function"


@pytest.mark.parametrize(
    ("headdim", "variant", "kernel"),
    [
        *((64, variant, "forward_kernel") for variant in ("table", "mask_mod", "dropout")),
        *((128, "mask_mod", "forward_kernel"), (256, "mask_mod", "forward_kernel"), (256, "bias", "bias_kernel")),
        *((512, "plain", kernel) for kernel in ("forward_kernel", "query_kernel")),
        *((256, "decode_many", "decode_kernel"), (matrix.LATENT, "decode_some", "decode_kernel")),
    ],
)
def test_rows_for_hopper_that_spill_nothing(headdim: int, variant: str, kernel: str) -> None:
    """With the tiles of their neighbours, or larger ones, these spill."""
    entry = Entry("sm_90a", headdim, "bfloat16", variant)
    made = build._cached(entry) if variant in matrix.CACHED else build._portable(entry)
    rows = [row for row in made if (row.backend, row.kernel) == ("portable", kernel)]
    assert {(row.spills, row.spills_allowed) for row in rows} == {(0, 0)}
