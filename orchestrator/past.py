"""What a run goes on from: the newest checkpoint that can be used, in a store that all nodes share."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from actors.errors import CheckpointError
from actors.settings import BatchSpec
from actors.spec import CheckpointRef, LoadOrder, StoreProbe
from actors.store import BlobStore
from orchestrator.checkpoints import CheckpointLedger, Manifest, require_compatible
from orchestrator.config import RunConfig
from orchestrator.fleet import Crew


@dataclass
class Past:
    """The checkpoints that a run may go on from, and which of them is the newest to use."""

    config: RunConfig
    ledger: CheckpointLedger
    data_sha256: str
    newest: Manifest | None = None
    # What was found bad, until someone has told it.
    bad: list[str] = field(default_factory=list[str])

    def find_newest(self, below: int | None = None) -> None:
        """Look for the newest whole checkpoint.

        CheckpointError where it cannot be continued as configured, or where there are some and none can be used: a run
        never starts over by itself.
        """
        self.newest = self.ledger.newest_whole(
            lambda checkpoint, error: self.bad.append(f"{checkpoint}: {error}"), below
        )
        if self.newest is None and self.bad:
            raise CheckpointError(
                f"run {self.config.name} has checkpoints in {self.ledger.store.url}, but none that can be used: "
                f"{self.bad[-1]}",
                "restore them from a copy, or delete that folder (or pick another name=) to start from the beginning",
            )
        if self.newest is not None:
            config, batch = self.config, self.config.batch
            if config.plan.microbatch_sizes is not None and _same_step(self.newest.batch, batch):
                # The planner chose it when the run began.
                batch = self.newest.batch
            require_compatible(
                self.newest,
                model=config.model,
                batch=batch,
                data_sha256=self.data_sha256,
                document_mask=config.data.document_mask,
                seed=config.seed,
            )

    def load_order(self, generation: int) -> LoadOrder:
        """Return the order to load the newest checkpoint, or to start from the beginning."""
        newest = self.newest
        if newest is None:
            return LoadOrder(run=self.config.name, generation=generation, step=0)
        ref = CheckpointRef(store_url=self.ledger.store.url, checkpoint=newest.checkpoint, files=newest.files)
        return LoadOrder(run=self.config.name, generation=generation, step=newest.step, checkpoint=ref)


def _same_step(batch: BatchSpec, other: BatchSpec) -> bool:
    return batch.step_tokens == other.step_tokens and batch.seq_len == other.seq_len


def require_shared_store(store: BlobStore, crew: Crew, timeout_s: float) -> None:
    """Raise StoreError where a node does not see the checkpoints of the others, before a step is spent."""
    key = f"seen-by-all-{secrets.token_hex(4)}"
    store.put(key, b"")
    try:
        probe = StoreProbe(store_url=store.url, key=key)
        crew.call(crew.nodes, "require_store", [probe] * len(crew.nodes), timeout_s)
    finally:
        store.delete(key)
