"""The training loss against a hand computation, and its minimiser against the Bayes estimate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from posteriori.denoise import Conditioning, NetworkDenoiser, Scaling
from posteriori.objective import NoiseLevels, Problem, eps_loss
from posteriori.operators import Identity, Inpainting, LinearOperator, Matrix, Nothing
from posteriori.schedule import VE, VP, CosineVP, RectifiedFlow, Schedule

F64 = torch.float64
S = 0.6


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Linear(nn.Module):
    """``F = u inputs + v linear + w c_noise``."""

    def __init__(self, u: float = 0.4, v: float = -0.3, w: float = 0.2) -> None:
        super().__init__()
        self.u, self.v, self.w = u, v, w

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        return self.u * inputs + self.v * conditioning.linear + self.w * c_noise[:, None]


class Zero(nn.Module):
    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        return 0 * inputs


def test_loss_by_hand() -> None:
    """Another loss than ``n |D(mu*, y, t) - x_0|^2 / tr c_out(Q)^2``: each group of samples rebuilt from the same
    random numbers with dense matrices (the network's output is rounded to float32: 1e-5)."""
    d, n = 5, 4
    schedule = VE(0.05, 20.0)
    masks = (randn(n, d, seed=1) > 0).double()
    M = randn(3, d, seed=2)
    sigma_y = torch.tensor([0.1, 0.3, 0.05, 0.6], dtype=F64)
    problems = [
        Problem(randn(n, d, seed=3), Inpainting(masks), sigma_y),
        Problem(randn(n, d, seed=4), Matrix(M), sigma_y.flip(0)),
    ]
    levels = NoiseLevels(top_share=0.0)
    denoiser = NetworkDenoiser(Linear(), schedule, Scaling("edm", S))
    torch.manual_seed(0)
    loss, each = eps_loss(denoiser, problems, levels, torch.Generator().manual_seed(5))
    assert each.shape == (2 * n,)
    assert not each.requires_grad
    torch.testing.assert_close(loss, each.mean())

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    eye, row = torch.eye(d, dtype=F64), 0
    for p in problems:
        q = levels.draw(n, schedule, generator)  # VE: time is noise
        x_t = p.x_0 + q[:, None] * torch.randn(n, d, dtype=F64)
        noise = torch.randn(n, 3 if isinstance(p.A, Matrix) else d, dtype=F64)
        for i in range(n):
            A = M if isinstance(p.A, Matrix) else torch.diag(masks[i])
            y = A @ p.x_0[i] + p.sigma_y[i] * noise[i]
            precision = eye / q[i] ** 2 + A.T @ A / p.sigma_y[i] ** 2
            h = x_t[i] / q[i] ** 2 + A.T @ y / p.sigma_y[i] ** 2
            lam, v = torch.linalg.eigh(precision)
            Q = lam.rsqrt()
            mu, x_lin = torch.linalg.solve(precision, h), torch.linalg.solve(precision + eye / S**2, h)
            c_in, c_out = (Q**2 + S**2).rsqrt(), Q * S * (Q**2 + S**2).rsqrt()
            inputs = v @ (c_in * (v.T @ mu))
            f = 0.4 * inputs - 0.3 * x_lin / S + 0.2 * q[i].log() / 4
            mean = x_lin + v @ (c_out * (v.T @ f))
            expected = (mean - p.x_0[i]).square().sum() / c_out.square().sum()
            assert math.isclose(float(each[row]), float(expected), rel_tol=1e-5)
            row += 1


@pytest.mark.parametrize("schedule", [VE(), VP(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_weight_is_edms_where_nothing_is_measured(schedule: Schedule) -> None:
    """Unconditional training would not be EDM's: lambda(sigma) = (sigma^2 + s^2)/(sigma s)^2 (1e-5)."""
    n, d = 64, 6
    denoiser = NetworkDenoiser(Zero(), schedule, Scaling("edm", S))
    x_0 = randn(n, d)
    problem = Problem(x_0, Nothing(), torch.full((n,), 0.1, dtype=F64))
    torch.manual_seed(1)
    _, each = eps_loss(denoiser, [problem], NoiseLevels(), torch.Generator().manual_seed(2))
    torch.manual_seed(1)
    t = NoiseLevels().draw(n, schedule, torch.Generator().manual_seed(2))
    q = schedule.ratio(t)[:, None]
    u = x_0 + q * torch.randn(n, d, dtype=F64)
    error = (S**2 / (q**2 + S**2) * u - x_0).square().mean(1)
    expected = (q**2 + S**2).flatten() / (q.flatten() * S) ** 2 * error
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("A", [Identity(), Matrix(randn(4, 8, seed=7)), Nothing()], ids=str)
def test_every_draw_counts_alike(A: LinearOperator) -> None:
    """The weight would favour easy or hard problems: data that are Gaussian with the assumed standard deviation, and
    the linear estimate, which is then optimal, give a loss of 1 at every noise (5 standard errors of 4,000 draws)."""
    n, d = 4000, 8
    denoiser = NetworkDenoiser(Zero(), VE(), Scaling("edm", S))
    torch.manual_seed(3)
    for sigma_y in (0.02, 0.5):
        problem = Problem(S * randn(n, d, seed=8), A, torch.full((n,), sigma_y, dtype=F64))
        loss, each = eps_loss(denoiser, [problem], NoiseLevels(), torch.Generator().manual_seed(4))
        assert abs(float(loss) - 1) < 5 * float(each.std()) / math.sqrt(n)


@pytest.mark.parametrize("form", ["spectral", "scalar", "paper", "palette"])
def test_groups_do_not_mix(form: str) -> None:
    """Operators that share one evaluation of the network would get each other's samples."""
    denoiser = NetworkDenoiser(Linear(), VE(), Scaling("edm", S), form)  # type: ignore[arg-type]
    problems = [
        Problem(randn(3, 4, seed=1), Inpainting(torch.tensor([1.0, 0, 1, 0])), torch.full((3,), 0.1, dtype=F64)),
        Problem(randn(2, 4, seed=2), Nothing(), torch.full((2,), 0.2, dtype=F64)),
        Problem(randn(1, 4, seed=3), Matrix(randn(2, 4)), torch.full((1,), 0.3, dtype=F64)),
    ]
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(6)
    _, together = eps_loss(denoiser, problems, NoiseLevels(), generator)
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(6)
    alone = [eps_loss(denoiser, [p], NoiseLevels(), generator)[1] for p in problems]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


def test_minimiser_is_the_posterior_mean() -> None:
    """Training would converge to something else than E[x_0 | x_t, y].

    Gaussian data, one noise level, one operator: the Bayes error is known, ``tr (Lambda + C^-1)^-1 / n`` over the
    weight, and a linear network can reach it. From 20,000 fresh draws: within 2 % above, and not below by more than
    4 standard errors. The zero network, the best for isotropic data, is at least 20 % above.
    """
    d, sigma_y, q = 4, 0.2, 0.8
    root = randn(d, d, seed=1) / 2
    C = root @ root.T + 0.02 * torch.eye(d, dtype=F64)
    M = randn(2, d, seed=2)
    schedule = VE(0.01, q)
    levels = NoiseLevels(top_share=1.0, high_share=0.0)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2 * d, d, dtype=F64)
            nn.init.zeros_(self.layer.weight)

        def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
            return self.layer(torch.cat([inputs, conditioning.linear], 1))

    network = Network()
    denoiser = NetworkDenoiser(network, schedule, Scaling("edm", S))
    factor = torch.linalg.cholesky(C)

    def draw(n: int) -> Problem:
        return Problem(torch.randn(n, d, dtype=F64) @ factor.T, Matrix(M), torch.full((n,), sigma_y, dtype=F64))

    precision = torch.eye(d, dtype=F64) / q**2 + M.T @ M / sigma_y**2
    weight = torch.linalg.inv(precision + torch.eye(d, dtype=F64) / S**2).trace() / d
    bayes = float(torch.linalg.inv(precision + torch.linalg.inv(C)).trace() / d / weight)
    torch.manual_seed(0)
    before, _ = eps_loss(denoiser, [draw(20_000)], levels)
    assert float(before.detach()) > 1.2 * bayes
    optimizer = torch.optim.Adam(network.parameters(), 0.03)
    schedule_rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
    for _ in range(400):
        loss, _ = eps_loss(denoiser, [draw(256)], levels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule_rate.step()
    after, each = eps_loss(denoiser, [draw(20_000)], levels)
    error = float(each.std()) / math.sqrt(20_000)
    assert bayes - 4 * error < float(after.detach()) < 1.02 * bayes + 4 * error


@pytest.mark.parametrize("schedule", [VE(), VP(), CosineVP(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_noise_levels_stay_on_the_schedule(schedule: Schedule) -> None:
    """Times outside of the schedule train a network that is never asked, or do not exist (a flow at t = 1)."""
    wide = NoiseLevels(mean=0.0, std=5.0)
    t = wide.draw(20_000, schedule, torch.Generator().manual_seed(0))
    assert t.dtype == F64
    assert float(t.min()) >= schedule.t_min
    assert float(t.max()) <= schedule.t_max


def test_noise_levels_have_their_shares() -> None:
    """Too little training where the posterior mean is made, or too little elsewhere: shares within 4 standard errors
    of 20,000 draws, distributions by Kolmogorov-Smirnov at p > 0.001."""
    n, schedule = 20_000, VE(1e-6, 80.0)
    levels = NoiseLevels(mean=-1.2, std=1.2, high_share=0.25, top_share=0.1, high_low=2.0)
    q = levels.draw(n, schedule, torch.Generator().manual_seed(1)).numpy()

    def share_is(share: float, count: int) -> bool:
        return abs(count / n - share) < 4 * math.sqrt(share * (1 - share) / n)

    assert share_is(0.1, int((q == 80.0).sum()))
    generator = torch.Generator().manual_seed(2)
    # the high share lies in [2, 80) beside the tail of the log-normal
    tail = float(stats.norm.sf(math.log(2.0), -1.2, 1.2))
    assert share_is(0.25 + 0.65 * tail, int(((q >= 2.0) & (q < 80.0)).sum()))
    only_high = NoiseLevels(high_share=1.0, top_share=0.0, high_low=2.0).draw(n, schedule, generator).log().numpy()
    assert stats.kstest(only_high, "uniform", (math.log(2.0), math.log(40.0))).pvalue > 1e-3
    only_normal = (
        NoiseLevels(mean=-1.2, std=1.2, high_share=0.0, top_share=0.0).draw(n, schedule, generator).log().numpy()
    )
    assert stats.kstest(only_normal, "norm", (-1.2, 1.2)).pvalue > 1e-3


def test_noise_levels_follow_their_generator() -> None:
    """A resumed run would see other noise than an uninterrupted one."""
    draws = [NoiseLevels().draw(50, VE(), torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(draws[0], draws[1])
    torch.manual_seed(8)
    free = NoiseLevels().draw(50, VE())
    torch.manual_seed(8)
    assert torch.equal(free, NoiseLevels().draw(50, VE()))
    assert not np.allclose(free.numpy(), draws[0].numpy())


def test_gradient_reaches_the_network_alone() -> None:
    """The loss could not be minimised, or the graph would hold every solve."""
    network = nn.Linear(4, 4, dtype=F64)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = network

        def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
            assert not inputs.requires_grad
            return self.layer(inputs)

    denoiser = NetworkDenoiser(Wrapped(), VE())
    problem = Problem(randn(3, 4), Matrix(randn(2, 4)), torch.full((3,), 0.1, dtype=F64))
    loss, _ = eps_loss(denoiser, [problem], NoiseLevels())
    loss.backward()
    assert float(network.weight.grad.abs().sum()) > 0


class Told(nn.Module):
    """Predicts the class it is told."""

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.classes is not None
        return conditioning.classes.to(inputs)[:, None].expand_as(inputs)


def test_classes_reach_their_own_samples() -> None:
    """A class-conditional model is fine-tuned with no labels, or with those of the batch's other groups."""
    denoiser = NetworkDenoiser(Told(), VE(0.05, 20.0), Scaling("x_0", S), "scalar")
    groups = [torch.tensor([3, 1]), torch.tensor([2, 0, 5])]
    operators: list[LinearOperator] = [Identity(), Nothing()]
    problems = [
        Problem(c.to(F64)[:, None].expand(-1, 4), A, torch.full((len(c),), 0.1, dtype=F64), c)
        for c, A in zip(groups, operators, strict=True)
    ]
    _, each = eps_loss(denoiser, problems, NoiseLevels())
    assert float(each.max()) == 0
    with pytest.raises(ValueError, match="give them for all"):
        eps_loss(denoiser, [problems[0], Problem(problems[1].x_0, Nothing(), problems[1].sigma_y)], NoiseLevels())
