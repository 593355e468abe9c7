"""How the planner's inner loops are compiled.

Most of them make no arrays, so they need not count references to those they are given, which would take half of the
time of an evaluation; and most are called only by others, so they need no way in from Python, which would take half of
the time to compile them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

_Function = TypeVar("_Function", bound=Callable[..., object])


def inner(function: _Function) -> _Function:
    """Compile a function that makes no arrays and is called by compiled code only."""
    return _compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False)


def outer(function: _Function) -> _Function:
    """Compile a function that makes no arrays and is called from Python."""
    return _compiled(function, no_cfunc_wrapper=True, _nrt=False)


def allocating(function: _Function) -> _Function:
    """Compile a function that makes arrays and is called from Python."""
    return _compiled(function, no_cfunc_wrapper=True)


def _compiled(function: _Function, **options: bool) -> _Function:
    # What is divided by zero is infinite, as in NumPy.
    return cast(_Function, cast(Any, njit)(cache=True, error_model="numpy", **options)(function))
