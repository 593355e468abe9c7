"""Where compiled kernels are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $ISTHMUS_CACHE, or else ~/.cache/isthmus/kernels; it need not exist."""
    return Path(os.environ.get("ISTHMUS_CACHE") or "~/.cache/isthmus/kernels").expanduser()
