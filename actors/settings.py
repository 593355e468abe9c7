"""What a user sets of the data plane: the batch, the wire, the deadlines, the data.

PURE. Part of a run's configuration, and of what crosses to each node.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from actors.errors import ConfigError

# A mailbox refuses a frame cut into smaller chunks: the headers, and the work on them, would outgrow the payload.
MIN_CHUNK_BYTES = 1024
# Ray inlines a call's arguments up to 4 MiB; a larger chunk would go through its object store, with more round trips.
MAX_CHUNK_BYTES = 4_000_000
_LINK = re.compile("(0|[1-9][0-9]{0,3})-([1-9][0-9]{0,3})")


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """The tokens of one step: `num_microbatches` microbatches of `microbatch_size` sequences each."""

    seq_len: int = 256
    microbatch_size: int = 8
    num_microbatches: int = 8

    def __post_init__(self) -> None:
        for key in ("seq_len", "microbatch_size", "num_microbatches"):
            if getattr(self, key) < 1:
                raise ConfigError(f"batch.{key} is {getattr(self, key)}", f"set batch.{key} to 1 or more")

    @property
    def microbatch_tokens(self) -> int:
        return self.seq_len * self.microbatch_size

    @property
    def step_tokens(self) -> int:
        return self.microbatch_tokens * self.num_microbatches


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """How boundary tensors travel between stages."""

    # What costs what in learning: docs/quality.md. Forward hq4 loses 3% and more, q8 both ways nothing that shows.
    forward: str = "q8"
    backward: str = "q8"
    # Of single links: "0-1": "q8/hq4-stochastic" is stage 0's forward and stage 1's backward codec. A link that the
    # plan does not have, as when a node was lost, is passed over.
    links: dict[str, str] = field(default_factory=dict[str, str])
    # Codecs that a link may carry instead, forward/backward, mildest first: it does where that makes the step shorter
    # by more than plan.noise, as when the link turns thin in mid-run. Empty: links keep what is set, whatever they do,
    # for smaller codecs cost quality. Where plan.quality_budget is set, that decides.
    thin: tuple[str, ...] = ()
    # Steps from one canary, a frame that its sender compares with what the receiver makes of it, to the next; 0: none.
    canary_every: int = 50
    # A codec whose canary has a lower cosine gives a milder one its place.
    canary_min_cosine: float = 0.9
    # A chunk of a frame takes about this long on its link: short enough that chunks of other frames get through.
    chunk_s: float = 0.1
    min_chunk_bytes: int = 65_536
    max_chunk_bytes: int = 1_048_576
    # What may be under way to one peer, in seconds of the link and in bytes at most.
    window_s: float = 1.0
    max_window_bytes: int = 16_777_216

    def __post_init__(self) -> None:
        if self.canary_every < 0 or not 0 <= self.canary_min_cosine <= 1:
            raise ConfigError(
                f"wire.canary_every={self.canary_every} or wire.canary_min_cosine={self.canary_min_cosine} cannot be",
                "set wire.canary_every to 0 or more and wire.canary_min_cosine between 0 and 1",
            )
        for link, codecs in self.links.items():
            ends = _LINK.fullmatch(link)
            if ends is None or int(ends[2]) != int(ends[1]) + 1 or codecs.count("/") != 1:
                raise ConfigError(
                    f"wire.links.{link}={codecs} names no link and its codecs",
                    "write it as wire.links.0-1=hq4/q8: the two stages, then forward/backward",
                )
        for codecs in self.thin:
            if codecs.count("/") != 1:
                raise ConfigError(
                    f"wire.thin has {codecs}, which is no pair of codecs",
                    "write it as wire.thin=[q8/hq4-stochastic]: forward/backward, the mildest first",
                )
        if not MIN_CHUNK_BYTES <= self.min_chunk_bytes <= self.max_chunk_bytes <= self.max_window_bytes:
            raise ConfigError(
                "wire.min_chunk_bytes, wire.max_chunk_bytes and wire.max_window_bytes do not nest",
                f"set {MIN_CHUNK_BYTES} <= wire.min_chunk_bytes <= wire.max_chunk_bytes <= wire.max_window_bytes",
            )
        if self.max_chunk_bytes > MAX_CHUNK_BYTES:
            raise ConfigError(
                f"wire.max_chunk_bytes={self.max_chunk_bytes} does not fit in one call",
                f"set wire.max_chunk_bytes to {MAX_CHUNK_BYTES} or less",
            )

    @property
    def thin_pairs(self) -> tuple[tuple[str, str], ...]:
        """What links may carry instead, forward and backward."""
        return tuple((forward, backward) for forward, _, backward in (codecs.partition("/") for codecs in self.thin))

    def codecs_of(self, stage: int) -> tuple[str, str]:
        """Return the forward and backward codec of the link from `stage` to the next."""
        own = self.links.get(f"{stage}-{stage + 1}")
        if own is None:
            return self.forward, self.backward
        forward, _, backward = own.partition("/")
        return forward, backward


@dataclass(frozen=True, kw_only=True)
class TimeoutConfig:
    """Every deadline of a run, nested: an ack within a frame, a frame within a step."""

    # A chunk's acknowledgement.
    ack_s: float = 30.0
    # A stage's wait for one frame of a peer.
    frame_s: float = 120.0
    # One step of all stages.
    step_s: float = 600.0
    # Actors placed and answering.
    place_s: float = 120.0
    # Weights loaded, or a checkpoint written.
    transfer_s: float = 1800.0

    def __post_init__(self) -> None:
        if not 0 < self.ack_s < self.frame_s < self.step_s:
            raise ConfigError(
                f"timeouts do not nest: ack_s={self.ack_s}, frame_s={self.frame_s}, step_s={self.step_s}",
                "set timeouts.ack_s < timeouts.frame_s < timeouts.step_s",
            )
        if self.place_s <= 0 or self.transfer_s <= 0:
            raise ConfigError("a timeout is not above 0", "set timeouts.place_s and timeouts.transfer_s above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the token shards lie, as `isthmus data prepare` wrote them."""

    # A folder, or s3://bucket/prefix; each node that reads tokens must reach it.
    path: str = "data/demo"
    # Attention does not cross document borders, and the first token of the next document is not a target.
    document_mask: bool = True
    # Where shards of a remote path are kept on each node.
    cache: str = "~/.cache/isthmus"
