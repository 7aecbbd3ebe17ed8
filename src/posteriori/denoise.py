r"""Denoisers, and how a network becomes one.

A denoiser answers ``E[x_0 | x_t, y]``. With an exact prior (:mod:`posteriori.priors`) the answer is exact; a network
is wrapped so that the function it has to learn is well scaled. A backbone denoises ``u = x_t/alpha_t`` at noise
``q = sigma_t/alpha_t`` as ``D_0(u; q) = c_skip(q) u + c_out(q) F(c_in(q) u, c_noise(q))``, with the scalars of
:mod:`posteriori.scaling`.

The pivot has the anisotropic noise ``Q = Sigma*^(1/2)``, a function of ``A^T A``. Preconditionings:

    spectral   c_skip(Q) mu* + c_out(Q) F([c_in(Q) mu*, x_lin/s, diagonal])     the matrix in the scalar's place
    scalar     mu*_(q^2 c/(1-c)) + c_out(q) F([c_in(q) x_t/alpha_t, x_lin/s, diagonal]),  c = c_skip(q)     one solve
    paper      c_skip(q) mu* + c_out(q) F([c_in(q) mu*, x_y/s, diagonal])       the EPS paper's D(mu*, y, t)
    palette    c_skip(q) u + c_out(q) F([c_in(q) u, x_y/s, diagonal])           the baseline: no pivot

``x_lin`` is the linear estimate from ``(x_t, y)``, ``x_y`` that from ``y`` alone; ``mu*_v`` is the linear estimate
under the prior ``N(0, v I)``, which is ``c_skip(q) u`` when ``A = 0``. In every form ``A = 0`` gives ``D_0`` exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from posteriori.conditioning import Conditioning
from posteriori.joint import Measured, can_share, linear_and_pivots
from posteriori.operators import Nothing
from posteriori.operators.base import LinearOperator, Scalar, SpectralFunction, per_sample
from posteriori.pivot import estimate_from_measurement, linear_estimate, noise_variance, pivot
from posteriori.scaling import NoiseLabel, Scaling
from posteriori.schedule import Schedule
from posteriori.smooth import smooth_estimate

Preconditioning = Literal["spectral", "scalar", "paper", "palette"]

#: Noise over ``s`` that the first answer counts as in a second look: about the error of a good restoration.
SECOND_LOOK = 0.4

__all__ = ["Conditioning", "Denoiser", "NetworkDenoiser", "Posterior", "Scaling"]


@dataclass(frozen=True)
class Posterior:
    """``p(x_0 | x_t, y)`` through its mean, and what follows from it.

    Attributes:
        mean: ``E[x_0 | x_t, y]``, shape of ``x_t``.
        x_t: the noisy signal.
        alpha_t, sigma_t: its scales, broadcastable to it.
        linear, pivot: what was solved for on the way, where it was; the next evaluation starts its solves there.
        measured: the measurement in the basis of ``A``, where it has one; the next evaluation takes it from here.
        smooth, looks: likewise what :meth:`Denoiser.known` says of the measurement.
    """

    mean: Tensor
    x_t: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    linear: Tensor | None = None
    pivot: Tensor | None = None
    measured: Measured | None = None
    smooth: Tensor | None = None
    looks: Tensor | None = None

    @property
    def noise(self) -> Tensor:
        """``E[noise | x_t, y]``."""
        return (self.x_t - self.alpha_t * self.mean) / self.sigma_t

    @property
    def score(self) -> Tensor:
        """``grad log p(x_t | y) = (alpha_t E[x_0 | x_t, y] - x_t) / sigma_t^2`` (EPS paper, theorem 1)."""
        return (self.alpha_t * self.mean - self.x_t) / self.sigma_t**2

    def pivot_at(self, q: Tensor) -> Tensor | None:
        """A guess of the pivot at another noise level ``q``, ``(B,)``: its noise scaled with that of ``x_t``.

        Exact to first order where ``A`` sees nothing and off by less than the pivot's own noise where it sees.
        """
        if self.pivot is None:
            return None
        return self.mean + per_sample(q, self.mean) * self.alpha_t / self.sigma_t * (self.pivot - self.mean)


class Denoiser(nn.Module, ABC):
    """Anything that knows ``E[x_0 | x_t, y]`` on a schedule: an exact prior or a network."""

    schedule: Schedule
    #: Root mean square of an entry of the data: the scale of a sampler's Gaussian prior and of its time grid.
    data_std: float = 0.5
    #: Whether ``forward`` takes ``previous``.
    warm: bool = False
    #: Measurement noise that it knows, all when ``None``; how the mean is asked for; whether it is shown
    #: :mod:`posteriori.smooth`, and its own first answer after that: see :class:`NetworkDenoiser`.
    sigma_y_range: tuple[float, float] | None = None
    blind_mean: bool = False
    smooth_input: bool = False
    refines: bool = False

    def stand_for(self, other: Denoiser) -> None:
        """Take over what callers ask of a denoiser beside its answers, from one that this one wraps."""
        for name in ("data_std", "sigma_y_range", "blind_mean", "smooth_input", "refines"):
            setattr(self, name, getattr(other, name))

    def smooth(self, y: Tensor, A: LinearOperator, shape: tuple[int, ...], sigma_y: Scalar) -> Tensor | None:
        """The estimate of :mod:`posteriori.smooth` over ``data_std``; ``None`` of a denoiser that is not shown it."""
        if not self.smooth_input:
            return None
        if isinstance(A, Nothing):
            return y.new_zeros(shape)
        return smooth_estimate(y, A, shape, sigma_y=sigma_y, prior_std=self.data_std) / self.data_std

    def known(
        self, y: Tensor, A: LinearOperator, shape: tuple[int, ...], sigma_y: Scalar
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is shown of the measurement at every noise, ``(B, C, H, W)`` over ``data_std``, and what it is,
        ``(B,)``: ``smooth`` and ``looks`` of :class:`posteriori.conditioning.Conditioning`, ``None`` where there is
        nothing to show, or nothing to say."""
        return self.smooth(y, A, shape, sigma_y), None

    def second_look(self, known: Posterior) -> tuple[Tensor, float, Posterior]:
        """``x_t``, its time and what is known, of the evaluation that gives the mean after a first answer."""
        assert known.smooth is not None
        level = torch.tensor(SECOND_LOOK * self.data_std, dtype=torch.float64)
        t = float(self.schedule.time(level))
        x_t = float(self.schedule.alpha(torch.tensor(t, dtype=torch.float64))) * self.data_std * known.smooth
        alpha, sigma = self.scales(x_t, t)
        looks = x_t.new_full((len(x_t),), 2.0)
        return x_t, t, replace(known, x_t=x_t, mean=x_t, alpha_t=alpha, sigma_t=sigma, looks=looks)

    @abstractmethod
    def forward(self, x_t: Tensor, t: Scalar, A: LinearOperator, y: Tensor, sigma_y: Scalar) -> Posterior:
        """Posterior of ``x_0`` given ``x_t`` at time ``t`` and the measurement.

        Args:
            x_t: ``(B, *signal)``.
            t: time, one number or one per sample ``(B,)``.
            A, y, sigma_y: the measurement ``y = A x_0 + sigma_y noise``.
        """

    def __call__(
        self,
        x_t: Tensor,
        t: Scalar,
        A: LinearOperator,
        y: Tensor,
        sigma_y: Scalar,
        *,
        previous: Posterior | None = None,
    ) -> Posterior:
        """:meth:`forward`; ``previous`` is the answer at a nearby ``(x_t, t)``, where iterative solves start."""
        warm = {"previous": previous} if self.warm and previous is not None else {}
        result: Posterior = super().__call__(x_t, t, A, y, sigma_y, **warm)
        return result

    def scales(self, x_t: Tensor, t: Scalar) -> tuple[Tensor, Tensor]:
        """``(alpha_t, sigma_t)`` of shape ``(B or 1, 1, ...)``. Computed in float64: a flow's ``1 - t`` cancels."""
        time = torch.as_tensor(t, dtype=torch.float64, device=x_t.device)
        return per_sample(self.schedule.alpha(time), x_t), per_sample(self.schedule.sigma(time), x_t)

    def denoise_at(
        self, x: Tensor, alpha: Scalar, sigma: Scalar, A: LinearOperator, y: Tensor, sigma_y: Scalar,
        previous: Posterior | None = None,
    ) -> Posterior:  # fmt: skip
        """:meth:`forward` on any interpolant: ``p(x_0 | x, y)`` for ``x = alpha x_0 + sigma noise``.

        On the denoiser's own schedule the same is known from ``x_t = (sigma_t/sigma) x`` at the time ``t`` of
        ``q = sigma/alpha``. Noise beyond the schedule's largest counts as the largest, where ``x`` says next to nothing
        about ``x_0`` either way; ``alpha`` may be 0 there.

        Args:
            x: ``(B, *signal)``.
            alpha, sigma: its scales, ``alpha >= 0``, ``sigma > 0``; numbers or one per sample ``(B,)``.
            A, y, sigma_y: the measurement, as in :meth:`forward`.
            previous: the answer at a nearby ``x``.

        Raises:
            ValueError: when ``alpha`` is negative or ``sigma`` not positive.
        """
        a, s = (torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in (alpha, sigma))
        if bool((a < 0).any()) or bool((s <= 0).any()):
            raise ValueError("need alpha >= 0 and sigma > 0: without noise there is nothing to denoise")
        largest = self.schedule.ratio(torch.tensor(self.schedule.t_max, dtype=torch.float64, device=x.device))
        t = self.schedule.time(torch.minimum(s / a, largest))
        answer = self(per_sample(self.schedule.sigma(t) / s, x) * x, t, A, y, sigma_y, previous=previous)
        return replace(answer, x_t=x, alpha_t=per_sample(a, x), sigma_t=per_sample(s, x))


@dataclass(frozen=True)
class Prepared:
    """One evaluation before the network: ``mean = skip + out(F(inputs, c_noise, conditioning))``.

    ``variance`` is the mean of the diagonal of ``c_out(Q)^2``, shape ``(B,)``: the size of the error to expect.
    ``linear``, ``pivot`` and ``measured`` are as in :class:`Posterior`.
    """

    skip: Tensor
    inputs: Tensor
    c_noise: Tensor
    conditioning: Conditioning
    out: Callable[[Tensor], Tensor]
    variance: Tensor
    linear: Tensor | None = None
    pivot: Tensor | None = None
    measured: Measured | None = None


class NetworkDenoiser(Denoiser):
    """A network as a denoiser of pivots.

    A network with ``smooth_input`` is shown the estimate of :mod:`posteriori.smooth`. One that may look twice
    (``refine``) first answers that, without any ``x_t``. At every noise it is then shown its answer in the estimate's
    place (self-conditioning, Chen et al. 2022, arXiv 2208.04202, with one answer for the whole trajectory), and the
    posterior mean is its answer to that one as if it were ``x_t`` at the noise :data:`SECOND_LOOK` ``s``: the pivot of
    a picture near the truth, corrected by the measurement. It costs one more evaluation a measurement, however many
    samples there are, for twice the depth of the mean.

    Args:
        backbone: ``F(inputs, c_noise, conditioning) -> (B, *signal)``; ``inputs`` has the signal's shape, ``c_noise``
            shape ``(B,)``, ``conditioning`` is a :class:`Conditioning` that a plain backbone may ignore.
        schedule: interpolant it is sampled on.
        scaling: what the network predicts and the data's standard deviation.
        preconditioning: ``"spectral"`` (default), ``"scalar"``, ``"paper"`` or ``"palette"``; see the module's head.
        c_noise: noise label of the network as a function of ``q`` (float64 in, any shape): by default
            ``log(q)/4``, EDM's.
        sigma_y_range: measurement noise the network was trained for; others give an error from
            :class:`posteriori.posterior.ExactPosterior`. ``None`` allows all.
        clip: means are cut to ``[-clip, clip]``, where the data lie and so their means; training is not.
        blind_mean: whether the network was shown 0 in place of ``x_t`` in a share of its training at the largest noise
            (:class:`posteriori.objective.NoiseLevels`), and is for the posterior mean.

    Raises:
        ValueError: on an unknown preconditioning.
    """

    warm = True

    def __init__(
        self,
        backbone: nn.Module,
        schedule: Schedule,
        scaling: Scaling | None = None,
        preconditioning: Preconditioning = "spectral",
        c_noise: Callable[[Tensor], Tensor] | None = None,
        sigma_y_range: tuple[float, float] | None = None,
        clip: float | None = None,
        blind_mean: bool = False,
    ) -> None:
        super().__init__()
        if preconditioning not in ("spectral", "scalar", "paper", "palette"):
            raise ValueError(
                f"unknown preconditioning {preconditioning!r}: choose 'spectral', 'scalar', 'paper' or 'palette'"
            )
        self.backbone = backbone
        self.schedule = schedule
        self.scaling = scaling or Scaling()
        self.data_std = self.scaling.data_std
        self.preconditioning = preconditioning
        self.c_noise = c_noise or NoiseLabel()
        self.sigma_y_range = sigma_y_range
        self.clip = clip
        self.blind_mean = blind_mean
        # of the network, whatever wraps it later
        self.smooth_input = bool(getattr(backbone, "smooth_input", False))
        self.refines = bool(getattr(backbone, "refine", False))

    @torch.no_grad()
    def known(
        self, y: Tensor, A: LinearOperator, shape: tuple[int, ...], sigma_y: Scalar
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.refines or isinstance(A, Nothing):
            return super().known(y, A, shape, sigma_y)
        first = self.first_look(y, A, shape, sigma_y)
        answer = self(first.x_t, self.schedule.t_max, A, y, sigma_y, previous=first).mean
        return answer / self.data_std, y.new_ones(shape[0])

    def first_look(self, y: Tensor, A: LinearOperator, shape: tuple[int, ...], sigma_y: Scalar) -> Posterior:
        """What a network that refines goes by in its first evaluation, at the largest noise with 0 for ``x_t``."""
        zeros = y.new_zeros(shape)
        scales = self.scales(zeros, self.schedule.t_max)
        return Posterior(zeros, zeros, *scales, smooth=self.smooth(y, A, shape, sigma_y))

    def prepare(
        self,
        x_t: Tensor,
        t: Scalar,
        A: LinearOperator,
        y: Tensor,
        sigma_y: Scalar,
        previous: Posterior | None = None,
    ) -> Prepared:
        """Everything of an evaluation but the network, so that different operators can share one network call."""
        time = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).reshape(-1)  # of all, or of each
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        q = sigma / alpha
        scales = {"alpha_t": alpha, "sigma_t": sigma, "sigma_y": sigma_y}
        c, s = self.scaling, self.scaling.data_std
        variance = noise_variance(A, x_t, **scales)

        def of_noise(function: Callable[[Tensor], Tensor]) -> SpectralFunction:
            return lambda lam: function(variance(lam).sqrt())

        q_b = per_sample(q, x_t)
        u = x_t / per_sample(alpha, x_t)
        prior = Scaling("edm", s)
        # The variance left by measurement, x_t and the Gaussian prior: c_out(Q)^2 of EDM.
        diagonal = A.spectral_diagonal(of_noise(lambda v: prior.out(v) ** 2), x_t).clamp_min(0)
        diagonal = diagonal.reshape(*[1] * (x_t.ndim - diagonal.ndim), *diagonal.shape)
        left = diagonal.flatten(1).mean(1).expand(x_t.shape[0])
        mu: Tensor | None = None
        measured: Measured | None = None
        together: list[Tensor] = []
        if self.preconditioning == "spectral" and can_share(A, alpha, sigma_y):
            functions = [c.input] if c.kind in ("edm", "x_0") else [c.input, c.skip]
            known = previous.measured if previous else None
            together, measured = linear_and_pivots(x_t, y, A, **scales, prior_std=s, functions=functions, known=known)
            linear = together[0]
        elif self.preconditioning in ("spectral", "scalar"):
            linear = linear_estimate(x_t, y, A, **scales, prior_std=s, guess=previous.linear if previous else None)
        else:
            linear = estimate_from_measurement(y, A, x_t.shape, sigma_y=sigma_y, prior_std=s)

        near = previous.pivot_at(q) if previous else None
        near = linear if near is None else near  # the linear estimate is off by no more than the pivot's noise
        out: Callable[[Tensor], Tensor]
        if self.preconditioning == "spectral":
            if not together:
                mu = pivot(x_t, y, A, **scales, guess=near)
            inputs = together[1] if mu is None else A.spectral(of_noise(c.input), mu)
            if c.kind == "edm":
                skip = linear  # c_skip(Q) mu* in one well-conditioned solve
            elif c.kind == "x_0":
                skip = torch.zeros_like(x_t)
            elif mu is None:
                skip = together[2]
            else:
                skip = mu if c.kind == "epsilon" else A.spectral(of_noise(c.skip), mu)
            out = (lambda f: f) if c.kind == "x_0" else (lambda f: A.spectral(of_noise(c.out), f))
        else:
            out = lambda f: c.out(q_b) * f  # noqa: E731
            if self.preconditioning == "scalar":
                inputs = c.input(q_b) * u
                skip = (
                    torch.zeros_like(x_t)
                    if c.kind == "x_0"
                    else linear_estimate(x_t, y, A, **scales, prior_std=c.skip_prior_std(q), guess=linear)
                )
            else:
                mu = pivot(x_t, y, A, **scales, guess=near) if self.preconditioning == "paper" else None
                centre = u if mu is None else mu
                inputs, skip = c.input(q_b) * centre, c.skip(q_b) * centre
        s_y = per_sample(sigma_y, x_t).reshape(-1).expand(x_t.shape[0])
        uncertain = (diagonal.sqrt() / s).expand(x_t.shape)
        shown = (previous.smooth, previous.looks) if previous is not None else (None, None)
        smooth, looks = self.known(y, A, tuple(x_t.shape), sigma_y) if shown[0] is None else shown
        looks = torch.zeros_like(s_y) if self.refines and looks is None else looks
        conditioning = Conditioning(linear / s, uncertain, s_y, 1 - left / s**2, smooth=smooth, looks=looks)
        c_noise = self.c_noise(q.expand(x_t.shape[0])).to(x_t.dtype)
        return Prepared(skip, inputs, c_noise, conditioning, out, left, linear, mu, measured)

    def forward(
        self,
        x_t: Tensor,
        t: Scalar,
        A: LinearOperator,
        y: Tensor,
        sigma_y: Scalar,
        previous: Posterior | None = None,
    ) -> Posterior:
        p = self.prepare(x_t, t, A, y, sigma_y, previous)
        prediction = self.backbone(p.inputs, p.c_noise, p.conditioning).to(x_t.dtype)
        mean = p.skip + p.out(prediction)
        mean = mean if self.clip is None else mean.clamp(-self.clip, self.clip)
        shown = p.conditioning
        return Posterior(mean, x_t, *self.scales(x_t, t), p.linear, p.pivot, p.measured, shown.smooth, shown.looks)
