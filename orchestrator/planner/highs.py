"""The solver of linear programs, HiGHS (Huangfu and Hall 2018), on one core and without a word."""

from __future__ import annotations

import highspy


class QuietHighs(highspy.Highs):
    """HiGHS, which prints nothing and takes one thread; each instance holds one program."""

    def __init__(self) -> None:
        super().__init__()
        self.silent()
        self.setOptionValue("threads", 1)

    def enableCallbacks(self) -> None:
        """HiGHS prints its name when they are switched on; none is used."""
