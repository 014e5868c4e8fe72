"""What happens to scores: masks, modifiers, dropout, and the way back through them."""

import triton
import triton.language as tl

from flashtile.kernels.places import diagonal_of, number_of
from flashtile.lower.rules import TWICE_LOG2E, tanh, tanh_of_power, whole

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def in_window(place, rules, o_query, o_key, META: tl.constexpr):
    """What lengths and window allow; `o_query` and `o_key` broadcast to the tile, either way round."""
    diagonal = diagonal_of(place, META.window_top_left)
    if rules.window.right is None:
        m_tile = (o_key < place.seqlen_k) & (o_query < place.seqlen_q)
    else:
        # One comparison an element: what limits a row is found for the row.
        o_last = tl.minimum(place.seqlen_k - 1, o_query + diagonal + number_of(rules.window.right))
        m_tile = o_key <= tl.where(o_query < place.seqlen_q, o_last, -1)
    if rules.window.left is not None:
        m_tile &= o_key >= o_query + diagonal - number_of(rules.window.left)
    return m_tile


@triton.jit
def named(place, rules, o_query, o_key, MASK: tl.constexpr):
    """What the mask's function allows."""
    shift = place.seqlen_k - place.seqlen_q
    return MASK(place.batch, place.head, o_query, o_key, shift, rules.modifiers.mask)


@triton.jit
def allowed(place, rules, o_query, o_key, META: tl.constexpr, MASK: tl.constexpr):
    """What the mask allows, lengths and window included."""
    m_tile = in_window(place, rules, o_query, o_key, META)
    if MASK is not None:
        m_tile &= named(place, rules, o_query, o_key, MASK)
    return m_tile


@triton.jit
def masked(b_scores, place, rules, o_query, o_key, META: tl.constexpr, MASK: tl.constexpr):
    """(scores, -inf where the mask hides them, what it allows)."""
    m_tile = in_window(place, rules, o_query, o_key, META)
    b_scores = tl.where(m_tile, b_scores, -float("inf"))
    if MASK is not None:
        m_named = named(place, rules, o_query, o_key, MASK)
        # One after the other: nobody has to keep a bit an element until both are known.
        b_scores = tl.where(m_named, b_scores, -float("inf"))
        m_tile &= m_named
    return b_scores, m_tile


@triton.jit
def bias_pointers(modifiers, place, o_query, o_key):
    i_batch = place.batch if modifiers.bias_sharing is None else place.batch // number_of(modifiers.bias_sharing)
    base = i_batch.to(tl.int64) * whole(modifiers.bias_batch) + place.head.to(tl.int64) * whole(modifiers.bias_head)
    tile = o_query.to(tl.int64) * whole(modifiers.bias_query) + o_key.to(tl.int64) * whole(modifiers.bias_key)
    return modifiers.bias + base + tile


@triton.jit
def apart(o_query, o_key):
    """Query less key. In float32 from the start: to convert each element of a tile costs as much as its exponential."""
    return o_query.to(tl.float32) - o_key.to(tl.float32)


@triton.jit
def alibi_distance(place, o_query, o_key, META: tl.constexpr):
    return tl.abs(apart(o_query + diagonal_of(place, META.alibi_top_left), o_key))


@triton.jit
def capped(b_dots, scale, softcap, META: tl.constexpr):
    """(softcap * tanh(score / softcap), that tanh); a score is `scale` times a dot product. For half precision within
    2e-7 of softcap, which is far less than a rounding of the scores' factors and a third of the work."""
    if META.exact:
        b_tanh = tanh(b_dots * scale / softcap)
    else:
        b_tanh = tanh_of_power(tl.exp2(b_dots * (TWICE_LOG2E * scale / softcap)))
    return softcap * b_tanh, b_tanh


@triton.jit
def modify(b_dots, place, rules, o_query, o_key, distances, META: tl.constexpr, SCORE: tl.constexpr):
    """(modified scores, the tanh of softcap, scores before SCORE), natural base. distances: see `ruled`."""
    modifiers = rules.modifiers
    b_tanh = b_dots
    if modifiers.softcap is not None:
        b_scores, b_tanh = capped(b_dots, rules.scale, modifiers.softcap, META)
    else:
        b_scores = b_dots * rules.scale
    if modifiers.bias is not None:
        m_tile = (o_query < place.seqlen_q) & (o_key < place.seqlen_k)
        pointers = bias_pointers(modifiers, place, o_query, o_key)
        b_scores += tl.load(pointers, mask=m_tile, other=0.0).to(tl.float32)
    if modifiers.slopes is not None:
        slope = tl.load(modifiers.slopes + place.batch * whole(modifiers.slopes_batch) + place.head).to(tl.float32)
        if distances is None:
            b_scores -= slope * alibi_distance(place, o_query, o_key, META)
        else:
            b_scores -= slope * tl.abs(distances[1])
    b_plain = b_scores
    if SCORE is not None:
        b_apart = apart(o_query, o_key) if distances is None else distances[0]
        b_scores = SCORE(b_scores, place.batch, place.head, o_query, o_key, b_apart, modifiers.score)
    return b_scores, b_tanh, b_plain


@triton.jit
def drawn(rules, place, o_query, o_group):
    """The random numbers, 32 bits each, of keys 4 `o_group` + 0, 1, 2 and 3 (see `flashtile.dropout`); `o_query` and
    `o_group` broadcast to the tile."""
    seed = tl.load(rules.dropout.seed)
    zeros = o_query * 0 + o_group * 0
    if rules.origin is None:
        r_0, r_1, r_2, r_3 = tl.philox(
            seed, zeros + o_group, zeros + o_query, zeros + place.head, zeros + place.batch, 7
        )
    else:
        # A part may begin at any key, so that four of its keys may share two counters.
        i_head = zeros + place.head + tl.load(rules.origin).to(tl.int32)
        i_query = zeros + o_query + tl.load(rules.origin + 1).to(tl.int32)
        first_key = tl.load(rules.origin + 2).to(tl.int32)
        i_group = zeros + o_group + first_key // 4
        r_0, r_1, r_2, r_3 = tl.philox(seed, i_group, i_query, i_head, zeros + place.batch, 7)
        r_4, r_5, r_6, _ = tl.philox(seed, i_group + 1, i_query, i_head, zeros + place.batch, 7)
        if first_key % 2 == 1:
            r_0, r_1, r_2, r_3, r_4, r_5 = r_1, r_2, r_3, r_4, r_5, r_6
        if first_key % 4 >= 2:
            r_0, r_1, r_2, r_3 = r_2, r_3, r_4, r_5
    return r_0, r_1, r_2, r_3


@triton.jit
def kept(rules, place, o_query, first_key, TILE: tl.constexpr):
    """Which entries dropout keeps, (queries, TILE keys).

    All bits of an int32 or none, for `only`: for AMD, Triton 3.9 fails to pass booleans on to a matrix product.
    """
    o_groups = first_key // 4 + tl.arange(0, TILE // 4)
    r_0, r_1, r_2, r_3 = drawn(rules, place, o_query[:, None], o_groups[None, :])
    lanes = tl.join(tl.join(r_0, r_2), tl.join(r_1, r_3)).reshape(o_query.shape[0], TILE)
    return ((whole(rules.dropout.threshold).to(tl.int64) - 1 - lanes.to(tl.int64)) >> 63).to(tl.int32)


@triton.jit
def only(m_kept, b_values):
    """The values, 0 where `m_kept`, all bits of an int32 or none, has none: even NaN, and without a boolean tile."""
    NARROW: tl.constexpr = tl.int16 if b_values.dtype.primitive_bitwidth == 16 else tl.int8
    WHOLE: tl.constexpr = tl.int32 if b_values.dtype.primitive_bitwidth == 32 else NARROW
    return (b_values.to(WHOLE, bitcast=True) & m_kept.to(WHOLE)).to(b_values.dtype, bitcast=True)


@triton.jit
def only_seen(m_tile, b_rows):
    """The rows of keys that some query of the tile sees, 0 in place of the others."""
    return only(-tl.max(m_tile.to(tl.int32), 0)[:, None], b_rows)


@triton.jit
def has_nan(b_tile):
    return tl.max((b_tile != b_tile).to(tl.int32)) > 0


@triton.jit
def ruled(
    b_dots, m_edge, o_query, o_key, place, rules,
    META: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr, distances=None,
):  # fmt: skip
    """(scores as modifiers and the mask leave them, what the mask allows, the tanh of softcap, scores before SCORE).

    The tile lies either way round: `o_query` and `o_key` broadcast to it. MASKED: the mask is evaluated "always",
    "never", or at the "edges": where `m_edge` says that this is one. distances: where a backend has them for less,
    query less key, and aligned query less key, in float32.
    """
    b_scores = b_dots
    b_tanh = b_dots
    b_plain = b_dots
    if META.modified:
        b_scores, b_tanh, b_plain = modify(b_dots, place, rules, o_query, o_key, distances, META, SCORE)
    m_valid = o_query < place.seqlen_q
    if MASKED == "edges":
        m_valid = m_valid & (o_key == o_key)
        if m_edge:
            b_scores, m_valid = masked(b_scores, place, rules, o_query, o_key, META, MASK)
    if MASKED == "always":
        b_scores, m_valid = masked(b_scores, place, rules, o_query, o_key, META, MASK)
    return b_scores, m_valid, b_tanh, b_plain


@triton.jit
def grad_dots(
    b_weights, b_grad_weights, b_delta, m_valid, b_tanh, b_plain, o_query, o_key, place, rules,
    META: tl.constexpr, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr, GUARDED: tl.constexpr, COLLECT: tl.constexpr,
):  # fmt: skip
    """(gradient at the dot products, gradient at the scores before ALiBi), from that at the weights.

    GUARDED: what has a weight of 0 gets gradient 0 whatever its derivative is. COLLECT: gradients of captured tensors
    are added.
    """
    modifiers = rules.modifiers
    b_grad = b_weights * (b_grad_weights - b_delta)
    if DERIVATIVE is not None:
        b_grad = DERIVATIVE(
            b_plain,
            place.batch,
            place.head,
            o_query,
            o_key,
            modifiers.score,
            modifiers.totals,
            b_grad,
            m_valid,
            COLLECT,
        )
    if GUARDED:
        # Under the mask a derivative may be infinite, and a key may hold NaN: times 0 that would be NaN.
        b_grad = tl.where(b_weights == 0.0, 0.0, b_grad)
    b_outer = b_grad
    if META.modified:
        if modifiers.softcap is not None:
            b_grad *= 1.0 - b_tanh * b_tanh
    return b_grad, b_outer


@triton.jit
def grad_scores(
    b_dots, b_grad_weights, b_lse, b_delta, m_kept, m_edge, o_query, o_key, place, rules,
    META: tl.constexpr, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr, MASK: tl.constexpr,
    MASKED: tl.constexpr, GUARDED: tl.constexpr, COLLECT: tl.constexpr,
):  # fmt: skip
    """(weights as the values saw them, gradient at the dot products, gradient at the scores before ALiBi).

    `b_lse`, `b_delta`: they broadcast to the tile; the rest: see `ruled` and `grad_dots`.
    """
    b_scores, m_valid, b_tanh, b_plain = ruled(b_dots, m_edge, o_query, o_key, place, rules, META, SCORE, MASK, MASKED)
    if META.modified:
        # The difference first: a large score times log2(e) would be rounded where it is large.
        b_weights = tl.exp2((b_scores - b_lse) * rules.factor)
    else:
        b_weights = tl.exp2(b_scores * rules.factor - b_lse * LOG2E)
    b_dropped = b_weights
    if rules.dropout is not None:
        b_dropped = only(m_kept, b_weights * rules.dropout.factor)
        b_grad_weights = only(m_kept, b_grad_weights * rules.dropout.factor)
    b_grad, b_outer = grad_dots(
        b_weights, b_grad_weights, b_delta, m_valid, b_tanh, b_plain, o_query, o_key, place, rules,
        META, SCORE, DERIVATIVE, GUARDED, COLLECT,
    )  # fmt: skip
    return b_dropped, b_grad, b_outer
