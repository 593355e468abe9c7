"""What a node's probe may have said, for tests that need no probe."""

from actors.fleet_spec import PartTimes


def part_times(
    microbatch_size: int, *, layer_forward_s: float, layer_backward_s: float, embedding_s: float, head_s: float
) -> PartTimes:
    """Return times whose ends take a third forward and two thirds backward, as layers about do."""
    return PartTimes(
        microbatch_size=microbatch_size,
        layer_forward_s=layer_forward_s,
        layer_backward_s=layer_backward_s,
        layer_weight_s=layer_backward_s / 2,
        embedding_forward_s=embedding_s / 3,
        embedding_backward_s=embedding_s * 2 / 3,
        head_forward_s=head_s / 3,
        head_backward_s=head_s * 2 / 3,
    )
