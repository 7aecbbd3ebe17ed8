r"""The EPS objective: regress ``x_0`` on its pivot (EPS paper, algorithm 1).

    x_0 ~ data,  (A, sigma_y, t) ~ tasks,   y = A x_0 + sigma_y noise,   x_t = alpha_t x_0 + sigma_t noise'
    loss = w |D(mu*, y, t) - x_0|^2

The weight is the inverse of the error to expect, ``w = n / tr c_out(Q)^2``: every draw then counts alike however much
the measurement leaves open, and with ``A = 0`` it is EDM's weight ``1/c_out(sigma)^2`` (Karras et al. 2022, table 1).
That is the error under a Gaussian prior; on real signals what can be reached differs a hundredfold between tasks, and
the tasks that nothing can solve would drown the others in noise. :class:`LossScale` learns the level to expect.

``weight="backbone"`` is the weight the backbone was made with, ``w = 1 / c_out(q)^2``: the squared error of the
network's own output, DDPM's "simple" loss for epsilon, the velocity's for a flow, EDM's for EDM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from posteriori.denoise import Conditioning, NetworkDenoiser, Prepared
from posteriori.operators.base import LinearOperator, per_sample
from posteriori.pivot import measure
from posteriori.schedule import Schedule

Distribution = Literal["lognormal", "uniform", "logit-normal"]
Weight = Literal["expected", "backbone"]

__all__ = ["LossScale", "NoiseLevels", "Problem", "Weight", "eps_loss"]


@dataclass(frozen=True)
class Problem:
    """Signals that share the structure of their operator.

    Attributes:
        x_0: ``(B, *signal)``.
        A: the operator, possibly with per-sample parameters.
        sigma_y: ``(B,)``.
        classes: ``(B,)``, what a class-conditional backbone is told; its own labels when left out.
    """

    x_0: Tensor
    A: LinearOperator
    sigma_y: Tensor
    classes: Tensor | None = None


@dataclass(frozen=True)
class NoiseLevels:
    """Distribution of the noise in training, and a share spread over the high noise where the posterior mean is made.

    Attributes:
        distribution: ``"lognormal"`` in ``q = sigma_t/alpha_t`` as EDM's, ``"uniform"`` in the schedule's time ``t`` as
            DDPM's, or ``"logit-normal"`` in ``t`` as of large flow models (Esser et al. 2024, eq. 19).
        mean, std: of ``log q`` (EDM: -1.2, 1.2), or of ``logit t``.
        high_share: share of samples drawn log-uniformly in ``q`` from ``[high_low, q_max]``.
        top_share: share of samples at the schedule's largest noise exactly, where one evaluation is E[x_0 | y].
        blind_share: share of those at the largest noise that are shown 0 in place of ``x_t``, which says next to
            nothing there: the posterior mean is then learned without noise to be ignored.
        high_low: lower end of the high noise.
    """

    distribution: Distribution = "lognormal"
    mean: float = -1.0
    std: float = 1.4
    high_share: float = 0.2
    top_share: float = 0.1
    blind_share: float = 0.0
    high_low: float = 1.0

    def draw(self, n: int, schedule: Schedule, generator: torch.Generator | None = None) -> Tensor:
        """``n`` times, float64, within the schedule's ``[t_min, t_max]``."""
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
        low, high = schedule.ratio(ends).tolist()
        z = torch.randn(n, generator=generator, dtype=torch.float64)
        v = torch.rand(n, generator=generator, dtype=torch.float64)
        pick = torch.rand(n, generator=generator, dtype=torch.float64)
        if self.distribution == "lognormal":
            q = (self.mean + self.std * z).exp()
        else:
            share = torch.special.ndtr(z) if self.distribution == "uniform" else (self.mean + self.std * z).sigmoid()
            q = schedule.ratio(ends[0] + share * (ends[1] - ends[0]))
        uniform = self.high_low * (high / self.high_low) ** v
        q = torch.where(pick < self.high_share + self.top_share, uniform, q)
        q = torch.where(pick < self.top_share, torch.full_like(q, high), q)
        return schedule.time(q.clamp(low, high)).clamp(schedule.t_min, schedule.t_max)

    def seen(self, t: Tensor, schedule: Schedule, generator: torch.Generator | None = None) -> Tensor:
        """1 for the samples that are shown their ``x_t``, 0 for the others, as ``t``."""
        if not self.blind_share:
            return torch.ones_like(t)
        pick = torch.rand(len(t), generator=generator, dtype=torch.float64).to(t.device)
        q, high = schedule.ratio(t), float(schedule.ratio(torch.tensor(schedule.t_max, dtype=torch.float64)))
        return 1 - ((pick < self.blind_share) & (q > (1 - 1e-6) * high)).to(t)


class LossScale(nn.Module):
    """Learned level of the loss, ``u(c_noise, sigma_y, known)``: the objective becomes ``loss / e^u + u``.

    At its optimum every kind of problem contributes alike (Karras et al. 2024, "EDM2", eq. 21); the minimiser over
    denoisers is the same.

    Args:
        width: hidden units.
    """

    frequencies: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1.0, 3.0))
        self.hidden = nn.Linear(3 + 3 * 2 * 4, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(cast("Tensor", self.out.bias))

    def forward(self, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Log of the loss to expect, shape ``(B,)``."""
        labels = conditioning.labels(c_noise)
        angles = (labels[:, :, None] * self.frequencies).flatten(1)
        features = torch.cat([labels, angles.sin(), angles.cos()], 1)
        result: Tensor = self.out(functional.silu(self.hidden(features))).squeeze(1)
        return result


def eps_loss(
    denoiser: NetworkDenoiser,
    problems: Sequence[Problem],
    levels: NoiseLevels,
    generator: torch.Generator | None = None,
    scale: LossScale | None = None,
    weight: Weight = "expected",
) -> tuple[Tensor, Tensor]:
    """Loss of one batch; problems with different operators share one network evaluation.

    Args:
        denoiser: the network being trained (any preconditioning, Palette's included).
        problems: groups of signals of one shape.
        levels: distribution of the noise.
        generator: of the noise levels (the noise itself comes from PyTorch's global generator).
        scale: learned level that every loss is divided by.
        weight: ``"expected"``, the inverse of the error to expect, or ``"backbone"``, the backbone's own.

    Returns:
        The mean objective, and the loss of every sample (not divided) in the order of the groups, detached.

    Raises:
        ValueError: when some of the problems have classes and others none: they share one evaluation.
    """
    classes = [p.classes for p in problems if p.classes is not None]
    if classes and len(classes) != len(problems):
        raise ValueError("classes are given for some problems of a batch only: give them for all, or for none")
    prepared: list[Prepared] = []
    expected: list[Tensor] = []
    with torch.no_grad():
        for p in problems:
            t = levels.draw(p.x_0.shape[0], denoiser.schedule, generator).to(p.x_0.device)
            alpha, sigma = denoiser.scales(p.x_0, t)
            x_t = alpha * p.x_0 + sigma * torch.randn_like(p.x_0)
            x_t = x_t * per_sample(levels.seen(t, denoiser.schedule, generator), x_t)
            y = measure(p.A, p.x_0, p.sigma_y)
            prepared.append(denoiser.prepare(x_t, t, p.A, y, p.sigma_y))
            own = denoiser.scaling.out(denoiser.schedule.ratio(t)).square().to(p.x_0.dtype)
            expected.append(prepared[-1].variance if weight == "expected" else own)
    conditioning = Conditioning.join([p.conditioning for p in prepared])
    conditioning = replace(conditioning, classes=torch.cat(classes) if classes else None)
    c_noise = torch.cat([p.c_noise for p in prepared])
    prediction = denoiser.backbone(torch.cat([p.inputs for p in prepared]), c_noise, conditioning).float()
    losses = []
    start = 0
    for problem, parts, variance in zip(problems, prepared, expected, strict=True):
        size = problem.x_0.shape[0]
        mean = parts.skip + parts.out(prediction[start : start + size])
        error = (mean - problem.x_0).square().flatten(1).mean(1)
        losses.append(error / variance)
        start += size
    each = torch.cat(losses)
    if scale is None:
        return each.mean(), each.detach()
    level = scale(c_noise, conditioning)
    return (each * (-level).exp() + level).mean(), each.detach()
