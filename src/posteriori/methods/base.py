r"""What a restoration method is, how one is found by name, and how training-free ones are run.

    METHODS["dps"](posterior, n=4, nfe=100, seed=0)  ->  Estimate: samples (n, B, *signal), evaluations, backward passes

To add a method, write a function ``(posterior, n, nfe, seed, advance, **settings) -> Estimate`` in a module of this
package and add a line to :data:`METHODS`; modules are imported when their method is first called.

Training-free methods know the prior through the denoiser with nothing measured, ``D(u; q) = E[x_0 | u]`` with
``u = x_0 + q noise``, and the measurement through ``A``. In ``(u, q)`` the interpolants differ by nothing but the
``q`` they can reach, so each method is one transition ``(u, q) -> (u', q')`` that serves all of them. Papers that
state theirs for DDPM mean ``x = u / sqrt(1 + q^2)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from posteriori.operators import Nothing
from posteriori.operators.base import LinearOperator, per_sample
from posteriori.pivot import sample_generators
from posteriori.posterior import ExactPosterior
from posteriori.sample import State, Transition
from posteriori.schedule import VP, Schedule

__all__ = [
    "METHODS", "Entry", "Estimate", "Method", "MethodError", "Problem", "Seed", "available_methods", "ddpm_grid",
    "draw", "get_method", "needs_spectrum",
]  # fmt: skip

Advance = Callable[[int], None]
Seed = int | Sequence[int]
# Samples evaluated at once: as many as fill this many pixels. Larger batches cost memory and gain nothing on a CPU.
PIXELS_AT_ONCE = 2 * 256**2


class MethodError(ValueError):
    """A method that does not fit an operator, a denoiser or its own settings: what, why, and what to try."""


@dataclass(frozen=True)
class Estimate:
    """What a method says about ``x_0``.

    Attributes:
        mmse: ``E[x_0 | y]`` from one evaluation, or two, ``(B, *signal)``; ``None`` when the method makes no such
            estimate.
        point: the method's single answer, when it draws no samples.
        samples: ``(n, B, *signal)``, or ``None``.
        evaluations: of the network, for all ``n`` samples together.
        backward: backward passes through the network, likewise.
        settings: everything the method was told beside ``n``, ``nfe`` and ``seed``.
    """

    mmse: Tensor | None = None
    point: Tensor | None = None
    samples: Tensor | None = None
    evaluations: int = 0
    backward: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """Mean of the samples, or the point estimate."""
        if self.samples is not None:
            return self.samples.mean(0)
        assert self.point is not None
        return self.point

    @property
    def answers(self) -> Tensor:
        """The samples; a point estimate as the only one, ``(1, B, *signal)``."""
        return self.mean.unsqueeze(0) if self.samples is None else self.samples


class Method(Protocol):
    """A restoration method; ``advance`` is called with the number of network evaluations just spent."""

    def __call__(
        self, posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance, **settings: Any
    ) -> Estimate: ...


@dataclass(frozen=True)
class Entry:
    """A method by name; calling it imports its module.

    Attributes:
        place: ``module:function`` within this package.
        nfe: network evaluations per sample that its paper uses; 0 without a network.
        fixed: settings that make it another method than its function alone.
        extra: evaluations beside those of the samples, for the posterior mean.
    """

    place: str
    nfe: int
    fixed: dict[str, Any] = field(default_factory=dict)
    extra: int = 0

    def __call__(
        self,
        posterior: ExactPosterior,
        n: int = 1,
        nfe: int | None = None,
        seed: Seed = 0,
        advance: Advance = lambda _: None,
        **settings: Any,
    ) -> Estimate:
        """Restore.

        Args:
            posterior: the problem, with ``B`` measurements; the denoiser may be an exact prior.
            n: samples of each measurement.
            nfe: network evaluations per sample; those of the paper when left out.
            seed: one number, or one per measurement. Sample ``k`` of measurement ``b`` has a generator of its own,
                whatever ``n`` and ``B``; with a seed of its own a measurement's samples do not depend on its batch.
            advance: called with the network evaluations just spent on each measurement.
            **settings: of the method, see its docstring.

        Raises:
            MethodError: when the method does not fit the operator, the denoiser or its settings.
            ValueError: when ``n`` or ``nfe`` is not positive, or there are as many seeds as do not fit.
        """
        if n < 1 or (nfe is not None and nfe < 1):
            raise ValueError(f"n and nfe must be at least 1, got n={n} and nfe={nfe}")
        given = {**self.fixed, **settings}
        return self.load()(posterior, n, self.nfe if nfe is None else nfe, seed, advance, **given)

    def evaluations(self, n: int, nfe: int) -> int:
        """Network evaluations that ``n`` samples of ``nfe`` are to cost, for a progress bar."""
        return self.extra + n * nfe if self.nfe else 0

    def load(self) -> Method:
        """The function itself."""
        method: Method = getattr(self._module(), self.place.partition(":")[2])
        return method

    def settings(self, task: str) -> dict[str, Any]:
        """What is recommended for a task (random or inpaint, box, sr, gaussian, motion) beside the defaults."""
        table: dict[str, dict[str, Any]] = getattr(self._module(), "SETTINGS", {})
        return table.get("random" if task == "inpaint" else task, {})

    def _module(self) -> Any:
        return import_module(f"posteriori.methods.{self.place.partition(':')[0]}")


METHODS: dict[str, Entry] = {
    "eps": Entry("eps:exact_posterior_score", 8, extra=1),
    "palette": Entry("palette:palette", 8, extra=1),
    "zero-shot-pivot": Entry("zero_shot_pivot:zero_shot_pivot", 20),
    "dps": Entry("dps:dps", 1000),
    "daps": Entry("daps:daps", 100),
    "daps-calibrated": Entry("daps:daps", 100, {"tau": "calibrated"}),
    "ddnm": Entry("ddnm:ddnm", 100),
    "ddrm": Entry("ddrm:ddrm", 20),
    "pigdm": Entry("pigdm:pigdm", 100),
    "mmps": Entry("mmps:mmps", 100),
    "mpgd": Entry("mpgd:mpgd", 100),
    "diffpir": Entry("diffpir:diffpir", 100),
    "red-diff": Entry("red_diff:red_diff", 1000),
    "linear": Entry("classical:linear", 0),
    "tv": Entry("classical:tv", 0),
}


def available_methods() -> list[str]:
    """Names that :func:`get_method` takes."""
    return list(METHODS)


def get_method(name: str) -> Entry:
    """A method by name.

    Raises:
        ValueError: on an unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose {', '.join(METHODS)}")
    return METHODS[name]


class Problem:
    """A restoration problem as a training-free method sees it: prior and measurement apart, everything counted.

    Attributes:
        A, y, sigma_y: the measurement, as in :class:`ExactPosterior`.
        evaluations, backward: spent so far on each measurement.
    """

    def __init__(
        self, posterior: ExactPosterior, copies: int, generators: Sequence[torch.Generator], advance: Advance
    ) -> None:
        self.A, self.y, self.sigma_y = posterior.A, posterior.y, posterior.sigma_y
        self.posterior, self._copies, self._generators, self._advance = posterior, copies, generators, advance
        self.evaluations = self.backward = 0
        # Nothing is measured, but a network wants to be told a noise level that it was trained for.
        low, high = posterior.denoiser.sigma_y_range or (1e-2, 1.0)
        told = torch.as_tensor(posterior.sigma_y).clamp(low, high)
        self._unconditional = (Nothing(), torch.zeros(posterior.shape, dtype=self.y.dtype, device=self.y.device), told)

    def denoise(self, u: Tensor, q: float | Tensor) -> Tensor:
        """``D(u; q) = E[x_0 | u]``, nothing measured: one evaluation. ``q`` is one number or one per sample."""
        schedule = self.posterior.schedule
        t = schedule.time(torch.as_tensor(q, dtype=torch.float64)).clamp(schedule.t_min, schedule.t_max)
        self.evaluations += self._copies
        self._advance(self._copies)
        return self.posterior.denoiser(per_sample(schedule.alpha(t), u) * u, t, *self._unconditional).mean

    def linearize(self, u: Tensor, q: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """``D(u; q)`` and ``v -> (dD/du)^T v``, every call of which is one backward pass."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            d = self.denoise(u, q)

        def pull_back(v: Tensor) -> Tensor:
            self.backward += self._copies
            return torch.autograd.grad(d, u, v, retain_graph=True)[0]

        return d.detach(), pull_back

    def noise(self) -> Tensor:
        """Standard normal noise ``(B, *signal)``, every sample from its own generator."""
        return self.noises(1)[0]

    def noises(self, count: int) -> Tensor:
        """``count`` of them, ``(count, B, *signal)``, in one call of each generator."""
        shape = (count, *self.posterior.shape[1:])
        rows = [torch.randn(shape, generator=g, dtype=self.y.dtype) for g in self._generators]
        return torch.stack(rows, 1).to(self.y.device)

    def residual(self, x: Tensor) -> Tensor:
        """``y - A x``, 0 where nothing was measured."""
        r = self.y - self.A(x)
        observed = self.A.observed(self.y)
        return r if observed is None else r * observed

    def misfit_gradient(self, x: Tensor) -> Tensor:
        """Gradient of the norm ``|y - A x|``, taken for every sample by itself, with respect to ``x``."""
        r = self.residual(x)
        norm = per_sample(r.flatten(1).norm(dim=1).clamp_min(torch.finfo(r.dtype).tiny), r)
        return -self.A.adjoint(r / norm)

    def scalar(self, value: float | Tensor) -> Tensor:
        """A number, or one per sample, that broadcasts along the signals."""
        return per_sample(value, self._unconditional[1])


def needs_spectrum(A: LinearOperator, method: str) -> None:
    """Refuse an operator whose singular values are not at hand.

    Raises:
        MethodError: when it is known through ``A`` and ``A^T`` only: the method treats every singular value by itself,
            by a rule with jumps, which Lanczos cannot apply.
    """
    if not A.exact:
        raise MethodError(
            f"{method} needs the singular values of A, which {A.describe()} does not know: "
            "use eps, pigdm, mmps or diffpir, or an operator with an exact solve"
        )


def ddpm_grid(schedule: Schedule, steps: int, power: float = 1.0) -> Tensor:
    """Times of ``schedule`` with the noise of DDPM's, then 0: ``(steps + 1,)``, float64.

    Uniform in DDPM's time; with a ``power`` over 1, denser at low noise. Starts and ends where the schedule does when
    it reaches less far than DDPM's 1000 steps.
    """
    ddpm = VP()
    ends = schedule.ratio(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    high, low = ddpm.time(ends).clamp(1e-3, 1.0).tolist()
    t = high + (low - high) * torch.linspace(0, 1, steps, dtype=torch.float64) ** (1 / power)
    return torch.cat([schedule.time(ddpm.ratio(t)).clamp(schedule.t_min, schedule.t_max), t.new_zeros(1)])


@torch.no_grad()
def draw(
    posterior: ExactPosterior,
    n: int,
    seed: Seed,
    advance: Advance,
    grid: Tensor,
    method: Callable[[Problem], Transition],
    **settings: Any,
) -> Estimate:
    """Samples by the transition that ``method`` makes for a problem, along a grid of times that ends at 0.

    Args:
        posterior, n, seed, advance: as in :class:`Method`.
        grid: decreasing times, ``(steps + 1,)``.
        method: called once for every batch of samples.
        **settings: kept in the estimate.
    """
    batch, signal = posterior.shape[0], posterior.shape[1:]
    ratios = [float(r) for r in posterior.schedule.ratio(grid)]
    tied = posterior.A.samples(len(posterior.shape)) is not None
    at_once = 1 if tied else max(1, PIXELS_AT_ONCE // (batch * math.prod(signal[-2:])))
    parts, evaluations, backward = [], 0, 0
    for start in range(0, n, at_once):
        copies = range(start, min(start + at_once, n))
        generators = sample_generators(seed, batch, copies)
        expanded = posterior.expand(len(copies)) if len(copies) > 1 else posterior
        problem = Problem(expanded, len(copies), generators, advance)
        transition = method(problem)
        state = State(problem.noise() * ratios[0], ratios[0])
        for q in ratios[1:]:
            state = transition(state, q, problem.denoise, problem.noise)
        parts.append(state.u.reshape(len(copies), batch, *signal))
        evaluations, backward = evaluations + problem.evaluations, backward + problem.backward
    return Estimate(samples=torch.cat(parts), evaluations=evaluations, backward=backward, settings=settings)
