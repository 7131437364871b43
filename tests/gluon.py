"""Gluon functions of scalars as Python functions, for tests that need no GPU."""

import types


def as_python(function, **names):
    """The function behind `@gluon.jit`; `names` are those that it uses of its module."""
    gl = types.SimpleNamespace(minimum=min, maximum=max)
    return types.FunctionType(function.fn.__code__, {"gl": gl, **names})
