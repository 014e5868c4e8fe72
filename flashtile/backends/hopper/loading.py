"""The loading warp of the kernels that walk over keys (forward, and dQ): it asks the copy engine for tiles, and looks
up what comes next."""

from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl, mbarrier, tma_load
from flashtile.backends.hopper.eight import first_key_of
from flashtile.backends.hopper.memory import KEYS_FREED, VALUES_FREED, await_slot
from flashtile.backends.hopper.registers import here
from flashtile.backends.hopper.schedule import announce, counts_of, end, query_tile, tile_of, walk_of
from flashtile.backends.hopper.softmax import ROWS
from flashtile.backends.hopper.strips import load_strips
from flashtile.kernels.words import Size


@gluon.jit
def loader(
    descriptors, memory, barriers, mailbox, counter, order, call, META: gl.constexpr
):  # fmt: skip
    """The loading warp: queries once a tile, keys and values into a ring of slots."""
    STAGES: gl.constexpr = META.stages
    _section, total = order
    packing, size, rules, visits, _sinks = call
    size = Size(size.seqlen_q, size.seqlen_k, here(size.heads), here(size.tiles))
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
    # No barrier is left half full.
    for i in range(count + META.values_late, count + META.stages_v):
        await_slot(VALUES_FREED, i, META.stages_v, META)
    if META.for_dq or META.early:
        for i in range(count + META.keys_late, count + STAGES):
            await_slot(KEYS_FREED, i, STAGES, META)


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
    k_desc, v_desc = descriptors[1], descriptors[2]
    k_smem, v_smem = memory[1], memory[2]
    k_full, v_full = barriers[2], barriers[3]
    # Lists have room for that.
    i_after = tile_of(walk, n + 1, META)
    STRIPS: gl.constexpr = META.strips
    slot = count % META.stages
    slot_v = count % v_smem.shape[0]
    first_row = place.first_k + first_key_of(i_tile, place, META)
    where = (place.batch * META.dense, first_row, place.head // META.group)
    # Otherwise they are free since the last values were.
    if META.for_dq or META.early:
        await_slot(KEYS_FREED, count + META.keys_late, META.stages, META)
    mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes * STRIPS)
    load_strips(k_desc, where, k_full.index(slot), k_smem, slot, STRIPS)
    if n == 0:
        load_queries(descriptors, memory, barriers, place, turn, META)
    await_slot(VALUES_FREED, count + META.values_late, META.stages_v, META)
    mbarrier.expect(v_full.index(slot_v), v_desc.block_type.nbytes)
    if META.eight:
        turned = [place.batch * META.dense, place.head // META.group, 0, first_row]
        tma_load(v_desc, turned, v_full.index(slot_v), v_smem.index(slot_v))
    else:
        load_strips(v_desc, where, v_full.index(slot_v), v_smem, slot_v, 1)
    return i_after


@gluon.jit
def query_slot(turn, i_group, META: gl.constexpr):
    """Where a warpgroup's 64 rows of the turn-th query tile lie."""
    return turn % META.query_stages * META.consumers + i_group


@gluon.jit
def load_queries(descriptors, memory, barriers, place, turn, META: gl.constexpr):
    """The query tile, 64 rows for each math warpgroup; for dQ also the gradients of its outputs."""
    STAGES: gl.constexpr = META.query_stages
    CONSUMERS: gl.constexpr = META.consumers
    q_desc = descriptors[0]
    q_full, q_empty = barriers[0], barriers[1]
    for i in gl.static_range(CONSUMERS):
        slot = query_slot(turn, i, META)
        full = q_full.index(slot)
        where = (place.batch * META.dense, place.first_q + place.tile * META.tile_q + i * ROWS, place.head)
        mbarrier.wait(q_empty.index(slot), ((turn // STAGES) & 1) ^ 1)
        if META.for_dq:
            mbarrier.expect(full, q_desc.block_type.nbytes * META.strips + descriptors[4].block_type.nbytes)
            load_strips(descriptors[4], where, full, memory[4], slot, 1)
        else:
            mbarrier.expect(full, q_desc.block_type.nbytes * META.strips)
        load_strips(q_desc, where, full, memory[0], slot, META.strips)
