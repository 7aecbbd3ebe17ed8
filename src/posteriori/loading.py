"""Operators of the user, named on the command line as ``module:name`` or ``path/to/file.py:name``.

The name may be an operator of ours, of scipy, pylops or deepinv, a matrix, an object with ``forward`` and ``adjoint``,
or a class or function that makes one of them, from the shape of a signal or from nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from posteriori.adapters import as_operator
from posteriori.operators import Callable, LinearOperator

__all__ = ["OperatorError", "load_operator"]


class OperatorError(ValueError):
    """A name that does not lead to an operator: where it stopped, and what to try."""


def _module(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise OperatorError(f"no file {name}: check the path")
        _look_in(path.resolve().parent)  # for what stands beside it
        # under a name of its own, and registered: dataclasses look their module up
        spec = importlib.util.spec_from_file_location(f"_operator_file_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        return module
    _look_in(Path.cwd())  # an installed command does not look where it is started
    return importlib.import_module(name)


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def load_operator(place: str, shape: Sequence[int] | None = None) -> LinearOperator:
    """An operator by name.

    Args:
        place: ``module:name`` or ``file.py:name``; ``name`` is an operator (see the module's head), or a function or
            class that makes one, with the shape ``(C, H, W)`` of an image as its argument, or without arguments.
        shape: passed to a function that takes an argument, and to operators that do not know theirs.

    Raises:
        OperatorError: when there is no such operator.
    """
    module_name, separator, name = place.rpartition(":")
    if not separator or not module_name or not name:
        raise OperatorError(f"{place!r} is not module:function: write for example blur.py:make_operator")
    try:
        found: Any = _module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except OperatorError:
        raise
    except ModuleNotFoundError as error:
        raise OperatorError(f"no module {error.name!r} for {place!r}: run where it is, or give its file.py") from None
    except AttributeError as error:
        raise OperatorError(f"{place!r}: {error}") from None
    except Exception as error:  # whatever the user's file does when it is imported
        raise OperatorError(f"{module_name} fails when imported: {type(error).__name__}: {error}") from None
    if (known := _convert(found, shape, place)) is not None:
        return known
    if not callable(found):
        raise OperatorError(f"{place!r} is a {type(found).__name__}: name an operator, or a function that makes one")
    try:
        takes_shape = bool(_required(found))
        if takes_shape and shape is None:
            raise OperatorError(f"{place!r} takes the shape of an image: give --shape 3,64,64")
        made = found(tuple(shape or ())) if takes_shape else found()
    except OperatorError:
        raise
    except Exception as error:
        raise OperatorError(f"{place!r} fails: {type(error).__name__}: {error}") from None
    operator = _convert(made, shape, place)
    if operator is None:
        raise OperatorError(
            f"{place!r} returned a {type(made).__name__}: return an operator, for example "
            "posteriori.operators.Callable(forward, shape=shape)"
        )
    return operator


def _convert(thing: Any, shape: Sequence[int] | None, place: str) -> LinearOperator | None:
    """An operator from what was named or made; ``None`` when it is something else, a function or class perhaps."""
    if inspect.isclass(thing) or inspect.isroutine(thing):
        return None
    try:
        operator = as_operator(thing, shape)
        if operator is None and callable(getattr(thing, "forward", None)):
            if shape is None:
                raise ValueError("the shape of its signals is missing: give --shape 3,64,64")
            operator = Callable(thing.forward, getattr(thing, "adjoint", None), shape=shape)
    except Exception as error:  # a shape that does not fit, a library that is not installed
        raise OperatorError(f"{place!r}: {error}") from None
    return operator


def _required(function: Any) -> list[str]:
    """Positional parameters without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
