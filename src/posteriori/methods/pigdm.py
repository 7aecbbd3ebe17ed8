r"""PiGDM (Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems", ICLR).

    p(x_0 | u) is taken for N(D, r^2 I),     r^2 = q^2 / (1 + q^2)
    E[x_0 | u, y] = D + q^2 (dD/du)^T A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A D)         (Tweedie's formula)

The noisy form; ``A^T (r^2 A A^T + sigma_y^2 I)^-1 = (r^2 A^T A + sigma_y^2 I)^-1 A^T`` makes it one ``gram_solve``, for
every operator and batch. Exact when ``D`` is the denoiser of ``N(m, s^2 I)`` and ``r^2 = q^2 s^2/(q^2 + s^2)``.

Deviation: this is the paper's posterior score put into DDIM (eta = 1) as it is. The paper's algorithm instead adds the
guidance, times ``r^2`` and the scale of the signal, after a DDIM step whose predicted noise stays that of the prior;
with this weight the method is not exact even for the Gaussian it is derived from.
"""

from __future__ import annotations

from posteriori.denoise import ExactPosterior
from posteriori.methods.base import Advance, Estimate, Problem, ddpm_grid, draw
from posteriori.sample import Mean, Noise, State, Transition, ddim


def pigdm(
    posterior: ExactPosterior,
    n: int,
    nfe: int,
    seed: int,
    advance: Advance,
    eta: float = 1.0,
    prior_std: float = 1.0,
) -> Estimate:
    """PiGDM with ``nfe`` steps, one evaluation and one backward pass each.

    Args:
        posterior, n, nfe, seed, advance: as for every method. The paper takes 100 steps.
        eta: fresh noise of DDIM.
        prior_std: ``s`` of ``r^2 = q^2 s^2 / (q^2 + s^2)``; the paper's data have unit variance.
    """
    transition = ddim(eta)

    def method(problem: Problem) -> Transition:
        s_y = problem.scalar(problem.sigma_y)

        def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
            d, pull_back = problem.linearize(state.u, state.q)
            variance = state.q**2 * prior_std**2 / (state.q**2 + prior_std**2)
            if bool((s_y > 0).all()):
                flat = (s_y**2).reshape(-1)
                towards = problem.A.gram_solve(
                    flat, variance, None, variance * problem.residual(d), unit=variance * flat
                )
            else:
                towards = problem.A.pinv(problem.residual(d))
            guided = d + state.q**2 / variance * pull_back(towards)
            return transition(state, q, lambda u, q: guided, noise)

        return step

    grid = ddpm_grid(posterior.schedule, nfe)
    return draw(posterior, n, seed, advance, grid, method, eta=eta, prior_std=prior_std)
