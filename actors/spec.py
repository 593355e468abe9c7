"""What crosses an actor boundary, besides frames: frozen dataclasses that both planes speak.

PURE. Orders go from the controller to a node, reports come back; every one names its run, generation and step, so that
doing it twice is doing it once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Literal

from actors.frame_times import FrameTimes
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from actors.settings import BatchSpec, DataConfig, TimeoutConfig


class Kind(IntEnum):
    """What a frame holds."""

    ACTIVATION = 1
    GRADIENT = 2
    EVAL_ACTIVATION = 3


class TensorRole(Enum):
    """What a tensor is for; a codec says which roles it suits."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"
    PSEUDO_GRADIENT = "pseudo_gradient"
    WEIGHT = "weight"


# Three of a fixed order, two that go by what arrives (actors.dispatch), one of several stages a node (interleaved).
ScheduleName = Literal["gpipe", "1f1b", "zb-h1", "bdp", "bdp-split", "interleaved"]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage: which layers, on which node, and what the planner expects of it."""

    stage: int
    node: str
    # Layers [layer_start, layer_stop); stage 0 adds the embedding, the last stage the norm and head.
    layer_start: int
    layer_stop: int
    memory_bytes: int
    memory_limit_bytes: int
    compute_s: float
    # Further nodes with the same layers; microbatches of a step that each takes; the most that one keeps in flight.
    others: tuple[str, ...] = ()
    shares: tuple[int, ...] = ()
    in_flight: int = 0
    # Why this node has these layers, in words.
    why: str = ""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node that holds this stage."""
        return (self.node, *self.others)


@dataclass(frozen=True, kw_only=True)
class LinkPlan:
    """The link from one stage to the next: its codecs and chunking."""

    source_stage: int
    target_stage: int
    forward_codec: str
    backward_codec: str
    # One microbatch's boundary tensor: its elements, and its bytes before the codec.
    frame_elements: int
    raw_frame_bytes: int
    frame_bytes_forward: int
    frame_bytes_backward: int
    delay_s: float
    rate_mbps: float
    chunk_bytes: int
    window_bytes: int


@dataclass(frozen=True, kw_only=True)
class LinkCodecs:
    """What frames of one link, from a stage to the next and back, are encoded with."""

    forward: str
    backward: str


@dataclass(frozen=True, kw_only=True)
class LinkSizes:
    """How frames of one link are cut, and how much of them may be under way to one end."""

    chunk_bytes: int
    window_bytes: int


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another plan, to compare with: why it is shown, and what it is expected to do."""

    name: str
    step_s: float
    tokens_per_s: float
    dollars_per_mtoken: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who runs what: the planner's answer, saved as plan.json."""

    stages: tuple[StagePlan, ...]
    links: tuple[LinkPlan, ...]
    schedule: ScheduleName
    step_s: float
    even_step_s: float
    tokens_per_s: float
    dollars_per_hour: float
    dollars_per_mtoken: float
    # What sets the step time: "stage 2 (node-1)" or "link 0 -> 1".
    binds: str
    # How a step's sequences are cut; 0 in plans of before there was a choice.
    microbatch_size: int = 0
    num_microbatches: int = 0
    # No plan for this fleet is faster once its pipeline is full: certified. NaN where that was not asked for.
    bound_tokens_per_s: float = math.nan
    # By which share its codecs raise the held-out loss, as measured on a small model; NaN where they were not.
    loss_share: float = math.nan
    # What a step adds to its steady pace: filling the pipeline, replicas' exchange, the commit's round trip.
    fill_s: float = 0.0
    sync_s: float = 0.0
    commit_s: float = 0.0
    alternatives: tuple[Alternative, ...] = ()
    # What would help most, in words, best first.
    advice: tuple[str, ...] = ()

    @property
    def num_nodes(self) -> int:
        """After how many stages the first's node holds another; interleaved, fewer than there are stages."""
        return next((s.stage for s in self.stages[1:] if s.node == self.stages[0].node), len(self.stages))

    @property
    def link_codecs(self) -> tuple[LinkCodecs, ...]:
        """What each link carries, in order."""
        return tuple(LinkCodecs(forward=link.forward_codec, backward=link.backward_codec) for link in self.links)

    @property
    def link_sizes(self) -> tuple[LinkSizes, ...]:
        """How each link's frames are cut, in order."""
        return tuple(LinkSizes(chunk_bytes=link.chunk_bytes, window_bytes=link.window_bytes) for link in self.links)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """How many microbatches each stage keeps in flight, in order."""
        return tuple(stage.in_flight for stage in self.stages)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Everything a node needs to become one stage of a run."""

    run: str
    generation: int
    plan: Plan
    stage: int
    # The actor name of each stage's node, in stage order.
    peers: tuple[str, ...]
    model: ModelSpec
    batch: BatchSpec
    optim: OptimConfig
    timeouts: TimeoutConfig
    data: DataConfig
    # Of the data's manifest, as the controller reads it: every node must read the same tokens.
    data_sha256: str
    seed: int
    activation_checkpointing: bool
    # Steps from one frame that is compared with its raw tensor to the next; 0: none.
    canary_every: int

    @property
    def num_stages(self) -> int:
        return len(self.plan.stages)

    @property
    def own(self) -> StagePlan:
        return self.plan.stages[self.stage]

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The one decision about a finished step: apply its gradients, scaled, or drop them."""

    step: int
    lr: float
    clip_scale: float
    skip: bool = False


# How a checkpoint's files are written: `none` is safetensors, which everyone reads; `lx` is smaller, without loss.
CheckpointCodec = Literal["none", "lx"]


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    """One file of a checkpoint: its name under the checkpoint, its size and its hash."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CheckpointRef:
    """A whole checkpoint: where it lies and which files it has."""

    store_url: str
    checkpoint: str
    files: tuple[SavedFile, ...]


@dataclass(frozen=True, kw_only=True)
class LoadOrder:
    """Take the weights of version `step`: from a checkpoint, else from model.init_from, else drawn from the seed."""

    run: str
    generation: int
    step: int
    checkpoint: CheckpointRef | None = None


@dataclass(frozen=True, kw_only=True)
class SaveOrder:
    """Write the weights as they are after the commit."""

    store_url: str
    checkpoint: str
    codec: CheckpointCodec


@dataclass(frozen=True, kw_only=True)
class StoreProbe:
    """See whether the store at this URL is the one in which the driver just wrote `key`, and may be written."""

    store_url: str
    key: str


@dataclass(frozen=True, kw_only=True)
class StepOrder:
    """Commit the step before, save if asked, then run this step: one message, one round trip."""

    run: str
    generation: int
    step: int
    # None where there is nothing to commit: the first step after a start or a resume.
    commit: Commit | None
    save: SaveOrder | None = None
    # Of each link from this step on, how its frames are cut, and what each stage keeps in flight; None: as before.
    codecs: tuple[LinkCodecs, ...] | None = None
    link_sizes: tuple[LinkSizes, ...] | None = None
    in_flight: tuple[int, ...] | None = None
    # False: commit and save only; the run ends or pauses here.
    run_step: bool = True


@dataclass(frozen=True, kw_only=True)
class EvalOrder:
    """Run `num_microbatches` of the held-out split forward, without gradients."""

    run: str
    generation: int
    step: int
    num_microbatches: int


# Names of actions: what the device does, and what the host waits for.
COMPUTES, WAITS = ("F", "B", "W", "C"), ("wF", "wB")


@dataclass(frozen=True, kw_only=True)
class ActionTime:
    """One thing that a stage did, in seconds from the step's start on that node."""

    # "F", "B" or its halves "B" and "W": compute; "wF", "wB": waiting for a frame; "C": commit; "S": replicas exchange
    # gradients, so far only simulated. On CUDA compute is timed on the device: a wait may overlap with it.
    name: str
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class LinkCount:
    """What one stage sent to a peer in a step."""

    source_stage: int
    target_stage: int
    kind: Kind
    num_frames: int
    raw_bytes: int
    wire_bytes: int


@dataclass(frozen=True, kw_only=True)
class LinkReading:
    """What a link from one stage to another was seen to do: see actors.link_meter."""

    source_stage: int
    target_stage: int
    # The link's rate where `is_measured`: chunks of it waited for one another; else the rate is this at least.
    rate_mbps: float
    is_measured: bool
    # One way; at most this where the rate is not measured; NaN where it is lost beside the rate.
    delay_s: float
    # What was acknowledged meanwhile.
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class CanaryReading:
    """One frame compared, by its sender, with what the receiver makes of it."""

    source_stage: int
    target_stage: int
    kind: Kind
    step: int
    codec: str
    # L2 norm of the difference over that of the raw tensor; both NaN where that was not finite.
    relative_error: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What one stage wrote of one checkpoint, or why it could not."""

    stage: int
    checkpoint: str
    files: tuple[SavedFile, ...]
    seconds: float
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one stage says when its part of a step is done."""

    run: str
    generation: int
    step: int
    stage: int
    # False where the order was to commit or save only.
    ran_step: bool
    # Sums over target tokens; from the last stage only, else 0.
    loss_sum: float
    num_targets: int
    # Squared gradient norm of each parameter, by global name, in the model's own order.
    grad_sq: tuple[tuple[str, float], ...]
    # The first microbatch whose output or loss was not finite, or -1.
    nonfinite_microbatch: int
    compute_s: float
    wait_s: float
    step_s: float
    actions: tuple[ActionTime, ...]
    links: tuple[LinkCount, ...]
    canaries: tuple[CanaryReading, ...]
    saves: tuple[SaveReport, ...]
    # Of the device, since the step began; on CPU the process's resident peak.
    peak_memory_bytes: int
    # The same over the idle process; on CPU what is resident beyond what was before the stage was built.
    held_bytes: int = 0
    # When frames of this step were made, sent, held up and read; compute and waits are in `actions`.
    frames: FrameTimes = field(default_factory=FrameTimes)
    # Of the step before, from its own start: frames that were still on their way when this stage reported it.
    late_frames: FrameTimes = field(default_factory=FrameTimes)
    # Of the links that this stage sends on, where anything was acknowledged since its report before.
    readings: tuple[LinkReading, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """The held-out loss, from the last stage; zeros from the others."""

    run: str
    generation: int
    step: int
    stage: int
    loss_sum: float
    num_targets: int
