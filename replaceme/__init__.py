"""Make a transformer shallower without training it. The doors `prune`, `load_model`, `run`, `compare`, `evaluate`, `export` and `dry_run` open when used."""
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.0.1"

_DOORS = {"prune": "pipeline", "load_model": "models", "run": "doors", "compare": "doors", "evaluate": "doors", "dry_run": "doors",
          "export": "export"}  # by room
__all__ = list(_DOORS)


def _open(name):
    return getattr(import_module(f"{__name__}.{_DOORS[name]}"), name)


def __getattr__(name):
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}") if find_spec(f"{__name__}.{name}") else _open(name)


def __dir__():
    return sorted({*globals(), *_DOORS})


class _Room(ModuleType):
    "A module that has the name of a door: called, it is that door, so that both stand under one name whoever comes first"

    def __call__(self, *args, **keys):
        return _open(self.__name__.rpartition(".")[2])(*args, **keys)


class _House(ModuleType):
    def __setattr__(self, name, value):  # every import of a submodule ends here
        if name in _DOORS and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _House
