"""Canaries: what they compare, and when a codec gives a milder one its place."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from actors.canary import compare
from actors.codecs import CODECS
from actors.errors import ConfigError
from actors.spec import CanaryReading, Kind, LinkCodecs
from orchestrator.canary import StepDown, judge, with_step_downs
from orchestrator.lifecycle import RunState, on_step_downs
from tests.unit.synthetic_run import make_plan


def reading(source: int, target: int, codec: str, cosine: float) -> CanaryReading:
    return CanaryReading(
        source_stage=source,
        target_stage=target,
        kind=Kind.ACTIVATION if source < target else Kind.GRADIENT,
        step=50,
        codec=codec,
        relative_error=0.6,
        cosine=cosine,
    )


def payload_of(name: str, tensor: torch.Tensor) -> memoryview:
    return CODECS[name].encode(tensor, seed=1).numpy().data


def test_relative_error_and_cosine_are_those_of_the_decoded_tensor() -> None:
    raw = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    assert compare(CODECS["none"], payload_of("none", raw), raw) == (0.0, pytest.approx(1.0))
    error, cosine = compare(CODECS["hq4"], payload_of("hq4", raw), raw)
    assert error == pytest.approx(0.117, abs=0.01)
    assert cosine == pytest.approx(math.sqrt(1 - error**2), abs=0.002)
    # What was decoded is not what is compared with: the payload stays as it is.
    other = payload_of("none", raw + 1)
    before = bytes(other)
    error, cosine = compare(CODECS["none"], other, raw)
    assert error == pytest.approx(1 / float(raw.square().mean().sqrt()), rel=1e-4)
    assert bytes(other) == before


def test_a_tensor_is_compared_piece_by_piece_and_as_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)).t()
    payload = payload_of("hq4", raw)
    whole = compare(CODECS["hq4"], payload, raw)
    monkeypatch.setattr("actors.canary._PIECE", 77)
    assert compare(CODECS["hq4"], payload, raw) == pytest.approx(whole)


def test_zeros_and_values_that_are_not_finite_have_their_own_answer() -> None:
    zeros = torch.zeros(2, 128)
    assert compare(CODECS["q8"], payload_of("q8", zeros), zeros) == (0.0, 1.0)
    tiny = torch.full((128,), 1e-35)
    assert compare(CODECS["q8"], payload_of("q8", tiny), tiny) == (1.0, 0.0)
    broken = torch.tensor([math.nan] * 128)
    assert all(math.isnan(value) for value in compare(CODECS["q8"], payload_of("q8", broken), broken))


def test_a_bad_canary_steps_its_direction_of_its_link_down() -> None:
    plan = make_plan(3)
    ((step_down, reason),) = judge([reading(1, 2, "hq4", 0.85), reading(0, 1, "hq4", 0.95)], plan, 0.9)
    assert step_down == StepDown(source_stage=1, target_stage=2, codec="q8")
    assert "cosine 0.850" in reason
    assert "wire.canary_min_cosine=0.9" in reason
    after = with_step_downs(plan, [step_down])
    assert after.link_codecs == (
        LinkCodecs(forward="hq4", backward="q8"),
        LinkCodecs(forward="q8", backward="q8"),
    )
    assert after.links[1].frame_bytes_forward == CODECS["q8"].size_bytes(plan.links[1].frame_elements, torch.float32)
    assert after.links[0] == plan.links[0]


def test_a_gradient_codec_steps_down_too_and_q8_to_bf16() -> None:
    plan = make_plan(2)
    ((step_down, _),) = judge([reading(1, 0, "q8", 0.2)], plan, 0.9)
    assert with_step_downs(plan, [step_down]).link_codecs == (LinkCodecs(forward="hq4", backward="bf16"),)


@pytest.mark.parametrize(
    "harmless",
    [
        reading(0, 1, "hq4", 0.9),
        reading(0, 1, "hq4", math.nan),
        # Nothing is milder, or the plan has another by now.
        reading(0, 1, "none", 0.1),
        reading(0, 1, "q4", 0.1),
    ],
    ids=["at the limit", "not finite", "none", "no longer in use"],
)
def test_nothing_steps_down_without_cause(harmless: CanaryReading) -> None:
    assert judge([harmless], make_plan(2), 0.9) == ()


def test_step_downs_stay_in_the_history_that_a_checkpoint_keeps() -> None:
    down = StepDown(source_stage=0, target_stage=1, codec="q8")
    state = on_step_downs(RunState(step=3, generation=1), (down,))
    state = on_step_downs(state, (replace(down, codec="bf16"),))
    assert [kept.codec for kept in state.history.step_downs] == ["q8", "bf16"]
    # The last word on a link counts; links of another cut are passed over.
    plan = with_step_downs(
        make_plan(2), (*state.history.step_downs, StepDown(source_stage=7, target_stage=8, codec="q8"))
    )
    assert plan.link_codecs == (LinkCodecs(forward="bf16", backward="q8"),)


@pytest.mark.parametrize(
    ("configured", "kept", "carried"),
    [("none", "q8", "none"), ("bf16", "q8", "bf16"), ("q8", "q8", "q8"), ("q4", "q8", "q8"), ("hq4", "bf16", "bf16")],
)
def test_a_step_down_makes_no_link_harsher(configured: str, kept: str, carried: str) -> None:
    (link,) = make_plan(2).links
    plan = replace(make_plan(2), links=(replace(link, forward_codec=configured, backward_codec=configured),))
    for ends in ((0, 1), (1, 0)):
        plan = with_step_downs(plan, [StepDown(source_stage=ends[0], target_stage=ends[1], codec=kept)])
    assert plan.link_codecs == (LinkCodecs(forward=carried, backward=carried),)


def test_no_link_steps_down_to_what_is_no_milder_codec() -> None:
    with pytest.raises(ConfigError, match="'zip' takes no codec's place"):
        StepDown(source_stage=0, target_stage=1, codec="zip")
