"""Pure: what a plan has to say about itself, in words."""

from collections.abc import Iterator, Sequence

from ..config import bytes_text, counted, seconds_text
from .cost import stored_bytes
from .memory import MemoryPlan
from .prediction import DraftOption, Prediction, Workload

NOTHING_STREAMED = "the model fits on the device entirely: nothing is streamed"
NO_TREE = "one token a pass: "  # what follows is why


def why_no_tree(drafts: Sequence[DraftOption], plain: Prediction | None, tree: Prediction | None) -> str:
    """Why there is only a root. `tree` is what the best tree of those `drafts` would take, None where none fits."""
    if not drafts:
        return f"{NO_TREE}there is no draft model; --draft-model names one of the same family"
    if plain is None or tree is None:
        bases = [draft.cost.computed_bytes for draft in drafts if draft.cost.is_base]
        of_base = f"; a base of all layers takes {bytes_text(bases[0])}" if bases else ""
        return f"{NO_TREE}none of the drafts offered fits beside the target's slots, with a tree{of_base}"
    return (
        f"{NO_TREE}{seconds_text(plain.s_per_token)} s/token are expected so, and {seconds_text(tree.s_per_token)} with the "
        f"best tree, whose {tree.expected_tokens:.2g} tokens a pass take {seconds_text(tree.draft_s)} s to draft and "
        f"{seconds_text(tree.round_s - tree.draft_s)} s to check"
    )


def plan_notes(workload: Workload, memory: MemoryPlan) -> Iterator[str]:
    """What follows from where the layers are, and what there is to say about the times."""
    placement = memory.placement
    if not placement.streamed:
        yield NOTHING_STREAMED
    yield from _decoding_notes(workload, memory)
    if placement.disk:
        disk_s = stored_bytes(workload.target, placement.disk) / workload.disk_bytes_per_s
        if disk_s > stored_bytes(workload.target, placement.streamed) / workload.link_bytes_per_s:
            yield f"the disk sets the pace: every pass reads {counted(len(placement.disk), 'layer')} from it"
        if workload.disk_is_assumed:
            yield f"the disk is taken to read {workload.disk_bytes_per_s / 1e9:g} GB/s, as nobody said: --disk names its rate"
    yield from workload.doubts


def _decoding_notes(workload: Workload, memory: MemoryPlan) -> Iterator[str]:
    """Of the slowest decoder, where it is slower than the link; and of times that nobody measured."""
    layers, name = workload.target.layers, workload.target.weights
    streamed = [layer for layer in memory.placement.streamed if layers[layer].is_decoded]
    if streamed:
        slowest = max(streamed, key=lambda layer: workload.decode_s[layer])
        copy_s, decode_s = layers[slowest].stored_bytes / workload.link_bytes_per_s, workload.decode_s[slowest]
        if decode_s > copy_s:
            yield (
                f"{name} is decoded more slowly than it comes: a layer takes {seconds_text(decode_s)} s, and "
                f"{seconds_text(copy_s)} s over the link"
            )
    if workload.decode_is_assumed and (streamed or memory.placement.coded):
        yield f"how long decoding takes ({name}) is estimated from the rate of the device's memory: nobody measured it"
