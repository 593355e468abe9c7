"""When a codec does a link harm: what its canaries say, and which milder codec takes its place.

PURE. A canary is one frame that its sender compares with what the receiver makes of it. A direction of a link whose
cosine falls below wire.canary_min_cosine steps down, from the next step on, and stays there; the plan says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from actors.codecs import CODECS
from actors.errors import ConfigError
from actors.spec import CanaryReading, LinkPlan, Plan, StepReport

# What takes the place of a codec that goes bad; the others have nothing milder.
_MILDER = {"hq4": "q8", "hq4-stochastic": "q8", "q4": "q8", "q4-stochastic": "q8", "q8": "bf16"}


@dataclass(frozen=True, kw_only=True)
class StepDown:
    """From one stage to a neighbour, frames are of this codec where the configuration's is a harsher one."""

    source_stage: int
    target_stage: int
    codec: str

    def __post_init__(self) -> None:
        # A checkpoint's manifest brings these back, and anyone may have written it.
        if self.codec not in _MILDER.values():
            raise ConfigError(
                f"{self.codec[:40]!r} takes no codec's place",
                f"a step-down is to one of {', '.join(sorted(set(_MILDER.values())))}",
            )


def readings_of(reports: Sequence[StepReport]) -> tuple[CanaryReading, ...]:
    """Return every stage's canaries of a step, in stage order."""
    return tuple(reading for report in reports for reading in report.canaries)


def judge(readings: Sequence[CanaryReading], plan: Plan, min_cosine: float) -> tuple[tuple[StepDown, str], ...]:
    """Return the step-downs that the readings call for, each with its reason.

    A reading that is not finite calls for none: the guard skips that step. Nor does one of a codec that the plan no
    longer has there.
    """
    verdicts: list[tuple[StepDown, str]] = []
    for reading in readings:
        source, target = reading.source_stage, reading.target_stage
        milder = _MILDER.get(reading.codec)
        if milder is None or not reading.cosine < min_cosine or _codec(plan, source, target) != reading.codec:
            continue
        reason = (
            f"{reading.codec} from stage {source} to {target} gives {milder} its place: cosine {reading.cosine:.3f} is "
            f"below wire.canary_min_cosine={min_cosine:g}, relative error {reading.relative_error:.3f}"
        )
        verdicts.append((StepDown(source_stage=source, target_stage=target, codec=milder), reason))
    return tuple(verdicts)


def with_step_downs(plan: Plan, step_downs: Sequence[StepDown]) -> Plan:
    """Return the plan with the codecs of its links replaced, where milder ones are due.

    A link that the plan does not have is passed over, and so is one that has a codec as mild by now: whoever resumes
    a run with wire.forward=none gets that.
    """
    links = plan.links
    for down in step_downs:
        links = tuple(_replaced(link, down) for link in links)
    return replace(plan, links=links)


def _codec(plan: Plan, source: int, target: int) -> str:
    link = plan.links[min(source, target)]
    return link.forward_codec if source < target else link.backward_codec


def _is_milder(codec: str, harsher: str) -> bool:
    """Return whether one step down after another leads from the harsher codec to this one."""
    milder = _MILDER.get(harsher)
    return milder is not None and (milder == codec or _is_milder(codec, milder))


def _replaced(link: LinkPlan, down: StepDown) -> LinkPlan:
    dtype = torch.float32 if link.raw_frame_bytes == 4 * link.frame_elements else torch.bfloat16
    frame_bytes = CODECS[down.codec].size_bytes(link.frame_elements, dtype)
    ends = down.source_stage, down.target_stage
    if ends == (link.source_stage, link.target_stage) and _is_milder(down.codec, link.forward_codec):
        return replace(link, forward_codec=down.codec, frame_bytes_forward=frame_bytes)
    if ends == (link.target_stage, link.source_stage) and _is_milder(down.codec, link.backward_codec):
        return replace(link, backward_codec=down.codec, frame_bytes_backward=frame_bytes)
    return link
