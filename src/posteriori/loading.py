"""Operators of the user, named on the command line as ``module:name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from posteriori.operators import LinearOperator

__all__ = ["OperatorError", "load_operator"]


class OperatorError(ValueError):
    """A name that does not lead to an operator: where it stopped, and what to try."""


def _module(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise OperatorError(f"no file {name}: check the path")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    here = str(Path.cwd())
    if here not in sys.path:  # an installed command does not look where it is started
        sys.path.insert(0, here)
    return importlib.import_module(name)


def load_operator(place: str, shape: Sequence[int] | None = None) -> LinearOperator:
    """An operator by name.

    Args:
        place: ``module:name`` or ``file.py:name``; ``name`` is an operator, or a function (or class) that makes one,
            with the shape ``(C, H, W)`` of an image as its argument, or without arguments.
        shape: passed to a function that takes an argument.

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
    if isinstance(found, LinearOperator):
        return found
    if not callable(found):
        raise OperatorError(f"{place!r} is a {type(found).__name__}: name an operator, or a function that makes one")
    try:
        takes_shape = bool(_required(found))
        if takes_shape and shape is None:
            raise OperatorError(f"{place!r} takes the shape of an image: give --shape 3,64,64")
        operator = found(tuple(shape or ())) if takes_shape else found()
    except OperatorError:
        raise
    except Exception as error:
        raise OperatorError(f"{place!r} fails: {type(error).__name__}: {error}") from None
    if not isinstance(operator, LinearOperator):
        raise OperatorError(
            f"{place!r} returned a {type(operator).__name__}: return an operator, for example "
            "posteriori.operators.Callable(forward, shape=shape)"
        )
    return operator


def _required(function: Any) -> list[str]:
    """Positional parameters without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
