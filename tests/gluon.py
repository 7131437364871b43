"""Gluon functions of scalars as Python functions, for tests that need no GPU."""

import types


def as_python(function, program_id: int = 0):
    """The function behind `@gluon.jit`, for a program of that number."""
    gl = types.SimpleNamespace(minimum=min, maximum=max, program_id=lambda axis: program_id)
    return types.FunctionType(function.fn.__code__, {"gl": gl})
