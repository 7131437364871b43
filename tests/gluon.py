"""Gluon functions of scalars as Python functions, for tests that need no GPU."""

import types


def as_python(function):
    """The function behind `@gluon.jit`."""
    gl = types.SimpleNamespace(minimum=min, maximum=max)
    return types.FunctionType(function.fn.__code__, {"gl": gl})
