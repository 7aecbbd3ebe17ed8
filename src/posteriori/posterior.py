"""The posterior of one problem: a denoiser, an operator, a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from posteriori.denoise import Denoiser, Posterior
from posteriori.operators.base import LinearOperator, Scalar
from posteriori.pivot import sample_generators
from posteriori.schedule import Schedule

__all__ = ["ExactPosterior"]


class ExactPosterior:
    """``p(x_0 | y)`` of a linear inverse problem, through the exact posterior score.

    Args:
        denoiser: an exact prior or a trained network.
        A: the operator.
        y: measurements ``(B, *measurement)``.
        sigma_y: standard deviation of their noise, in the units of the signal (images in [-1, 1]); one number or one
            per sample ``(B,)``. 0 is allowed where ``A`` has a stable pseudo-inverse.

    Raises:
        ValueError: when ``y`` or ``sigma_y`` is not finite, or ``sigma_y`` is negative or outside the range the network
            was trained for.
    """

    def __init__(self, denoiser: Denoiser, A: LinearOperator, y: Tensor, sigma_y: Scalar) -> None:
        if not bool(torch.isfinite(y).all()):
            raise ValueError("the measurement holds NaN or infinite values: mask those entries out instead")
        s = torch.as_tensor(sigma_y, dtype=torch.float64)
        if not bool(torch.isfinite(s).all()) or bool((s < 0).any()):
            raise ValueError("sigma_y must be finite and not negative")
        if s.numel() not in (1, y.shape[0]):
            raise ValueError(f"{s.numel()} values of sigma_y do not fit a batch of {y.shape[0]} measurements")
        allowed = denoiser.sigma_y_range
        if allowed and bool(((s > 0) & (s < allowed[0] * 0.999) | (s > allowed[1] * 1.001)).any()):
            raise ValueError(
                f"this model was trained for sigma_y in [{allowed[0]:g}, {allowed[1]:g}] (images in [-1, 1]), "
                f"got {float(s.max()):g}: use another model, or the nearest value it knows"
            )
        self.denoiser, self.A, self.y = denoiser, A, y
        # one shape for the values of every sample, whichever of those that per_sample takes was given
        self.sigma_y = sigma_y.reshape(-1) if isinstance(sigma_y, Tensor) and sigma_y.numel() > 1 else sigma_y
        self.shape = (y.shape[0], *A.signal_shape(y.shape[1:]))
        self._shown: tuple[Tensor | None, Tensor | None] | None = None

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def denoise(self, x_t: Tensor, t: Scalar, previous: Posterior | None = None) -> Posterior:
        """``p(x_0 | x_t, y)``: one evaluation of the network.

        Args:
            x_t: ``(B, *signal)``.
            t: time.
            previous: the answer at a nearby ``(x_t, t)``; where ``A`` solves iteratively it saves iterations.
        """
        return self.denoiser(x_t, t, self.A, self.y, self.sigma_y, previous=previous or self._known(x_t, t))

    def _known(self, x_t: Tensor, t: Scalar) -> Posterior | None:
        """What depends on the measurement alone, solved for once, as an answer of which nothing else is known."""
        if not self.denoiser.smooth_input:
            return None
        if self._shown is None:
            self._shown = self.denoiser.known(self.y, self.A, self.shape, self.sigma_y)
        smooth, looks = self._shown
        return Posterior(x_t, x_t, *self.denoiser.scales(x_t, t), smooth=smooth, looks=looks)

    def denoise_at(self, x: Tensor, alpha: Scalar, sigma: Scalar, previous: Posterior | None = None) -> Posterior:
        """:meth:`denoise` on any interpolant, see :meth:`Denoiser.denoise_at`."""
        known = previous or self._known(x, self.schedule.t_max)
        return self.denoiser.denoise_at(x, alpha, sigma, self.A, self.y, self.sigma_y, known)

    def score(self, x_t: Tensor, t: Scalar) -> Tensor:
        """``grad log p(x_t | y)``, exact up to the denoiser's own error."""
        return self.denoise(x_t, t).score

    @torch.no_grad()
    def mean(self, seed: int | Sequence[int] = 0, looks: int = 2) -> Tensor:
        """``E[x_0 | y]``, the minimum mean squared error estimate, by one evaluation at the largest noise.

        A network that looks twice (``denoiser.refines``) spends another one before, once a measurement, and answers to
        that answer: see :class:`posteriori.denoise.NetworkDenoiser`.

        Args:
            seed: of the noise that stands for ``x_t``, of which the answer is all but independent; one number, or one
                per measurement. A network that was trained to do without sees none (``blind_mean``).
            looks: of a network that looks twice, how often it does, an evaluation each: 1 is its first answer, and from
                3 on it answers to its answer again, for which it was not trained (docs/model-photo.md says what it
                gains). Others have one look.

        Raises:
            ValueError: on as many seeds as do not fit, or fewer looks than 1.
        """
        if looks < 1:
            raise ValueError(f"the mean takes one look or more, got looks={looks}")
        t = self.schedule.t_max
        known = self._known(self.y, t)
        if known is not None and known.looks is not None:
            assert known.smooth is not None
            mean = known.smooth * self.denoiser.data_std
            for _ in range(looks - 1):
                mean = self.denoise(*self.denoiser.second_look(known)).mean
                known = replace(known, smooth=mean / self.denoiser.data_std)
            return mean
        rows = [torch.randn(self.shape[1:], generator=g) for g in sample_generators(seed, self.shape[0])]
        blind = self.denoiser.blind_mean
        sigma = 0.0 if blind else float(self.schedule.sigma(torch.tensor(t, dtype=torch.float64)))
        return self.denoise(torch.stack(rows).to(self.y) * sigma, t).mean

    def expand(self, n: int) -> ExactPosterior:
        """The same problem ``n`` times in one batch, sample-major: entry ``k * B + b`` is copy ``k`` of sample ``b``.

        Raises:
            ValueError: when the operator's own parameters are tied to the batch size.
        """
        if self.A.samples(len(self.shape)) is not None:
            raise ValueError("an operator with one parameter set per sample cannot be expanded")
        sigma_y = self.sigma_y
        if isinstance(sigma_y, Tensor) and sigma_y.numel() > 1:
            sigma_y = sigma_y.repeat(n)
        copies = ExactPosterior(self.denoiser, self.A, self.y.repeat(n, *[1] * (self.y.ndim - 1)), sigma_y)
        known = self._known(self.y.new_zeros(1), self.schedule.t_max)
        if known is not None and known.smooth is not None:
            looks = None if known.looks is None else known.looks.repeat(n)
            copies._shown = known.smooth.repeat(n, 1, 1, 1), looks
        return copies
