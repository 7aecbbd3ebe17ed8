r"""Noise schedules: the interpolant every other module speaks of.

    x_t = alpha_t x_0 + sigma_t noise,    noise ~ N(0, I)                (EPS paper, section 2)

A schedule is the pair of functions ``(alpha_t, sigma_t)`` of time ``t``, which grows with the noise.
Dividing by ``alpha_t`` shows the only quantity that matters, the noise-to-signal ratio

    q_t = sigma_t / alpha_t,    u = x_t / alpha_t = x_0 + q_t noise,

a strictly increasing function of ``t``; ``time(q)`` is its inverse. Five interpolants:

    VE (EDM)         alpha = 1                     sigma = t
    VP (linear)      alpha = exp(-B(t)/2)          sigma = sqrt(1 - alpha^2)
    VP (cosine)      alpha = cos(c t) up to scale  sigma = sqrt(1 - alpha^2)
    VP (discrete)    alpha from a model's table    sigma = sqrt(1 - alpha^2)
    rectified flow   alpha = 1 - t                 sigma = t

with ``B(t) = beta_min t + (beta_max - beta_min) t^2 / 2``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["karras", "log", "uniform"]

__all__ = ["VE", "VP", "CosineVP", "DiscreteVP", "RectifiedFlow", "Schedule", "schedule_from_config"]


@dataclass(frozen=True)
class Schedule(ABC):
    """``(alpha_t, sigma_t)`` of an interpolant, its inverse and its default time grids."""

    @property
    @abstractmethod
    def t_min(self) -> float:
        """Smallest time at which a denoiser is evaluated (the grid then steps to noise 0)."""

    @property
    @abstractmethod
    def t_max(self) -> float:
        """Largest time: where sampling starts."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at times ``t`` (any shape)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise standard deviation at times ``t`` (any shape)."""

    @abstractmethod
    def time(self, q: Tensor) -> Tensor:
        """Time at which ``sigma_t / alpha_t`` equals ``q`` (any shape): the inverse of :meth:`ratio`."""

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio ``q_t = sigma_t / alpha_t``."""
        return self.sigma(t) / self.alpha(t)

    def grid(self, steps: int, spacing: Spacing = "karras", rho: float = 7.0) -> Tensor:
        """Decreasing times ``t_0 = t_max > ... > t_steps = 0`` (float64, shape ``(steps + 1,)``).

        The last time carries no noise in any of the interpolants; the one before it is ``t_min``
        when ``steps > 1``.

        Args:
            steps: number of steps, at least 1.
            spacing: ``"karras"`` is uniform in ``q^(1/rho)`` (Karras et al. 2022, eq. 5), ``"log"`` uniform in
                ``log q`` (log-SNR), ``"uniform"`` uniform in ``t``.
            rho: exponent of ``"karras"``.

        Raises:
            ValueError: on fewer than one step or an unknown spacing.
        """
        if steps < 1:
            raise ValueError(f"a time grid needs at least 1 step, got {steps}: ask for more evaluations")
        x = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
        ends = torch.tensor([self.t_max, self.t_min], dtype=torch.float64)
        if spacing == "uniform":
            t = ends[0] + x * (ends[1] - ends[0])
        elif spacing == "karras":
            high, low = self.ratio(ends) ** (1 / rho)
            t = self.time((high + x * (low - high)) ** rho)
        elif spacing == "log":
            high, low = self.ratio(ends).log()
            t = self.time((high + x * (low - high)).exp())
        else:
            raise ValueError(f"unknown spacing {spacing!r}: choose 'karras', 'log' or 'uniform'")
        t[0] = self.t_max  # the inverse may round
        return torch.cat([t, t.new_zeros(1)])

    def config(self) -> dict[str, object]:
        """Plain description, read back by :func:`schedule_from_config`."""
        return {"kind": type(self).__name__, **self.__dict__}


@dataclass(frozen=True)
class VE(Schedule):
    """Variance exploding (EDM): ``alpha = 1``, ``sigma = t`` in ``[sigma_min, sigma_max]``."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, q: Tensor) -> Tensor:
        return q


@dataclass(frozen=True)
class _VariancePreserving(Schedule):
    """``alpha^2 + sigma^2 = 1``: subclasses give ``log alpha``."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor: ...

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()  # expm1: sigma is accurate near t = 0

    def ratio(self, t: Tensor) -> Tensor:
        return torch.expm1(-2 * self.log_alpha(t)).sqrt()


@dataclass(frozen=True)
class VP(_VariancePreserving):
    """Variance preserving with ``beta(t)`` linear on ``t`` in (0, 1] (Song et al. 2021, appendix C).

    DDPM's 1000 discrete steps with ``beta`` from 1e-4 to 0.02 approximate it on the grid ``t = (i + 1) / 1000``.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    start: float = 1e-4

    def __post_init__(self) -> None:
        if not (0 < self.start < 1 and 0 <= self.beta_min <= self.beta_max and self.beta_max > 0):
            raise ValueError(
                f"need 0 < start < 1 and 0 <= beta_min <= beta_max with 0 < beta_max, got {self.start}, "
                f"{self.beta_min} and {self.beta_max}"
            )

    @property
    def t_min(self) -> float:
        return self.start

    @property
    def t_max(self) -> float:
        return 1.0

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2)

    def time(self, q: Tensor) -> Tensor:
        b = torch.log1p(q**2)  # = beta_min t + (beta_max - beta_min) t^2 / 2
        return 2 * b / (self.beta_min + (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b).sqrt())


@dataclass(frozen=True)
class CosineVP(_VariancePreserving):
    """Variance preserving with ``alpha_t = cos(c(t)) / cos(c(0))``, ``c(t) = pi/2 (t + s)/(1 + s)``
    (Nichol & Dhariwal 2021, eq. 17); sampling starts at ``stop`` because ``alpha`` vanishes at 1."""

    s: float = 0.008
    start: float = 1e-4
    stop: float = 0.992

    def __post_init__(self) -> None:
        if not (0 < self.start < self.stop < 1 and 0 <= self.s < 1):
            raise ValueError(f"need 0 < start < stop < 1 and 0 <= s < 1, got {self.start}, {self.stop} and {self.s}")

    @property
    def t_min(self) -> float:
        return self.start

    @property
    def t_max(self) -> float:
        return self.stop

    def log_alpha(self, t: Tensor) -> Tensor:
        scale = math.pi / 2 / (1 + self.s)
        # cos(a + b) / cos(a) = 1 - (2 sin^2(b/2) + tan(a) sin(b)): exactly 1 at t = 0, and accurate near it
        b = t * scale
        return torch.log1p(-(2 * torch.sin(b / 2) ** 2 + math.tan(self.s * scale) * torch.sin(b)))

    def time(self, q: Tensor) -> Tensor:
        scale = math.pi / 2 / (1 + self.s)
        alpha = torch.rsqrt(1 + q**2)
        return torch.acos(alpha * math.cos(self.s * scale)) / scale - self.s


@lru_cache(maxsize=16)
def _log_ratios(alphas_cumprod: tuple[float, ...]) -> Tensor:
    a = torch.tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
    return 0.5 * ((1 - a) / a).log()


@dataclass(frozen=True)
class DiscreteVP(Schedule):
    """Variance preserving on the steps ``i = 0 .. N-1`` that a model was trained on, continued between them.

    Step ``i`` has ``alpha^2 = alphas_cumprod[i]`` and the time ``t = (i + 1)/N``. Between two steps ``log q`` is linear
    in ``t``, as in diffusers' ``_sigma_to_t``; below the first, ``q`` falls to 0 in proportion to ``t``.

    Attributes:
        alphas_cumprod: strictly decreasing, within (0, 1).
        stop: time where sampling starts; below 1 where the table ends at a noise that drowns everything.
    """

    alphas_cumprod: tuple[float, ...]
    stop: float = 1.0

    def __post_init__(self) -> None:
        table = tuple(float(a) for a in self.alphas_cumprod)
        object.__setattr__(self, "alphas_cumprod", table)  # a card's list becomes hashable
        falling = all(a > b for a, b in pairwise(table))
        if len(table) < 2 or not falling or table[-1] <= 0 or table[0] >= 1:
            raise ValueError("alphas_cumprod must be at least two strictly decreasing numbers within (0, 1)")
        if not 1 / len(table) < self.stop <= 1:
            raise ValueError(f"need 1/{len(table)} < stop <= 1, got {self.stop}")

    @property
    def t_min(self) -> float:
        return 1 / len(self.alphas_cumprod)

    @property
    def t_max(self) -> float:
        return self.stop

    def ratio(self, t: Tensor) -> Tensor:
        logs = _log_ratios(self.alphas_cumprod).to(t.device)
        step = t.double() * len(logs) - 1
        low = step.floor().clamp(0, len(logs) - 2)
        i = low.long()
        # past the table's end as at its end; below its start only the other branch counts
        between = torch.lerp(logs[i], logs[i + 1], (step - low).clamp(0, 1)).exp()
        return torch.where(step < 0, (step + 1) * logs[0].exp(), between).to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.rsqrt(1 + self.ratio(t) ** 2)

    def sigma(self, t: Tensor) -> Tensor:
        q = self.ratio(t)
        return q * torch.rsqrt(1 + q**2)

    def time(self, q: Tensor) -> Tensor:
        logs = _log_ratios(self.alphas_cumprod).to(q.device)
        x = q.double().log()
        i = torch.searchsorted(logs, x.contiguous()).clamp(1, len(logs) - 1)
        step = i - 1 + ((x - logs[i - 1]) / (logs[i] - logs[i - 1])).clamp(max=1)
        return (torch.where(x < logs[0], q / logs[0].exp(), step + 1) / len(logs)).to(q.dtype)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """Linear interpolant ``alpha = 1 - t``, ``sigma = t`` (Liu et al. 2023; Lipman et al. 2023).

    At ``t = 1`` the signal is gone and the pivot does not exist, so the grid starts at ``stop``, just below.
    """

    start: float = 1e-3
    stop: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.start < self.stop < 1:
            raise ValueError(f"need 0 < start < stop < 1 (the signal is gone at 1), got {self.start} and {self.stop}")

    @property
    def t_min(self) -> float:
        return self.start

    @property
    def t_max(self) -> float:
        return self.stop

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, q: Tensor) -> Tensor:
        return q / (1 + q)


_KINDS: dict[str, type[Schedule]] = {c.__name__: c for c in (VE, VP, CosineVP, DiscreteVP, RectifiedFlow)}


def schedule_from_config(config: dict[str, object]) -> Schedule:
    """Inverse of :meth:`Schedule.config`.

    Raises:
        ValueError: on an unknown kind or parameter.
    """
    parameters = dict(config)
    kind = parameters.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"unknown schedule {kind!r}: choose one of {', '.join(_KINDS)}")
    try:
        return _KINDS[str(kind)](**parameters)
    except TypeError as error:
        raise ValueError(f"bad parameters for schedule {kind}: {error}") from None
