"""Casts of weights to bfloat16: made once and kept, where autocast would make them anew for each microbatch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def keeping_casts() -> Iterator[None]:
    """Keep what forwards on this thread cast, from the first one's to the end, which lets go of all.

    Also of what others on this thread keep, who then cast again what they need; and of what an evaluation left before,
    which has no gradient.
    """
    torch.clear_autocast_cache()
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
