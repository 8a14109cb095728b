"""How loops over weights are compiled for the CPU: by numba, once for a machine where that can be kept. Imports numba, which
takes a while: modules of loops are imported when something is coded, not before.

Loops release the lock of the interpreter, so threads of ours run them side by side. Numbers divide by zero as numpy's do. A
loop calls loops of its own module only: what is kept of it is made anew when its file changes, not when another one does.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Callable
from typing import Any, Final

import numba

Loop = Callable[..., Any]

_AS_WRITTEN: Final = {"nogil": True, "error_model": "numpy"}
# Sums in any order, of finite numbers: what is only compared.
_IN_ANY_ORDER: Final = {**_AS_WRITTEN, "fastmath": {"reassoc", "contract", "nsz", "nnan", "ninf"}}

_FROM_LOOPS: Final = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def loop(function: Loop) -> Loop:
    """Its arithmetic is rounded as it is written, so it makes the same bits everywhere."""
    return _compiled(function, _AS_WRITTEN)


def inner_loop(function: Loop) -> Loop:
    """Without what would be called from Python, it is compiled in half of the time."""
    return _compiled(function, {**_AS_WRITTEN, **_FROM_LOOPS})


def inner_sum_loop(function: Loop) -> Loop:
    """Its sums may be taken in any order, and products in them be rounded once."""
    return _compiled(function, {**_IN_ANY_ORDER, **_FROM_LOOPS})


def _compiled(function: Loop, options: dict[str, Any]) -> Loop:
    try:
        compiled: Loop = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep it in: every process compiles it
        compiled = numba.njit(**options)(function)
    return compiled
