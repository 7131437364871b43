"""The models of the zoo: how each is built, and how many attentions one call of it has."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from fa3_inductor import Reason

# Module of this package -> what has to be installed for it.
FAMILIES = {
    "handwritten": "torch",
    "of_torch": "torch",
    "of_transformers": "transformers",
    "of_transformers_media": "transformers",
    "of_timm": "timm",
    "of_x_transformers": "x_transformers",
    "of_diffusers": "diffusers",
}


MODES = ("inference", "training")


@dataclasses.dataclass(frozen=True)
class Call:
    """A module and the arguments of one call of it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(module: nn.Module, *args: Any, **kwargs: Any) -> Call:
    return Call(module, args, kwargs)


@dataclasses.dataclass(frozen=True)
class Model:
    """``attentions`` counts the softmax attentions of one call, whether they can be fused or not: 0 says that there is
    nothing to fuse, None that nobody has counted. ``trains``: whether it is run in training too.

    ``fused`` is how many of them should be fused (None: all), and ``reason`` what the pass says about the others (None:
    nothing, it does not see them).
    The limits of the errors are multiplied by ``tolerance``; ``random`` says that the result is drawn at random, so
    that there is nothing to compare.
    """

    name: str
    build: Callable[[], Call]
    attentions: int | None
    trains: bool = True
    fused: int | None = None
    reason: Reason | None = None
    tolerance: float = 1.0
    random: bool = False

    @property
    def to_fuse(self) -> int | None:
        """How many attentions should be fused."""
        return self.attentions if self.fused is None else self.fused

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.trains else MODES[:1]


_models: dict[str, Model] = {}


def register(name: str, attentions: int | None, **options: Any) -> Callable:
    """Adds the decorated function to the zoo; it takes nothing and returns a :class:`Call`. ``options`` are the other
    fields of :class:`Model`."""

    def add(build: Callable[[], Call]) -> Callable[[], Call]:
        assert name not in _models, f"two models are called {name}"
        _models[name] = Model(name, build, attentions, **options)
        return build

    return add


def load(family: str) -> None:
    """Imports a family's package and registers its models; raises what the package raises."""
    importlib.import_module(FAMILIES[family])
    importlib.import_module(f"{__package__}.{family}")


def find(name: str) -> Model:
    """A model of a family that is loaded."""
    return _models[name]


def models() -> tuple[list[Model], dict[str, str]]:
    """Every model whose package is installed; and, for each family left out, why."""
    missing = {}
    for family in FAMILIES:
        try:
            load(family)
        except Exception as error:  # not installed, or something that it needs is not
            missing[family] = f"{type(error).__name__}: {error}"
    return list(_models.values()), missing
