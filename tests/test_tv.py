"""Total variation: the minimiser itself, whoever computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posteriori.methods.tv import total_variation, tv
from posteriori.operators import Blur, Downsampling, GaussianBlur, Identity, Inpainting, LinearOperator, motion_kernel


def scene(seed: int = 0, size: int = 12, channels: int = 3, batch: int = 1) -> Tensor:
    """Piecewise constant colours with a little texture, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, channels, 4, 4, generator=generator, dtype=torch.float64) * 1.6 - 0.8
    x = x.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)
    return x + 0.05 * torch.randn(x.shape, generator=generator, dtype=torch.float64)


def energy(A: LinearOperator, x: Tensor, y: Tensor, weight: float) -> Tensor:
    """The objective, with differences written out by indexing."""
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    down[..., :-1, :], right[..., :-1] = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
    length = (down**2 + right**2).sum(1).sqrt().sum((1, 2))
    observed = A.observed(y)
    r = A(x) - y if observed is None else (A(x) - y) * observed
    return 0.5 * r.square().flatten(1).sum(1) + weight * length


def primal_dual(matrix: Tensor, y: Tensor, shape: tuple[int, ...], weight: float, steps: int) -> Tensor:
    """Chambolle & Pock (2011), both terms dual, with dense matrices: a different algorithm for the same minimum."""
    _, c, h, w = shape
    eye = torch.eye(c * h * w, dtype=torch.float64).reshape(-1, c, h, w)
    down, right = torch.zeros_like(eye), torch.zeros_like(eye)
    down[..., :-1, :], right[..., :-1] = eye.diff(dim=-2), eye.diff(dim=-1)
    difference = torch.cat([down, right], 1).flatten(1).T
    x = x_bar = torch.zeros(c * h * w, dtype=torch.float64)
    u, p = torch.zeros(matrix.shape[0], dtype=torch.float64), torch.zeros(2 * c * h * w, dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(matrix, 2) ** 2) + 8
    tau = 10 / norm**0.5
    sigma = 1 / (tau * norm)
    for _ in range(steps):
        u = (u + sigma * (matrix @ x_bar - y.flatten())) / (1 + sigma)
        v = (p + sigma * (difference @ x_bar)).reshape(2 * c, -1)
        p = (v / (v.square().sum(0).sqrt() / weight).clamp_min(1)).flatten()
        new = x - tau * (matrix.T @ u + difference.T @ p)
        x, x_bar = new, 2 * new - x
    return x.reshape(shape)


OPERATORS = {
    "random mask": lambda: Inpainting((torch.rand(12, 12, generator=torch.Generator().manual_seed(3)) < 0.4).float()),
    "box average": lambda: Downsampling(4),
    "Gaussian blur": lambda: GaussianBlur(1.5),
    "motion blur": lambda: Blur(motion_kernel(7, 0.5, 1), "circular"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_minimum_agrees_with_another_algorithm(name: str) -> None:
    """If this failed, the 'converged total variation' of the tables would be something else, and too easy to beat."""
    A, x_0, weight = OPERATORS[name](), scene(channels=2), 0.03
    y = A(x_0) + 0.05 * torch.randn(A(x_0).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    observed = A.observed(y)
    y = y if observed is None else y * observed
    n = x_0.numel()
    matrix = A(torch.eye(n, dtype=torch.float64).reshape(n, *x_0.shape[1:])).flatten(1).T
    other = primal_dual(matrix, y, tuple(x_0.shape), weight, 1500)
    ours = total_variation(A, y, weight, tolerance=1e-7, max_iterations=2000).x
    lowest = float(energy(A, other, y, weight))
    assert abs(float(energy(A, ours, y, weight)) / lowest - 1) < 1e-4
    assert float((ours - other).abs().max()) < 0.02
    # and in single precision at the default tolerance
    single = total_variation(A, y.float(), weight).x
    assert float(energy(A, single.double(), y, weight)) / lowest - 1 < 1e-3


@pytest.mark.parametrize("weight", [0.05, 0.3])
def test_denoising_meets_its_dual_bound(weight: float) -> None:
    """The primal-dual gap certifies a minimum with no second implementation: a gap would mean it is not converged."""
    y = scene(seed=2)
    x = total_variation(Identity(), y, weight, tolerance=1e-8, max_iterations=2000).x
    # any p with |p| <= weight bounds the minimum from below by (|y|^2 - |y - D^T p|^2) / 2
    p = torch.zeros(1, 2, *y.shape[1:], dtype=torch.float64)
    q, momentum = p, 1.0

    def adjoint(p: Tensor) -> Tensor:
        out = torch.zeros_like(y)
        out[..., 1:, :] += p[:, 0, :, :-1, :]
        out[..., :-1, :] -= p[:, 0, :, :-1, :]
        out[..., 1:] += p[:, 1, ..., :-1]
        out[..., :-1] -= p[:, 1, ..., :-1]
        return out

    def forward(z: Tensor) -> Tensor:
        down, right = torch.zeros_like(z), torch.zeros_like(z)
        down[..., :-1, :], right[..., :-1] = z.diff(dim=-2), z.diff(dim=-1)
        return torch.stack([down, right], 1)

    for _ in range(1500):  # projected gradient, accelerated, finds a good one
        v = q + forward(y - adjoint(q)) / 8
        new = v / (v.square().sum((1, 2), keepdim=True).sqrt() / weight).clamp_min(1)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        q, p, momentum = new + (momentum - 1) / following * (new - p), new, following
    bound = 0.5 * float(y.square().sum() - (y - adjoint(p)).square().sum())
    reached = float(energy(Identity(), x, y, weight))
    assert 0 <= reached - bound < 1e-3 * bound


def test_agrees_with_scikit_image_on_grey_images() -> None:
    """A different weight convention would make the weights of the tables meaningless to anyone else."""
    restoration = pytest.importorskip("skimage.restoration")
    y = scene(seed=4, size=32, channels=1)
    theirs = restoration.denoise_tv_chambolle(y[0, 0].numpy(), weight=0.2, eps=1e-10, max_num_iter=5000)
    ours = total_variation(Identity(), y, 0.2, tolerance=1e-7, max_iterations=2000).x[0, 0]
    assert float((ours - torch.from_numpy(theirs)).abs().max()) < 2e-3


def test_colours_share_their_edges() -> None:
    """Channel by channel the value would be larger: coloured fringes would be free, and the baseline weaker."""
    x = torch.zeros(1, 3, 4, 4)
    x[..., 2:] = torch.tensor([1.0, 2.0, 2.0]).reshape(1, 3, 1, 1)
    assert float(tv(x)) == pytest.approx(4 * 3.0)  # four rows, an edge of norm |(1, 2, 2)|


def test_samples_of_a_batch_do_not_meet() -> None:
    """One norm or one stopping weight for the whole batch would make results depend on what else is restored."""
    x_0 = scene(seed=5, batch=2).float()
    weights = torch.tensor([0.02, 0.2])
    both = total_variation(Identity(), x_0, weights)
    alone = [total_variation(Identity(), x_0[i : i + 1], float(weights[i])) for i in range(2)]
    for i in range(2):
        assert float((both.x[i] - alone[i].x[0]).abs().max()) < 1e-3


def test_says_when_it_did_not_converge_and_refuses_bad_weights() -> None:
    """A silent stop would enter an unconverged figure into a table; a weight of 0 has no unique minimum."""
    y = scene().float()
    with pytest.warns(UserWarning, match="after 5 iterations"):
        total_variation(Identity(), y, 0.1, max_iterations=5)
    with pytest.raises(ValueError, match="positive"):
        total_variation(Identity(), y, 0.0)
