"""Networks as denoisers: unconditional where nothing is measured, and the dense formulas where something is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import posteriori as po
from posteriori.denoise import Conditioning, NetworkDenoiser, Posterior, Scaling
from posteriori.operators import (
    CircularConvolution,
    Downsampling,
    GaussianBlur,
    Inpainting,
    LinearOperator,
    Matrix,
    Nothing,
)
from posteriori.schedule import VE, VP, CosineVP, RectifiedFlow, Schedule

F64 = torch.float64
SHAPE = (2, 3, 4)
N = math.prod(SHAPE)
KINDS = ["edm", "epsilon", "v", "flow", "x_0"]
FORMS = ["spectral", "scalar", "paper", "palette"]
SCHEDULES = [VE(), VP(), CosineVP(), RectifiedFlow()]
S = 0.6  # standard deviation of the data, not the default


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Ignorant(nn.Module):
    """A random nonlinear network of the image and the noise label that ignores what it is told of the measurement."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight, self.bias = randn(N, N, seed=seed) / N**0.5, randn(N, seed=seed + 1)

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = torch.tanh(inputs.flatten(1) @ self.weight + c_noise[:, None] * self.bias)
        return (hidden @ self.weight.T).reshape(inputs.shape)


class Widened(nn.Module):
    """A pretrained convolution with four new channels for the conditioning, their weights still zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 5, 3, padding=1, dtype=F64)
        self.last = nn.Conv2d(5, 2, 3, padding=1, dtype=F64)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=F64) / 3)
            self.first.weight[:, 2:] = 0
        self.requires_grad_(False)

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = torch.cat([inputs, conditioning.channels()], 1)
        return self.last(torch.tanh(self.first(x) + c_noise[:, None, None, None]))


class Attentive(nn.Module):
    """Uses everything it is told, each part differently."""

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        told = 0.3 * conditioning.linear - 0.7 * conditioning.diagonal
        labels = (c_noise * conditioning.sigma_y).reshape(-1, 1, 1, 1)
        return torch.sin(1.3 * inputs.flip(-1) + told) + labels


def coefficients(kind: str, q: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """``c_skip, c_out, c_in`` as printed in the papers, each written out on its own."""
    alpha_vp = 1 / torch.sqrt(1 + q**2)  # variance preserving: alpha^2 + sigma^2 = 1, q = sigma/alpha
    sigma_vp = q / torch.sqrt(1 + q**2)
    t_flow = q / (1 + q)  # rectified flow: alpha = 1 - t, sigma = t
    if kind == "edm":  # Karras et al. 2022, table 1
        return s**2 / (q**2 + s**2), q * s / torch.sqrt(s**2 + q**2), 1 / torch.sqrt(s**2 + q**2)
    if kind == "epsilon":  # x_0 = (x_t - sigma F(x_t))/alpha, x_t = alpha u
        return torch.ones_like(q), -sigma_vp / alpha_vp, alpha_vp
    if kind == "v":  # Salimans & Ho 2022: x_0 = alpha x_t - sigma F(x_t)
        return alpha_vp**2, -sigma_vp, alpha_vp
    if kind == "flow":  # x_0 = x_t - t F(x_t), x_t = (1 - t) u
        return 1 - t_flow, -t_flow, 1 - t_flow
    return torch.zeros_like(q), torch.ones_like(q), alpha_vp


def times(schedule: Schedule, n: int) -> Tensor:
    q = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=F64)).log()
    return schedule.time(torch.linspace(float(q[0]), float(q[1]), n, dtype=F64).exp())


@pytest.mark.parametrize("network", [Ignorant(), Widened()], ids=["ignorant", "widened"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_measured_is_the_unconditional_denoiser(
    form: str, kind: str, schedule: Schedule, network: nn.Module
) -> None:
    """A pretrained model would be another model the moment it is wrapped; with A = 0 every form must be
    ``D_0(u; q) = c_skip u + c_out F(c_in u, c_noise)``, here written out (float64, relative error 1e-9)."""
    batch = 4  # as many samples as columns
    denoiser = NetworkDenoiser(network, schedule, Scaling(kind, S), form)  # type: ignore[arg-type]
    t = times(schedule, batch)
    alpha, sigma = schedule.alpha(t).reshape(-1, 1, 1, 1), schedule.sigma(t).reshape(-1, 1, 1, 1)
    x_t = alpha * randn(batch, *SHAPE, seed=1) + sigma * randn(batch, *SHAPE, seed=2)
    u, q = x_t / alpha, sigma / alpha
    skip, out, scale = coefficients(kind, q, S)
    nothing = Conditioning(0 * u, 1 + 0 * u, torch.ones(batch, dtype=F64))
    expected = skip * u + out * network(scale * u, q.flatten().log() / 4, nothing)
    for time, y, sigma_y in [
        (t, torch.zeros_like(x_t), 0.05),
        (t, torch.zeros_like(x_t), torch.logspace(-2, 0, batch, dtype=F64)),
        (t, torch.zeros_like(x_t), 0.0),
        (t, randn(*x_t.shape, seed=3), 0.3),  # whatever stands in y was not measured
    ]:
        mean = denoiser(x_t, time, Nothing(), y, sigma_y).mean
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    mean = denoiser(x_t, float(t[2]), Nothing(), torch.zeros_like(x_t), 0.05).mean  # one time for all
    torch.testing.assert_close(mean[2], expected[2], rtol=1e-9, atol=1e-9 * float(expected[2].abs().max()))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_measured_in_single_precision(form: str) -> None:
    """The same to float32 rounding, in the precision that models run in (1e-5)."""
    network = Ignorant()
    network.weight, network.bias = network.weight.float(), network.bias.float()
    denoiser = NetworkDenoiser(network, VE(), Scaling("edm", S), form)  # type: ignore[arg-type]
    t = times(VE(), 4)
    q = t.reshape(-1, 1, 1, 1).float()
    u = (randn(4, *SHAPE) * q).float()
    skip, out, scale = coefficients("edm", q, S)
    nothing = Conditioning(u, u, q.flatten())
    expected = skip * u + out * network(scale * u, q.flatten().log() / 4, nothing)
    mean = denoiser(u, t, Nothing(), torch.zeros_like(u), 0.05).mean
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)


OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "blur": lambda: GaussianBlur(0.8),
    "circular": lambda: CircularConvolution(randn(2, 3, seed=5) / 2),
    "mask per sample": lambda: Inpainting((randn(4, 1, 3, 4, seed=6) > 0).double()),
    "matrix": lambda: Matrix(randn(9, N, seed=7) / 3, SHAPE),
}


def dense(A: LinearOperator, batch: int) -> Tensor:
    columns = []
    for j in range(N):
        e = torch.zeros(batch, N, dtype=F64)
        e[:, j] = 1
        columns.append(A(e.reshape(batch, *SHAPE)).flatten(1))
    return torch.stack(columns, 2)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_measured_is_the_dense_formula(form: str, kind: str, name: str) -> None:
    """The preconditioning of the module's head, with every matrix formed and decomposed (float64, 1e-8): the
    network's inputs, its skip and the matrix on its output."""
    batch = 4
    A = OPERATORS[name]()
    schedule = VP()
    denoiser = NetworkDenoiser(Attentive(), schedule, Scaling(kind, S), form)  # type: ignore[arg-type]
    t = torch.tensor([0.02, 0.2, 0.5, 1.0], dtype=F64)
    sigma_y = torch.tensor([0.3, 0.05, 1.0, 0.1], dtype=F64)
    alpha, sigma = schedule.alpha(t).reshape(-1, 1, 1), schedule.sigma(t).reshape(-1, 1, 1)
    x_t = randn(batch, *SHAPE, seed=8)
    y = po.measure(A, randn(batch, *SHAPE, seed=9), sigma_y, seed=0)
    u, measured, q = x_t.flatten(1).unsqueeze(2) / alpha, y.flatten(1).unsqueeze(2), sigma / alpha

    M, eye, s_y = dense(A, batch), torch.eye(N, dtype=F64), sigma_y.reshape(-1, 1, 1)
    precision = eye / q**2 + M.mT @ M / s_y**2
    pull = M.mT @ measured / s_y**2
    mu = torch.linalg.solve(precision, u / q**2 + pull)
    x_lin = torch.linalg.solve(precision + eye / S**2, u / q**2 + pull)
    x_y = torch.linalg.solve(M.mT @ M / s_y**2 + eye / S**2, pull)
    diagonal = torch.linalg.inv(precision + eye / S**2).diagonal(dim1=1, dim2=2).sqrt() / S
    lam, v = torch.linalg.eigh(precision)

    def at_q(values: Tensor) -> Tensor:  # c(Q), Q = Lambda^(-1/2)
        return (v * values.unsqueeze(1)) @ v.mT

    skip_q, out_q, in_q = (at_q(c) for c in coefficients(kind, lam.rsqrt(), S))
    skip, out, scale = coefficients(kind, q, S)
    if form == "spectral":
        first, skipped, outward, told = in_q @ mu, skip_q @ mu, out_q, x_lin
    elif form == "scalar":
        # the estimate under N(0, v I), v/(v + q^2) = c_skip: for v -> infinity the pivot, for v = 0 nothing
        if kind == "x_0":
            skipped = torch.zeros_like(mu)
        elif kind == "epsilon":
            skipped = mu
        else:
            variance = q**2 * skip / (1 - skip)
            skipped = torch.linalg.solve(precision + eye / variance, u / q**2 + pull)
        first, outward, told = scale * u, out * eye, x_lin
    else:
        centre = mu if form == "paper" else u
        first, skipped, outward, told = scale * centre, skip * centre, out * eye, x_y
    conditioning = Conditioning(told.reshape(x_t.shape) / S, diagonal.reshape(x_t.shape), sigma_y)
    prediction = Attentive()(first.reshape(x_t.shape), q.flatten().log() / 4, conditioning)
    expected = (skipped + outward @ prediction.flatten(1).unsqueeze(2)).reshape(x_t.shape)
    mean = denoiser(x_t, t, A, y, sigma_y).mean
    torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


def test_diagonal_of_a_mask_is_the_mask() -> None:
    """The network could not see where it may invent: at high noise the channel is 1 where nothing is known, and the
    size of the measurement noise where something is."""
    mask = torch.tensor([1.0, 0, 1, 0], dtype=F64)
    seen: list[Conditioning] = []

    class Recorder(nn.Module):
        def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
            seen.append(conditioning)
            return inputs

    denoiser = NetworkDenoiser(Recorder(), VE(), Scaling("edm", S))
    denoiser(torch.zeros(1, *SHAPE, dtype=F64), 80.0, Inpainting(mask), torch.zeros(1, *SHAPE, dtype=F64), 0.06)
    expected = torch.where(mask > 0, 0.06 / math.sqrt(S**2 + 0.06**2), mask + 1).expand(1, *SHAPE)
    torch.testing.assert_close(seen[0].diagonal, expected, rtol=0, atol=1e-4)
    assert seen[0].sigma_y.tolist() == [0.06]
    assert seen[0].channels().shape == (1, 4, 3, 4)


def test_noise_label() -> None:
    """A network with its own noise label would be told EDM's: the function gets q in float64, one per sample."""
    asked: list[Tensor] = []

    def label(q: Tensor) -> Tensor:
        asked.append(q)
        return 1000 * q

    given: list[Tensor] = []

    class Network(nn.Module):
        def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
            given.append(c_noise)
            return inputs

    schedule = RectifiedFlow()
    denoiser = NetworkDenoiser(Network(), schedule, Scaling("flow"), c_noise=label)
    x = torch.zeros(3, *SHAPE)
    denoiser(x, 0.25, Nothing(), x, 0.1)
    assert asked[0].dtype == F64
    torch.testing.assert_close(asked[0], torch.full((3,), 1 / 3, dtype=F64))
    assert given[0].dtype == torch.float32
    torch.testing.assert_close(given[0], torch.full((3,), 1000 / 3))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_posterior_identities(schedule: Schedule) -> None:
    """Mean, noise and score of one posterior that contradict each other (1e-10)."""
    t = times(schedule, 4)
    x_t = randn(4, *SHAPE)
    denoiser = NetworkDenoiser(Ignorant(), schedule, Scaling("v"))
    posterior = denoiser(x_t, t, Nothing(), torch.zeros_like(x_t), 0.1)
    alpha, sigma = schedule.alpha(t).reshape(-1, 1, 1, 1), schedule.sigma(t).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(posterior.alpha_t, alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(posterior.sigma_t, sigma, rtol=1e-12, atol=0)
    rebuilt = alpha * posterior.mean + sigma * posterior.noise
    torch.testing.assert_close(rebuilt, x_t, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.score, -posterior.noise / sigma, rtol=1e-10, atol=1e-10)
    hand = Posterior(torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor(0.5), torch.tensor(2.0))
    assert hand.noise.item() == 1.25  # (3 - 0.5)/2
    assert hand.score.item() == -0.625  # (0.5 - 3)/4


def network_denoiser(**options: object) -> NetworkDenoiser:
    return NetworkDenoiser(Ignorant(), VE(), **options)  # type: ignore[arg-type]


def test_posterior_refuses_bad_measurements() -> None:
    """NaN would spread over the picture; a noise level the network has never seen would be answered all the same."""
    A, y = Downsampling(1), randn(3, *SHAPE)
    denoiser = network_denoiser(sigma_y_range=(0.01, 0.2))
    for bad in (math.nan, math.inf):
        broken = y.clone()
        broken[1, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="measurement holds NaN or infinite"):
            po.ExactPosterior(denoiser, A, broken, 0.1)
        with pytest.raises(ValueError, match="finite and not negative"):
            po.ExactPosterior(denoiser, A, y, bad)
    with pytest.raises(ValueError, match="finite and not negative"):
        po.ExactPosterior(denoiser, A, y, -0.1)
    with pytest.raises(ValueError, match="2 values of sigma_y do not fit a batch of 3"):
        po.ExactPosterior(denoiser, A, y, torch.tensor([0.1, 0.1]))
    for outside in (0.005, 0.3, torch.tensor([0.1, 0.1, 0.5]), torch.tensor([0.1, 0.001, 0.1])):
        with pytest.raises(ValueError, match=r"trained for sigma_y in \[0.01, 0.2\]"):
            po.ExactPosterior(denoiser, A, y, outside)
    for inside in (0.01, 0.2, torch.tensor([0.01, 0.05, 0.2])):
        po.ExactPosterior(denoiser, A, y, inside)
    po.ExactPosterior(network_denoiser(), A, y, 5.0)  # no range, no refusal


def test_unknown_forms_are_refused() -> None:
    """A misspelt option would fall through to another form."""
    with pytest.raises(ValueError, match="unknown preconditioning 'spectra'"):
        network_denoiser(preconditioning="spectra")
    with pytest.raises(ValueError, match="unknown parametrization 'eps'"):
        Scaling("eps")  # type: ignore[arg-type]


def test_mean_does_not_depend_on_the_batch() -> None:
    """The best estimate of a photo would change with its neighbours, or between two calls."""
    y = randn(4, 2, 1, 2)
    posterior = po.ExactPosterior(network_denoiser(), Downsampling(3), y[:, :, :, :1], 0.1)
    assert posterior.shape == (4, 2, 3, 3)
    A = Matrix(randn(5, N, seed=1), SHAPE)
    y = randn(4, 5, seed=2)
    sigma_y = torch.tensor([0.05, 0.1, 0.2, 0.4], dtype=F64)
    together = po.ExactPosterior(network_denoiser(), A, y, sigma_y)
    mean = together.mean()
    assert torch.equal(mean, together.mean())
    assert mean.dtype == F64
    assert not mean.requires_grad
    for i in range(2):  # noise of sample i belongs to its place in the batch
        alone = po.ExactPosterior(network_denoiser(), A, y[: i + 1], sigma_y[: i + 1]).mean()
        torch.testing.assert_close(alone, mean[: i + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_blind_mean(schedule: Schedule) -> None:
    """The mean of a network that learned it without ``x_t`` would depend on the seed; or samples would start blind."""
    A, y = Matrix(randn(5, N, seed=1), SHAPE), randn(3, 5, seed=2)
    blind = NetworkDenoiser(Attentive(), schedule, Scaling("edm", S), blind_mean=True)
    seeing = NetworkDenoiser(Attentive(), schedule, Scaling("edm", S))
    mean = po.ExactPosterior(blind, A, y, 0.1).mean(0)
    assert torch.equal(mean, po.ExactPosterior(blind, A, y, 0.1).mean(1))
    nothing = torch.zeros(3, *SHAPE, dtype=F64)
    assert torch.equal(mean, seeing(nothing, schedule.t_max, A, y, 0.1).mean)
    x_t = randn(3, *SHAPE, seed=3)
    for t in (schedule.t_max, 0.5):
        assert torch.equal(blind(x_t, t, A, y, 0.1).mean, seeing(x_t, t, A, y, 0.1).mean)


def test_denoise_and_score_are_the_denoisers() -> None:
    """The posterior's score would belong to another problem than its denoiser's mean."""
    A, y = Matrix(randn(5, N, seed=1), SHAPE), randn(3, 5, seed=2)
    denoiser, x_t = network_denoiser(), randn(3, *SHAPE, seed=3)
    posterior = po.ExactPosterior(denoiser, A, y, 0.1)
    assert posterior.schedule is denoiser.schedule
    expected = denoiser(x_t, 2.0, A, y, 0.1)
    assert torch.equal(posterior.denoise(x_t, 2.0).mean, expected.mean)
    assert torch.equal(posterior.score(x_t, 2.0), (expected.mean - x_t) / 4)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 1)], ids=str)
def test_expanded_problem_is_sample_major(shape: tuple[int, ...]) -> None:
    """Copies would get another sample's measurement or noise level."""
    y, sigma_y = randn(2, 5), torch.tensor([0.1, 0.2], dtype=F64)
    posterior = po.ExactPosterior(network_denoiser(), Matrix(randn(5, N, seed=1), SHAPE), y, sigma_y.reshape(shape))
    expanded = posterior.expand(3)
    assert expanded.shape == (6, *SHAPE)
    for k in range(3):
        assert torch.equal(expanded.y[2 * k : 2 * k + 2], y)
    assert torch.as_tensor(expanded.sigma_y).tolist() == [0.1, 0.2] * 3
    x_t = randn(6, *SHAPE)
    for k in range(3):
        part = slice(2 * k, 2 * k + 2)
        torch.testing.assert_close(
            expanded.denoise(x_t, 1.0).mean[part], posterior.denoise(x_t[part], 1.0).mean, rtol=1e-10, atol=1e-10
        )
    assert po.ExactPosterior(network_denoiser(), Downsampling(1), randn(2, *SHAPE), 0.3).expand(2).sigma_y == 0.3
    tied = po.ExactPosterior(network_denoiser(), OPERATORS["mask per sample"](), randn(4, *SHAPE), 0.1)
    with pytest.raises(ValueError, match="cannot be expanded"):
        tied.expand(2)
