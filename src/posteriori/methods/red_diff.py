r"""RED-diff, regularisation by denoising diffusion (Mardani et al. 2024, arXiv 2305.04391, algorithm 1).

    minimise over mu   |y - A mu|^2 / (2 m)  +  weight sum_t q_t E <stop_gradient(noise_hat(mu + q_t z) - z), mu> / n

by Adam, one noise level per step from the largest down. With ``q_t (noise_hat - z) = mu - D(mu + q_t z; q_t)`` the
gradient is ``-A^T (y - A mu)/m + weight (mu - D)/n``; ``m`` and ``n`` count measurements and pixels. It seeks a mode:
what differs between its samples is the randomness of the optimisation, not the posterior.

Settings: the authors' code (github.com/NVlabs/RED-diff, ``_configs/algo/reddiff.yaml``): ``weight`` 0.25 and ``rate``
0.1, at 1000 steps (``sample_batch.sh``); its README takes a rate of 0.5 at 100 steps. All are for measurements without
noise; the one noisy example (inpainting, noise 0.1, ``sample_test.sh``) has 1.0 and 0.25. No task has its own.

Deviations: starts at the linear estimate, where the paper takes ``A^+ y``, which does not exist for every operator and
amplifies the noise of a blur. Means over ``m`` and ``n`` are those of the authors' code; the paper writes sums.
"""

from __future__ import annotations

import torch

from posteriori.methods.base import Advance, Estimate, Problem, Seed, ddpm_grid, draw
from posteriori.methods.classical import linear_answer
from posteriori.operators.base import per_sample
from posteriori.posterior import ExactPosterior
from posteriori.sample import Mean, Noise, State, Transition


def red_diff(
    posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance, weight: float = 0.25, rate: float = 0.1
) -> Estimate:
    """RED-diff with ``nfe`` steps of Adam (betas 0.9 and 0.99) of one evaluation each.

    Args:
        posterior, n, nfe, seed, advance: as for every method. The paper takes 1000 steps.
        weight: of the regulariser, the paper's lambda.
        rate: learning rate; fewer steps need a larger one.
    """

    def method(problem: Problem) -> Transition:
        mu = linear_answer(problem.posterior)
        optimizer = torch.optim.Adam([mu], lr=rate, betas=(0.9, 0.99))
        pixels, measured = mu[0].numel(), per_sample(problem.A.measurement_count(problem.y), mu)

        def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
            d = mean(mu + state.q * noise(), state.q)
            mu.grad = weight * (mu - d) / pixels - problem.A.adjoint(problem.residual(mu)) / measured
            optimizer.step()
            return State(mu.clone(), q)

        return step

    return draw(posterior, n, seed, advance, ddpm_grid(posterior.schedule, nfe), method, weight=weight, rate=rate)
