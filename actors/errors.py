"""The one tree of errors: each says what happened, to whom, and what to do next.

An error crosses actor boundaries, so each survives a pickle round trip: all its state is in `args`.
"""

from __future__ import annotations


class IsthmusError(Exception):
    """What happened and to whom, with the remedy: what to type or change next."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}: {self.remedy}" if self.remedy else self.message


class UserError(IsthmusError):
    """Something the user asked for cannot be done as asked; exit code 2."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A key is unknown, of the wrong type, or contradicts another."""


class PlanError(UserError):
    """The model fits no plan on this fleet."""


class ScheduleError(UserError):
    """A schedule leaves work out, does some twice, or has stages wait for each other."""


class DataError(UserError):
    """Training data is missing, unreadable, corrupt, or not for this model."""


class ModelError(UserError):
    """A model folder cannot be read, or holds a model that Isthmus does not run."""


class CheckpointError(UserError):
    """A checkpoint cannot be used, or cannot be used with this configuration."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint's file is missing, torn, or not what its manifest says."""


class CheckpointForeign(CheckpointError):
    """A checkpoint was written by another release of Isthmus, whose manifests have other keys."""


class RunBusy(UserError):
    """Another process is driving the run of this name."""


class FleetError(UserError):
    """The cluster lacks nodes or settings that a run needs."""


class StoreError(IsthmusError):
    """A blob store refused, or did not answer in time."""


class PeerError(IsthmusError):
    """Something went wrong between this node and a named peer."""


class PeerTimeout(PeerError):
    """A named peer sent nothing within the deadline."""


class PeerLost(PeerError):
    """A named peer is gone."""


class FrameError(PeerError):
    """Bytes from a peer are not a frame that this node may take."""


class FrameCorrupt(FrameError):
    """A header or payload fails its checksum, its bounds, or its grammar."""


class FrameUnexpected(FrameError):
    """A well-formed frame that the plan does not foresee: wrong run, shape, kind, codec or sender."""


class GenerationStale(FrameError):
    """A frame or order of a generation that has ended."""


class StepAborted(PeerError):
    """The controller ended this generation while the step ran."""


class StageError(IsthmusError):
    """A stage cannot go on."""


class NonFinite(StageError):
    """Loss or gradients are not finite, step after step."""


class OutOfDeviceMemory(StageError):
    """A stage's device has too little memory for its plan."""


class DiskFull(IsthmusError):
    """A file could not be written because its disk is full."""
