"""numba where it is installed (the extra `fast`): plain loops become machine code, cached on disk."""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any


@functools.cache
def available() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code that runs without the interpreter's lock."""
    import numba

    # unwrap: what checks the types in the tests is no function that numba could read.
    kernel: Callable[..., Any] = numba.njit(cache=True, nogil=True)(inspect.unwrap(function))
    return kernel
