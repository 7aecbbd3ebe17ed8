r"""The scalars of a backbone: how its output becomes an estimate of ``x_0``.

A backbone denoises ``u = x_t/alpha_t`` at noise ``q = sigma_t/alpha_t`` as

    D_0(u; q) = c_skip(q) u + c_out(q) F(c_in(q) u, c_noise(q)),

    EDM             s^2/(q^2+s^2)   q s/sqrt(q^2+s^2)    1/sqrt(q^2+s^2)
    epsilon (VP)    1               -q                   1/sqrt(1+q^2)
    v (VP)          1/(1+q^2)       -q/sqrt(1+q^2)       1/sqrt(1+q^2)
    flow            1/(1+q)         -q/(1+q)             1/(1+q)
    x_0             0               1                    1/sqrt(1+q^2)

and what the network is told of the noise is one of

    c_noise(q) = scale f(q) + shift,     f = log (EDM: scale 1/4),  the ratio q itself,  or the schedule's time t(q).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posteriori.schedule import Schedule

Parametrization = Literal["edm", "epsilon", "v", "flow", "x_0"]

__all__ = ["NoiseLabel", "Parametrization", "Scaling"]


@dataclass(frozen=True)
class NoiseLabel:
    """``c_noise(q) = scale f(q) + shift``.

    Attributes:
        kind: ``f``: ``"log"``, ``"ratio"`` (the identity) or ``"time"`` (of ``schedule``).
        scale, shift: DDPM's step number is ``N t - 1``, diffusers' flow label ``1000 t``.
        schedule: for ``"time"``.
    """

    kind: Literal["log", "ratio", "time"] = "log"
    scale: float = 0.25
    shift: float = 0.0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("log", "ratio", "time"):
            raise ValueError(f"unknown noise label {self.kind!r}: choose log, ratio or time")
        if self.kind == "time" and self.schedule is None:
            raise ValueError("a noise label of kind 'time' needs the schedule whose time it is")

    def __call__(self, q: Tensor) -> Tensor:
        if self.kind == "log":
            return self.scale * q.log() + self.shift
        return self.scale * (self.schedule.time(q) if self.kind == "time" and self.schedule else q) + self.shift

    def config(self) -> dict[str, object]:
        """Plain description but for the schedule, which a card states once."""
        return {"kind": self.kind, "scale": self.scale, "shift": self.shift}


@dataclass(frozen=True)
class Scaling:
    """``c_skip, c_out, c_in`` of a parametrisation (table in the module's head), elementwise in ``q``.

    Attributes:
        kind: what the network predicts.
        data_std: ``s``, the standard deviation of the data (EDM's sigma_data).
    """

    kind: Parametrization = "edm"
    data_std: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("edm", "epsilon", "v", "flow", "x_0"):
            raise ValueError(f"unknown parametrization {self.kind!r}: choose edm, epsilon, v, flow or x_0")

    def skip(self, q: Tensor) -> Tensor:
        s = self.data_std
        match self.kind:
            case "edm":
                return s**2 / (q**2 + s**2)
            case "epsilon":
                return torch.ones_like(q)
            case "v":
                return 1 / (1 + q**2)
            case "flow":
                return 1 / (1 + q)
            case _:
                return torch.zeros_like(q)

    def out(self, q: Tensor) -> Tensor:
        s = self.data_std
        match self.kind:
            case "edm":
                return q * s * torch.rsqrt(q**2 + s**2)
            case "epsilon":
                return -q
            case "v":
                return -q * torch.rsqrt(1 + q**2)
            case "flow":
                return -q / (1 + q)
            case _:
                return torch.ones_like(q)

    def input(self, q: Tensor) -> Tensor:
        match self.kind:
            case "edm":
                return torch.rsqrt(q**2 + self.data_std**2)
            case "flow":
                return 1 / (1 + q)
            case _:
                return torch.rsqrt(1 + q**2)

    def skip_prior_std(self, q: Tensor) -> Tensor:
        """``v^(1/2)`` with ``v/(v + q^2) = c_skip(q)``: the Gaussian prior whose estimate from ``x_t`` is the skip."""
        match self.kind:
            case "edm":
                return torch.full_like(q, self.data_std)
            case "epsilon":
                return torch.full_like(q, math.inf)
            case "v":
                return torch.ones_like(q)
            case "flow":
                return q.sqrt()
            case _:
                return torch.zeros_like(q)
