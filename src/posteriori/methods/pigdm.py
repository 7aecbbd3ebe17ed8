r"""PiGDM (Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems", ICLR).

    p(x_0 | u) is taken for N(D, r^2 I),     r^2 = q^2 / (1 + q^2)
    g = (dD/du)^T A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A D)              the gradient of log p(y | u)
    "published":  u' = DDIM(D) + r^2 g               "tweedie":  u' = DDIM(D + q^2 g),  D + q^2 g = E[x_0 | u, y]

The noisy form; ``A^T (r^2 A A^T + sigma_y^2 I)^-1 = (r^2 A^T A + sigma_y^2 I)^-1 A^T`` makes it one ``gram_solve``, for
every operator and batch. ``"published"`` is the paper's algorithm 1: guidance with the weight ``r^2``, after a step
whose predicted noise stays the prior's. ``"tweedie"`` puts the same score into DDIM with the weight that Tweedie's
formula gives it: exact when ``D`` is the denoiser of ``N(m, s^2 I)`` and ``r^2 = q^2 s^2/(q^2 + s^2)``, where the other
is not.

Settings: 100 steps and eta = 1 for noisy measurements, from the authors' code (github.com/NVlabs/RED-diff,
``sample_test.sh``; ``algos/pgdm.py`` is the form without noise, with the weight ``sqrt(alpha_s alpha_t)`` that is 1 in
``u``). The noisy form with this weight is also that of github.com/francois-rozet/mmps-benchmark. No setting is tuned.
"""

from __future__ import annotations

from typing import Literal

from posteriori.methods.base import Advance, Estimate, Problem, Seed, ddpm_grid, draw
from posteriori.posterior import ExactPosterior
from posteriori.sample import Mean, Noise, State, Transition, ddim


def pigdm(
    posterior: ExactPosterior,
    n: int,
    nfe: int,
    seed: Seed,
    advance: Advance,
    eta: float = 1.0,
    prior_std: float = 1.0,
    guidance: Literal["published", "tweedie"] = "tweedie",
) -> Estimate:
    """PiGDM with ``nfe`` steps, one evaluation and one backward pass each.

    Args:
        posterior, n, nfe, seed, advance: as for every method. The paper takes 100 steps.
        eta: fresh noise of DDIM.
        prior_std: ``s`` of ``r^2 = q^2 s^2 / (q^2 + s^2)``; the paper's data have unit variance.
        guidance: how the score of the measurement enters, see the module's head.
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
            push = pull_back(towards)  # r^2 g
            if guidance == "published":
                return State(transition(state, q, lambda u, q: d, noise).u + push, q)
            return transition(state, q, lambda u, q: d + state.q**2 / variance * push, noise)

        return step

    grid = ddpm_grid(posterior.schedule, nfe)
    return draw(posterior, n, seed, advance, grid, method, eta=eta, prior_std=prior_std, guidance=guidance)
