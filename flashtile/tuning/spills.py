"""How many spilling instructions kernels may have, for `flashtile compile`: data that keeps them from growing."""

Limits = dict[tuple[str, int], dict[str, int]]
"""By kernel and head dimension, then by variant of the call; where none is named, none may spill."""

WIDTHS = (64, 128, 256, 512)
"""Head dimensions that limits are kept for; others have those of the next one, where they have none of their own."""


def allowed(limits: Limits, kernel: str, headdim: int, variant: str) -> int:
    """The limit of a kernel for heads of this many columns."""
    width = next((width for width in WIDTHS if headdim <= width), headdim)
    own = limits.get((kernel, headdim), {})
    return own.get(variant, limits.get((kernel, width), {}).get(variant, 0))


PORTABLE: Limits = {
    ("forward_kernel", 256): {"table": 20},
    ("forward_kernel", 512): {"mask_mod": 20},
    ("query_kernel", 128): {"table": 60},
    ("query_kernel", 256): {"table": 50},
    ("query_kernel", 512): {"dropout": 20, "score_mod": 30, "table": 40, "mask_mod": 30},
    ("key_kernel", 64): {"dropout": 10, "bias": 10, "score_mod": 20},
    ("key_kernel", 128): {"plain": 70, "causal": 30, "window": 40, "dropout": 10, "score_mod": 20, "table": 20,
                          "deterministic": 30},
    ("key_kernel", 256): {"plain": 20, "dropout": 40, "bias": 30, "table": 20, "mask_mod": 50},
    ("key_kernel", 512): {"plain": 30, "causal": 30, "window": 20, "dropout": 30, "bias": 20, "softcap": 20,
                          "score_mod": 130, "table": 40, "mask_mod": 300, "varlen": 40, "deterministic": 30},
    ("decode_kernel", 128): {"decode": 10},
    ("decode_kernel", 512): {"decode": 10, "decode_paged": 10, "decode_fp8": 40, "decode_int8": 50, "decode_some": 20,
                             "decode_some_fp8": 80, "decode_many": 10},
}  # fmt: skip
"""The portable backend's on sm_90a, rounded up to tens; for other targets there are none. There, tiles that spill
nothing took 1.1 to 3.7 times as long on an H100; over KV caches none were timed (docs/portable.md)."""

HOPPER: Limits = {
    ("forward_kernel", 64): {"bias": 30, "table": 320},
    ("forward_kernel", 128): {
        "bias": 120,
        "table": 130,
        "mask_mod": 20,
        "varlen": 10,
        "fp8_mask_mod": 20,
        "fp8_varlen": 10,
        "fp8_varlen_heads": 10,
    },
    ("forward_kernel", 256): {
        "bias": 70,
        "table": 80,
        "mask_mod": 90,
        "varlen": 90,
        "fp8": 10,
        "fp8_causal": 20,
        "fp8_heads": 20,
        "fp8_mask_mod": 40,
        "fp8_varlen": 60,
        "fp8_varlen_heads": 50,
        "heads_alibi": 30,
    },
    ("latent_kernel", 576): {"decode_some": 20, "decode_some_fp8": 30},
    ("bias_kernel", 64): {"bias": 10},
    ("bias_kernel", 256): {"bias": 30},
    ("backward_kernel", 64): {
        "dropout": 10,
        "plain": 30,
        "causal": 30,
        "window": 20,
        "bias": 10,
        "mask_mod": 40,
        "varlen": 10,
        "deterministic": 10,
        "heads": 20,
        "heads_plain": 30,
        "heads_alibi": 10,
        "heads_values": 20,
    },
    ("backward_kernel", 128): {
        "dropout": 30,
        "plain": 10,
        "causal": 20,
        "window": 20,
        "bias": 100,
        "softcap": 70,
        "score_mod": 70,
        "table": 20,
        "mask_mod": 20,
        "varlen": 30,
        "heads": 20,
        "heads_plain": 30,
        "heads_alibi": 40,
        "heads_values": 20,
    },
    ("backward_kernel", 256): {
        "dropout": 10,
        "plain": 10,
        "causal": 10,
        "window": 10,
        "bias": 10,
        "softcap": 10,
        "score_mod": 20,
        "table": 10,
        "mask_mod": 10,
        "varlen": 20,
        "deterministic": 10,
        "heads": 10,
        "heads_plain": 10,
        "heads_alibi": 10,
    },
    ("backward_kernel", 192): {"dropout": 20, "mask_mod": 20, "varlen": 40},
    ("query_kernel", 192): {"heads_values": 60},
    ("query_kernel", 256): {
        "dropout": 80,
        "plain": 40,
        "causal": 30,
        "window": 50,
        "bias": 100,
        "softcap": 60,
        "score_mod": 70,
        "table": 60,
        "mask_mod": 90,
        "varlen": 130,
        "deterministic": 30,
        "heads": 40,
        "heads_plain": 40,
        "heads_alibi": 70,
    },
}
"""The Hopper backend's: what the worst of the supported Tritons makes, rounded up to tens. To be brought to none."""
