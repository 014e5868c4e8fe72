"""The forward kernel's loading warp: it asks the copy engine for tiles, and looks up what comes next."""

from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl, mbarrier, tma_load
from flashtile.backends.hopper.schedule import announce, counts_of, end, query_tile, tile_of, walk_of
from flashtile.backends.hopper.softmax import ROWS


@gluon.jit
def loader(
    descriptors, memory, barriers, mailbox, counter, order, call, META: gl.constexpr
):  # fmt: skip
    """The loading warp: queries once a tile, keys and values into a ring of slots."""
    STAGES: gl.constexpr = META.stages
    _section, total = order
    packing, size, rules, visits, _sinks = call
    count = 0
    turn = 0
    i_number = gl.program_id(0)
    place, counts, walk, i_tile = look_up(i_number, packing, size, order, rules, visits, META)
    while i_number < total:
        # Asked for early: the answer takes as long as a tile's load.
        i_next = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        steps = walk[4]
        if place.tile * META.tile_q >= place.seqlen_q:
            steps = 0
        if steps > 0:
            announce(mailbox, place, counts, turn, META)
        # The slots are filled first, then the next tile is looked up, from load to load to load.
        for n in range(0, gl.minimum(steps, STAGES)):
            i_tile = load_step(n, i_tile, count + n, turn, place, walk, descriptors, memory, barriers, META)
        next_place, next_counts, next_walk, i_first = look_up(
            gl.minimum(i_next, total - 1), packing, size, order, rules, visits, META
        )
        for n in range(STAGES, steps):
            i_tile = load_step(n, i_tile, count + n, turn, place, walk, descriptors, memory, barriers, META)
        count += steps
        turn += gl.minimum(steps, 1)
        place, counts, walk, i_tile = next_place, next_counts, next_walk, i_first
        i_number = i_next
    end(mailbox, turn)


@gluon.jit
def look_up(i_number, packing, size, order, rules, visits, META: gl.constexpr):
    """(place of a query tile, counts of its list, its walk, the first key tile), by its number."""
    section, total = order
    place = query_tile(i_number, packing, size, section, total, visits, META)
    counts = counts_of(place, visits, META)
    walk = walk_of(place, counts, rules.window, visits, META)
    return place, counts, walk, tile_of(walk, 0, META)


@gluon.jit
def load_step(n, i_tile, count, turn, place, walk, descriptors, memory, barriers, META: gl.constexpr):
    """Loads the n-th key tile of a walk, and says which one comes next."""
    q_desc, k_desc, v_desc, _o_desc = descriptors
    q_smem, k_smem, v_smem, _o_smem = memory
    q_full, q_empty, k_full, v_full, empty = barriers
    # Lists have room for that.
    i_after = tile_of(walk, n + 1, META)
    slot = count % META.stages
    where = [place.batch * META.dense, place.first_k + i_tile * META.tile_kv, place.head // META.group, 0]
    wait_for_slot(empty, count, META)
    mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
    tma_load(k_desc, where, k_full.index(slot), k_smem.index(slot))
    if n == 0:
        load_queries(q_desc, q_smem, q_full, q_empty, place, turn, META)
    # The values of a slot are read until the step after that of its keys.
    wait_for_slot(empty, count + 1, META)
    mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
    if META.eight:
        where = [place.batch, place.head // META.group, 0, i_tile * META.tile_kv]
    tma_load(v_desc, where, v_full.index(slot), v_smem.index(slot))
    return i_after


@gluon.jit
def wait_for_slot(empty, count, META: gl.constexpr):
    """Until step `count` - `stages` is over, on all sides."""
    mbarrier.wait(empty.index(count % META.stages), ((count // META.stages) & 1) ^ 1)


@gluon.jit
def load_queries(q_desc, q_smem, q_full, q_empty, place, turn, META: gl.constexpr):
    """The query tile, 64 rows for each math warpgroup."""
    CONSUMERS: gl.constexpr = META.consumers
    for i in gl.static_range(CONSUMERS):
        mbarrier.wait(q_empty.index(i), (turn & 1) ^ 1)
        mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
        where = [place.batch * META.dense, place.first_q + place.tile * META.tile_q + i * ROWS, place.head, 0]
        tma_load(q_desc, where, q_full.index(i), q_smem.index(i))
