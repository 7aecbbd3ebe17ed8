"""Posterior sampling for linear inverse problems ``y = A x_0 + noise`` with the exact posterior score.

    import posteriori as po

    denoiser = po.load("photo")
    posterior = po.ExactPosterior(denoiser, A, y, sigma_y=0.05)
    mean = posterior.mean()                          # E[x_0 | y], one network evaluation (two of "photo")
    samples = po.sample(posterior, n=8, nfe=20, seed=0)

The names below are loaded when they are first used: ``import posteriori`` costs milliseconds, torch seconds.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from posteriori._version import __version__

if TYPE_CHECKING:
    from posteriori import adapters, backbones, noise, operators, priors
    from posteriori.checkpoint import load, save
    from posteriori.denoise import Denoiser, NetworkDenoiser, Posterior
    from posteriori.images import read_image, write_image
    from posteriori.noise_level import estimate_sigma_y
    from posteriori.pivot import linear_estimate, measure, pivot, sample_pivot
    from posteriori.posterior import ExactPosterior
    from posteriori.sample import sample
    from posteriori.schedule import VE, VP, CosineVP, DiscreteVP, RectifiedFlow, Schedule

__all__ = [
    "VE",
    "VP",
    "CosineVP",
    "Denoiser",
    "DiscreteVP",
    "ExactPosterior",
    "NetworkDenoiser",
    "Posterior",
    "RectifiedFlow",
    "Schedule",
    "__version__",
    "adapters",
    "backbones",
    "estimate_sigma_y",
    "linear_estimate",
    "load",
    "measure",
    "noise",
    "operators",
    "pivot",
    "priors",
    "read_image",
    "sample",
    "sample_pivot",
    "save",
    "write_image",
]

_SUBMODULES = frozenset({"adapters", "backbones", "noise", "operators", "priors"})
_HOME = {
    "VE": "schedule",
    "VP": "schedule",
    "CosineVP": "schedule",
    "DiscreteVP": "schedule",
    "RectifiedFlow": "schedule",
    "Schedule": "schedule",
    "estimate_sigma_y": "noise_level",
    "linear_estimate": "pivot",
    "read_image": "images",
    "write_image": "images",
    "measure": "pivot",
    "pivot": "pivot",
    "sample_pivot": "pivot",
    "Denoiser": "denoise",
    "ExactPosterior": "posterior",
    "NetworkDenoiser": "denoise",
    "Posterior": "denoise",
    "sample": "sample",
    "load": "checkpoint",
    "save": "checkpoint",
}


class _Package(ModuleType):
    """``posteriori.pivot`` and ``posteriori.sample`` are functions, each in a module of its own name.

    The import system binds a submodule to its package once it has loaded it, whoever asked for it, which would
    replace the function. Here it binds the function instead. The module stays reachable as every module is:
    ``from posteriori.pivot import ...``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
