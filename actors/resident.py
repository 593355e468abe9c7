"""What a process holds in memory over what it held when idle, as the system counts it: for devices without a count.

On Linux; elsewhere, and where the system does not say, 0.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# As the kernel has it (man 5 proc): the peak starts anew from what is resident now.
_RESET_PEAK = "5"


class ResidentMemory:
    """Resident memory of this process from now on: what is there now counts as idle."""

    def __init__(self) -> None:
        """Give freed memory back to the system, so that what comes is not hidden in it, and begin."""
        # glibc keeps what was freed; another C library has no such call, and Windows no such library.
        with suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            _CLEAR_REFS.write_text(_RESET_PEAK)
        self._idle_bytes = _status_bytes("RssAnon")

    def peak_bytes(self) -> int:
        """Return the most that was resident since, less what was idle; program code and shared files do not count."""
        mapped_bytes = _status_bytes("RssFile") + _status_bytes("RssShmem")
        return max(0, _status_bytes("VmHWM") - mapped_bytes - self._idle_bytes)


def _status_bytes(key: str) -> int:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0
