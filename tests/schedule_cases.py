"""Pipelines to schedule, as hypothesis draws them, and what a pipeline of equal stages takes."""

from hypothesis import strategies as st

from actors.play import PipelineTimes

# Tenths of seconds, zero among them: ties and things that take no time are where orders go wrong.
_SECONDS = st.integers(0, 30).map(lambda tenths: tenths / 10)
SCHEDULES = st.sampled_from(["gpipe", "1f1b", "zb-h1", "bdp", "bdp-split"])
LIST_SCHEDULES = st.sampled_from(["bdp", "bdp-split"])


@st.composite
def pipeline_times(draw: st.DrawFn, max_stages: int = 5, min_stages: int = 1) -> PipelineTimes:
    num_stages = draw(st.integers(min_stages, max_stages))

    def seconds(count: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(_SECONDS, min_size=count, max_size=count)))

    return PipelineTimes(
        forward_s_S=seconds(num_stages),
        input_backward_s_S=seconds(num_stages),
        weight_backward_s_S=seconds(num_stages),
        send_down_s_L=seconds(num_stages - 1),
        delay_down_s_L=seconds(num_stages - 1),
        send_up_s_L=seconds(num_stages - 1),
        delay_up_s_L=seconds(num_stages - 1),
    )


def equal_stages(num_stages: int, *, part_s: float, send_s: float, delay_s: float) -> PipelineTimes:
    """Return times of stages whose forward and halves of the backward take the same, on links that are all the same."""
    return timed_stages(num_stages, part_s, part_s, part_s, send_s=send_s, delay_s=delay_s)


def timed_stages(
    num_stages: int, forward_s: float, input_s: float, weight_s: float, *, send_s: float, delay_s: float
) -> PipelineTimes:
    """Return times of stages that are all the same, on links that are all the same."""
    links = num_stages - 1
    return PipelineTimes(
        forward_s_S=(forward_s,) * num_stages,
        input_backward_s_S=(input_s,) * num_stages,
        weight_backward_s_S=(weight_s,) * num_stages,
        send_down_s_L=(send_s,) * links,
        delay_down_s_L=(delay_s,) * links,
        send_up_s_L=(send_s,) * links,
        delay_up_s_L=(delay_s,) * links,
    )
