r"""Zero-shot pivot (EPS paper, section 4): the pretrained denoiser queried at the pivot, without training.

    E[x_0 | x_t, y] = E[x_0 | mu* = x_0 + N(0, Sigma*)]  ~  D(mu*; q*),      q*^2 = tr Sigma* / n

The noise of the pivot is taken for the isotropic one with the same trace: all that a pretrained denoiser can be asked
for. Exact where ``Sigma*`` is isotropic (denoising); where pixels are missing it is too large for the measured ones and
too small for the missing ones. Sampled like EPS.

Deviations: ``q*`` is kept within the levels that the denoiser knows.
"""

from __future__ import annotations

from torch import Tensor

from posteriori.methods.base import Advance, Estimate, Problem, Seed, draw
from posteriori.pivot import noise_variance, pivot
from posteriori.posterior import ExactPosterior
from posteriori.sample import Mean, Noise, State, Transition, dpmpp


def zero_shot_pivot(posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance) -> Estimate:
    """The zero-shot pivot with ``nfe`` steps of DPM-Solver++(2M), one evaluation each.

    Args:
        posterior, n, nfe, seed, advance: as for every method.
    """

    def method(problem: Problem) -> Transition:
        A = problem.A

        def conditional(u: Tensor, q: float) -> Tensor:
            scales = {"alpha_t": 1.0, "sigma_t": q, "sigma_y": problem.sigma_y}
            mu = pivot(u, problem.y, A, **scales, guess=u)
            variance = A.spectral_diagonal(noise_variance(A, u, **scales), u).clamp_min(0).expand(u.shape)
            return problem.denoise(mu, variance.flatten(1).mean(1).sqrt())

        def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
            return dpmpp(state, q, conditional, noise)

        return step

    return draw(posterior, n, seed, advance, posterior.schedule.grid(nfe), method)
