"""A seeded stream of draws whose state is an argument, for compiled searches.

PURE. splitmix64 (Steele, Lea and Flood, OOPSLA 2014): one 64-bit word of state, held in an array of one so that
compiled code can advance it.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)


def new_stream(seed: int, index: int) -> NDArray[np.uint64]:
    """Return the state of stream `index` of `seed`: one word, shape (1,)."""
    state = np.array([(seed * 0xD1342543DE82EF95 + index * 0x2545F4914F6CDD1D + 1) & _MASK], dtype=np.uint64)
    for _ in range(2):
        state[0] = draw_word(state)
    return state


@njit(cache=True)
def draw_word(state: NDArray[np.uint64]) -> np.uint64:
    """Return 64 random bits and advance the state."""
    state[0] += _STEP
    word = state[0]
    word = (word ^ (word >> np.uint64(30))) * _FIRST_FACTOR
    word = (word ^ (word >> np.uint64(27))) * _SECOND_FACTOR
    return word ^ (word >> np.uint64(31))


@njit(cache=True)
def draw_share(state: NDArray[np.uint64]) -> float:
    """Return a float of [0, 1), of 53 random bits."""
    return float(draw_word(state) >> np.uint64(11)) * 2.0**-53


@njit(cache=True)
def draw_below(state: NDArray[np.uint64], count: int) -> int:
    """Return an integer of [0, count); its bias, count / 2^53, matters to no search."""
    return int(draw_share(state) * count)


@njit(cache=True)
def shuffle(state: NDArray[np.uint64], values: NDArray[np.int64]) -> None:
    """Put the values into a random order, in place (Fisher and Yates)."""
    for last in range(values.size - 1, 0, -1):
        other = draw_below(state, last + 1)
        values[last], values[other] = values[other], values[last]
