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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from posteriori.denoise import Conditioning, NetworkDenoiser, Posterior, Prepared
from posteriori.operators import Nothing
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
        first_share: of a network that looks twice, the share of those blind ones that are its first look. All other
            samples are shown the answer of a first look, made in the same step and not trained through.
        high_low: lower end of the high noise.
    """

    distribution: Distribution = "lognormal"
    mean: float = -1.0
    std: float = 1.4
    high_share: float = 0.2
    top_share: float = 0.1
    blind_share: float = 0.0
    first_share: float = 0.3
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


@dataclass
class _Drawn:
    """A problem with its noise.

    Attributes:
        blind: 1 for the samples that are not shown their ``x_t``.
        known: of a network that looks twice, what it is shown.
        top: the evaluation that its first answer came from, and which of its samples learn the second look, 1 or 0.
    """

    problem: Problem
    t: Tensor
    x_t: Tensor
    y: Tensor
    blind: Tensor
    known: Posterior | None = None
    top: Prepared | None = None
    second: Tensor | None = None


def _evaluate(
    denoiser: NetworkDenoiser, prepared: Sequence[Prepared], problems: Sequence[Problem]
) -> tuple[list[Tensor], Conditioning]:
    """The means of several problems by one evaluation of the network, and what it was told."""
    classes = [p.classes for p in problems if p.classes is not None]
    conditioning = Conditioning.join([p.conditioning for p in prepared])
    conditioning = replace(conditioning, classes=torch.cat(classes) if classes else None)
    c_noise = torch.cat([p.c_noise for p in prepared])
    prediction = denoiser.backbone(torch.cat([p.inputs for p in prepared]), c_noise, conditioning).float()
    outputs = prediction.split([len(p.inputs) for p in prepared])
    return [p.skip + p.out(f) for p, f in zip(prepared, outputs, strict=True)], conditioning


def _look_twice(
    denoiser: NetworkDenoiser, drawn: Sequence[_Drawn], first_share: float, generator: torch.Generator | None
) -> None:
    """Show the first answer to all samples but the first looks among the blind ones; the others of those become second
    looks."""
    measured = [d for d in drawn if not isinstance(d.problem.A, Nothing)]
    if not measured:
        return
    firsts = [denoiser.first_look(d.y, d.problem.A, tuple(d.x_t.shape), d.problem.sigma_y) for d in measured]
    tops = [
        denoiser.prepare(first.x_t, denoiser.schedule.t_max, d.problem.A, d.y, d.problem.sigma_y, first)
        for d, first in zip(measured, firsts, strict=True)
    ]
    means, _ = _evaluate(denoiser, tops, [d.problem for d in measured])
    for d, first, top, mean in zip(measured, firsts, tops, means, strict=True):
        d.top = top
        assert first.smooth is not None
        once = torch.rand(len(d.t), generator=generator, dtype=torch.float64).to(d.t.device) < first_share
        d.second = (d.blind * ~once).to(d.x_t)
        answered = (1 - d.blind * once).to(d.x_t)
        smooth = torch.where(per_sample(answered, mean) > 0, mean / denoiser.data_std, first.smooth)
        known = replace(first, smooth=smooth, looks=answered, measured=top.measured)
        x_t, t, _ = denoiser.second_look(known)
        d.x_t = torch.where(per_sample(d.second, x_t) > 0, x_t, d.x_t)
        d.t = torch.where(d.second > 0, t, d.t)
        d.known = replace(known, looks=answered + d.second)


def _of_first(drawn: _Drawn, prepared: Prepared, of: Callable[[Prepared], Tensor]) -> Tensor:
    """A value of every sample, ``(B,)``; that of the first look where the sample is a second."""
    if drawn.top is None or drawn.second is None:
        return of(prepared)
    return torch.where(drawn.second > 0, of(drawn.top), of(prepared))


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
    drawn: list[_Drawn] = []
    with torch.no_grad():
        for p in problems:
            t = levels.draw(p.x_0.shape[0], denoiser.schedule, generator).to(p.x_0.device)
            alpha, sigma = denoiser.scales(p.x_0, t)
            x_t = alpha * p.x_0 + sigma * torch.randn_like(p.x_0)
            seen = levels.seen(t, denoiser.schedule, generator)
            x_t = x_t * per_sample(seen, x_t)
            drawn.append(_Drawn(p, t, x_t, measure(p.A, p.x_0, p.sigma_y), 1 - seen))
            own = denoiser.scaling.out(denoiser.schedule.ratio(t)).square().to(x_t.dtype)
            expected.append(own)
        if denoiser.refines:
            _look_twice(denoiser, drawn, levels.first_share, generator)
        for k, d in enumerate(drawn):
            prepared.append(denoiser.prepare(d.x_t, d.t, d.problem.A, d.y, d.problem.sigma_y, d.known))
            if weight == "expected":
                expected[k] = _of_first(d, prepared[k], lambda p: p.variance)
    means, conditioning = _evaluate(denoiser, prepared, problems)
    losses = []
    for problem, mean, variance in zip(problems, means, expected, strict=True):
        error = (mean - problem.x_0).square().flatten(1).mean(1)
        losses.append(error / variance)
    each = torch.cat(losses)
    if scale is None:
        return each.mean(), each.detach()
    # a second look is as hard as the first: it is the same question
    c_noise = torch.cat([_of_first(d, p, lambda p: p.c_noise) for d, p in zip(drawn, prepared, strict=True)])
    known = torch.cat([_of_first(d, p, lambda p: p.conditioning.known) for d, p in zip(drawn, prepared, strict=True)])
    level = scale(c_noise, replace(conditioning, known=known))
    return (each * (-level).exp() + level).mean(), each.detach()
