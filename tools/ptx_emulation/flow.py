"""Where the lanes of a divergent branch meet again: the immediate post-dominator of its block."""

from collections.abc import Mapping, Sequence

from tools.ptx_emulation.parse import Instruction


def meeting_points(
    code: Sequence[Instruction], labels: Mapping[str, int], branch_targets: Mapping[str, Sequence[str]]
) -> dict[int, int]:
    """The last instruction of each block -> where its successors meet; len(code): at the exit."""
    after_branches = {instruction.pc + 1 for instruction in code if instruction.kind == "branch"}
    starts = sorted({0, len(code), *labels.values()} | after_branches)
    block_at = {start: number for number, start in enumerate(starts)}
    blocks = len(starts) - 1
    successors = []
    for block in range(blocks):
        last = code[starts[block + 1] - 1]
        if last.kind != "branch":
            successors.append([block + 1])
            continue
        if last.branch == "bra":
            following = [block_at[labels[last.target]]]
        elif last.branch == "brx":
            following = [block_at[labels[name]] for name in branch_targets[last.target]]
        else:
            following = [blocks]
        if last.guard is not None and last.branch != "brx":
            following.append(block + 1)
        successors.append(following)
    dominators = _post_dominators(successors, blocks)
    return {starts[block + 1] - 1: starts[_nearest(dominators, block)] for block in range(blocks)}


def _post_dominators(successors: Sequence[Sequence[int]], exit_block: int) -> list[int]:
    """For each block the set of those that all its ways to the exit go through, as bits."""
    everything = (1 << (exit_block + 1)) - 1
    found = [everything] * exit_block + [1 << exit_block]
    changed = True
    while changed:
        changed = False
        for block in range(exit_block - 1, -1, -1):
            common = everything
            for successor in successors[block]:
                common &= found[successor]
            common |= 1 << block
            if common != found[block]:
                found[block] = common
                changed = True
    return found


def _nearest(dominators: Sequence[int], block: int) -> int:
    """Of a block's post-dominators, the one that all others come after."""
    others = dominators[block] & ~(1 << block)
    candidates = [other for other in range(len(dominators)) if others >> other & 1]
    return max(candidates, key=lambda other: dominators[other].bit_count(), default=len(dominators) - 1)
