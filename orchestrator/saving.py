"""Checkpoints of a running job: ordered with a step, written by the stages meanwhile, made whole by the manifest.

order -> stages write in the background -> collect their reports -> manifest -> retention
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from actors.errors import CheckpointError, DiskFull, IsthmusError, StoreError
from actors.spec import CheckpointCodec, SaveOrder, SaveReport
from orchestrator.checkpoints import CheckpointLedger, Manifest, PendingSaves, checkpoint_name


@dataclass(frozen=True)
class _UnderWay:
    """A checkpoint whose stages have not all reported; `draft` makes its manifest once they have."""

    step: int
    pending: PendingSaves
    draft: Callable[..., Manifest]


@dataclass
class Saving:
    """The saves under way, oldest first; `tell(step, name, text)` hears what became of each."""

    ledger: CheckpointLedger
    keep: int
    codec: CheckpointCodec
    tell: Callable[[int, str, str], None]
    newest_step: int = -1
    # Why the last save that failed did.
    last_failure: str = ""
    _under_way: list[_UnderWay] = field(default_factory=list[_UnderWay])

    def order(self, step: int, draft: Callable[..., Manifest], num_stages: int) -> SaveOrder | None:
        """Begin a checkpoint; `draft(files=...)` is its manifest. None where the store is away."""
        try:
            # One of the same step may be there that proved bad: it must not look whole while its files change.
            if step in self.ledger.steps_newest_first():
                self.ledger.delete(step)
        except StoreError as error:
            self._fail(step, _one_line(error))
            return None
        # A step that is run again orders its checkpoint again.
        self._under_way = [save for save in self._under_way if save.step != step]
        checkpoint = checkpoint_name(step)
        pending = PendingSaves(checkpoint=checkpoint, num_stages=num_stages)
        self._under_way.append(_UnderWay(step, pending, draft))
        return SaveOrder(store_url=self.ledger.store.url, checkpoint=checkpoint, codec=self.codec)

    def collect(self, reports: Sequence[SaveReport]) -> bool:
        """Take stages' reports; return whether a checkpoint has become whole."""
        before = self.newest_step
        still: list[_UnderWay] = []
        for save in self._under_way:
            for report in reports:
                # Each stage's first report counts: written twice, its files are the same files.
                if report.stage in save.pending.missing_stages:
                    save = replace(save, pending=save.pending.add(report))
            if not save.pending.is_settled:
                still.append(save)
            elif save.pending.failure:
                self._fail(save.step, save.pending.failure)
            else:
                self._make_whole(save)
        self._under_way = still
        return self.newest_step > before

    def forget(self) -> None:
        """Drop the saves under way: their stages were placed anew."""
        self._under_way.clear()

    def _fail(self, step: int, why: str) -> None:
        self.last_failure = why
        self.tell(step, "save_failed", why)

    def _make_whole(self, save: _UnderWay) -> None:
        try:
            self.ledger.commit(save.draft(files=save.pending.files))
        except (StoreError, DiskFull, CheckpointError) as error:
            self._fail(save.step, _one_line(error))
            return
        self.newest_step = save.step
        self.tell(save.step, "saved", f"{save.pending.checkpoint} in {self.ledger.store.url}")
        try:
            self.ledger.retain(self.keep)
        except StoreError as error:
            self.tell(save.step, "warned", f"older checkpoints stay: {_one_line(error)}")


def _one_line(error: IsthmusError) -> str:
    return " ".join(str(error).split())
