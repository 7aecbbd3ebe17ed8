"""What a restoration method is, and how one is found by name.

A method is a function ``(posterior, n, nfe, seed, advance) -> Estimate``. To add one, write it in a module of this
package and add a line to :data:`METHODS`; modules are imported when their method is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from posteriori.denoise import ExactPosterior

__all__ = ["METHODS", "Estimate", "Method", "available_methods", "get_method"]

# name -> "module:function". A module may be missing in a build that leaves the method out.
METHODS = {
    "eps": "posteriori.methods.eps:exact_posterior_score",
    "linear": "posteriori.methods.classical:linear",
    "tv": "posteriori.methods.classical:tv",
}


@dataclass(frozen=True)
class Estimate:
    """What a method says about ``x_0``.

    Attributes:
        mmse: ``E[x_0 | y]`` from one evaluation ``(B, *signal)``; ``None`` when the method makes no such estimate.
        point: the method's single answer, when it draws no samples.
        samples: ``(n, B, *signal)``, or ``None``.
        evaluations: of the network, for all ``n`` samples together.
    """

    mmse: Tensor | None = None
    point: Tensor | None = None
    samples: Tensor | None = None
    evaluations: int = 0

    @property
    def mean(self) -> Tensor:
        """Mean of the samples, or the point estimate."""
        if self.samples is not None:
            return self.samples.mean(0)
        assert self.point is not None
        return self.point


class Method(Protocol):
    """A restoration method; ``advance`` is called with the number of network evaluations just spent."""

    def __call__(
        self, posterior: ExactPosterior, n: int, nfe: int, seed: int, advance: Callable[[int], None]
    ) -> Estimate: ...


def available_methods() -> list[str]:
    """Names that :func:`get_method` takes."""
    return [name for name, place in METHODS.items() if find_spec(place.partition(":")[0])]


def get_method(name: str) -> Method:
    """A method by name.

    Raises:
        ValueError: on an unknown name.
    """
    if name not in available_methods():
        raise ValueError(f"unknown method {name!r}: choose {', '.join(available_methods())}")
    module, _, function = METHODS[name].partition(":")
    method: Method = getattr(import_module(module), function)
    return method
