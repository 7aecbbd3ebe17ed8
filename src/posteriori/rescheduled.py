r"""A denoiser on another interpolant than its own.

In ``u = x_t/alpha_t`` and ``q = sigma_t/alpha_t`` all interpolants are one, so what is known of ``x_0`` from

    x_t = alpha_t x_0 + sigma_t noise      is what is known from      (sigma'/sigma_t) x_t = alpha' x_0 + sigma' noise

on the denoiser's own schedule, at its time of ``q``. A network trained with EDM's schedule is sampled as a VP or
flow model, with their solvers and time grids, without training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posteriori.denoise import Denoiser, Posterior
from posteriori.operators.base import LinearOperator, Scalar
from posteriori.schedule import Schedule

__all__ = ["Rescheduled"]


class Rescheduled(Denoiser):
    """``E[x_0 | x_t, y]`` for ``x_t`` of another schedule.

    Noise beyond the denoiser's own largest counts as the largest, where ``x_t`` says next to nothing about ``x_0``.

    Args:
        denoiser: an exact prior or a network.
        schedule: of ``x_t``.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule
        self.warm = denoiser.warm
        self.stand_for(denoiser)

    def known(
        self, y: Tensor, A: LinearOperator, shape: tuple[int, ...], sigma_y: Scalar
    ) -> tuple[Tensor | None, Tensor | None]:
        return self.denoiser.known(y, A, shape, sigma_y)

    def forward(
        self,
        x_t: Tensor,
        t: Scalar,
        A: LinearOperator,
        y: Tensor,
        sigma_y: Scalar,
        previous: Posterior | None = None,
    ) -> Posterior:
        time = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).reshape(-1)
        scales = self.schedule.alpha(time), self.schedule.sigma(time)
        return self.denoiser.denoise_at(x_t, *scales, A, y, sigma_y, previous)
