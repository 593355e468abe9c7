"""Schedules as text: there and back, what is refused, and PyTorch as the judge of what is written."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import ScheduleError
from actors.list_schedule import make_orders
from actors.play import Orders, PipelineTimes, play
from actors.schedule import Action, Op
from actors.schedule_csv import from_csv, to_csv
from actors.spec import ScheduleName
from tests.schedule_cases import SCHEDULES, equal_stages, pipeline_times

needs_its_names = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the validator's names are private; these are torch 2.13's"
)
relaxed = settings(deadline=None)
NEAR = equal_stages(3, part_s=0.1, send_s=0.05, delay_s=0.3)


@relaxed
@given(SCHEDULES, pipeline_times(), st.integers(1, 8))
def test_text_gives_back_the_orders_that_it_was_made_of(
    schedule: ScheduleName, times: PipelineTimes, num_microbatches: int
) -> None:
    orders = make_orders(schedule, times, num_microbatches)
    assert from_csv(to_csv(orders)) == orders


def test_the_text_is_what_pytorch_writes() -> None:
    assert to_csv(make_orders("1f1b", equal_stages(2, part_s=0.1, send_s=0.0, delay_s=0.0), 2)) == (
        "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the schedule is empty"),
        ("\n\n", "the schedule is empty"),
        ("0F0,0B0\n1F0,1X0\n", "line 2 of the schedule has '1X0', which is no action"),
        ("0F0,0B0,0SEND_F0\n", "'0SEND_F0', which is no action"),
        ("0F0,0B0\n0F0,0B0\n", "line 2 of the schedule has 0F0, an action of another stage"),
        ("0F0,0F1,0B0\n", "the backwards of stage 0"),
        ("0F1,0F0,0B0,0B1\n", "the forwards of stage 0"),
        ("0F0,0F1,0I0,0I1,0W1,0W0\n", "the backwards of stage 0"),
        ("0F0,0B0,0I0,0W0\n", "the backwards of stage 0"),
        ("0F0,0B0\n1F0,1F1,1B0,1B1\n", "the forwards of stage 1"),
        ("0B0,0F0\n", "stage 0 runs B0 before F0"),
        ("0F0,0W0,0I0\n", "stage 0 runs W0 before I0"),
        ("0F0,0B9999999\n", "no action"),
        ("0F\u0660,0B0\n", "no action"),
    ],
)
def test_text_that_is_no_whole_schedule_is_refused_with_what_to_mend(text: str, complaint: str) -> None:
    with pytest.raises(ScheduleError, match=complaint) as caught:
        from_csv(text)
    assert caught.value.remedy


@relaxed
@given(st.text(alphabet="0123FBIW,\n \t-x", max_size=60))
def test_any_text_is_orders_or_refused(text: str) -> None:
    try:
        orders = from_csv(text)
    except ScheduleError:
        return
    assert from_csv(to_csv(orders)) == orders


def lowered_by_pytorch(orders: Orders, num_microbatches: int, path: Path) -> dict[int, list[str]]:
    """Have PyTorch read, validate and lower a schedule; AssertionError where it finds one that cannot run."""
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    # All that the runtime asks of a stage before it runs anything.
    stage = SimpleNamespace(
        num_stages=len(orders), group_size=len(orders), group_rank=0, is_first=True, is_last=False, stage_index=0
    )
    path.write_text(to_csv(orders))
    runtime = _PipelineScheduleRuntime([stage], num_microbatches, loss_fn=torch.nn.functional.mse_loss)
    runtime._load_csv(str(path), format="compute_only")
    return {rank: [str(action) for action in actions] for rank, actions in runtime.pipeline_order_with_comms.items()}


@needs_its_names
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "bdp", "bdp-split"])
@pytest.mark.parametrize("delay_s", [0.0, 0.3, 3.0])
def test_pytorch_takes_every_schedule_and_finds_its_sends_and_receives(
    schedule: ScheduleName, delay_s: float, tmp_path: Path
) -> None:
    orders = make_orders(schedule, equal_stages(4, part_s=0.1, send_s=0.05, delay_s=delay_s), 16)
    lowered = lowered_by_pytorch(orders, 16, tmp_path / "schedule.csv")
    for rank, order in enumerate(orders):
        compute = [action for action in lowered[rank] if action[1] in "FBIW"]
        assert compute == [f"{rank}{action.op.value}{action.microbatch}" for action in order]
        for kind, neighbour in (("SEND_F", rank + 1), ("RECV_F", rank - 1), ("SEND_B", rank - 1), ("RECV_B", rank + 1)):
            expected = 16 if 0 <= neighbour < 4 else 0
            assert sum(kind in action for action in lowered[rank]) == expected


@st.composite
def stage_order(draw: st.DrawFn, num_microbatches: int) -> tuple[Action, ...]:
    """Draw any order of one stage in which each kind runs in microbatch order and nothing before what it needs."""
    kinds = draw(st.sampled_from([(Op.FORWARD, Op.BACKWARD), (Op.FORWARD, Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD)]))
    counts, order = [0] * len(kinds), list[Action]()
    while counts[-1] < num_microbatches:
        may = [k for k in range(len(kinds)) if counts[k] < (counts[k - 1] if k else num_microbatches)]
        kind = draw(st.sampled_from(may))
        order.append(Action(kinds[kind], counts[kind]))
        counts[kind] += 1
    return tuple(order)


@needs_its_names
@relaxed
@given(st.data(), st.integers(1, 4))
def test_pytorch_and_play_agree_on_which_orders_deadlock(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, num_microbatches: int
) -> None:
    orders = tuple(data.draw(stage_order(num_microbatches)) for _ in range(3))
    path = tmp_path_factory.getbasetemp() / "drawn.csv"
    try:
        play(orders, NEAR)
    except ScheduleError:
        with pytest.raises(AssertionError, match="can't schedule sends/recvs"):
            lowered_by_pytorch(orders, num_microbatches, path)
    else:
        lowered_by_pytorch(orders, num_microbatches, path)


@needs_its_names
def test_orders_that_pytorch_finds_incomplete_are_refused_here_too(tmp_path: Path) -> None:
    whole = make_orders("bdp-split", NEAR, 4)
    short = (whole[0][:-1], *whole[1:])
    with pytest.raises(AssertionError, match="I and W must have equal counts"):
        lowered_by_pytorch(short, 4, tmp_path / "short.csv")
    with pytest.raises(ScheduleError, match="the backwards of stage 0"):
        from_csv(to_csv(short))
