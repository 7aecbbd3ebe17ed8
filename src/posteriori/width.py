r"""How wide a posterior is in its widest direction, for the time grid.

A hole of ``L`` x ``L`` pixels whose brightness is unknown by .3 has a direction, the brightness, in which the posterior
has a standard deviation of ``.3 sqrt(3) L``, far beyond that of a pixel. A sampler that enters below that noise has
decided the direction before its first step.

The measure is that of a smooth Gaussian prior, whose differences of neighbouring pixels are ``N(0, (s/4)^2)`` and
whose colours move together: the precision ``|grad|^2/(s/4)^2 + A^T A/sigma_y^2``, restricted to grey images of at least
sixteen blocks a side. Its smallest eigenvalue comes by Lanczos' process. What is measured at all counts as known to
``s/2``: only wide directions are asked for, and the process then needs few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from posteriori.operators.base import SpectralOperator
from posteriori.posterior import ExactPosterior
from posteriori.smooth import graph_laplacian

__all__ = ["posterior_width"]

BLOCKS = 16
MOST = 48


@torch.no_grad()
def posterior_width(posterior: ExactPosterior) -> float:
    """Standard deviation of the posterior in its widest direction, under the module's Gaussian prior.

    0 stands for "not known": for signals without two axes of at least 16 entries besides their channels, and where
    every measurement of the batch has an operator of its own, because one grid serves the batch and the samples of a
    measurement would depend on its neighbours.

    Args:
        posterior: the problem. Of several noise levels the largest counts.
    """
    A, shape, s = posterior.A, posterior.shape, posterior.denoiser.data_std
    if len(shape) < 4 or min(shape[2:]) < 16 or A.samples(len(shape)) is not None:
        return 0.0
    noise = float(torch.as_tensor(posterior.sigma_y).max())
    most = 4 / s**2  # information on an entry beyond which it is not asked for

    def information(v: Tensor) -> Tensor:
        if isinstance(A, SpectralOperator):
            return A.spectral(lambda lam: (lam / max(noise, 1e-6) ** 2).clamp(max=most), v)
        return A.gram(v) / max(noise**2, 1e-2 * s**2)

    blocks = Blocks(shape[1:], max(1, min(shape[2:]) // BLOCKS), posterior.y.device)
    roughness = shape[1] * (blocks.side * s / 4) ** 2

    def precision(v: Tensor) -> Tensor:
        return blocks.down(information(blocks.up(v))) + graph_laplacian(v, range(v.ndim)) / roughness

    whole = 1 / (s**2 * blocks.entries)  # nothing is wider than the signal itself
    return float((_smallest_eigenvalue(precision, blocks.start()) + whole) ** -0.5)


class Blocks:
    """Grey images that are constant on blocks, as an orthonormal basis of a subspace of the signals.

    Args:
        signal: ``(C, *spatial)``.
        side: of a block; those at the far ends may be cut off.
        device: where.
    """

    def __init__(self, signal: Sequence[int], side: int, device: torch.device) -> None:
        self.signal, self.side, self.device = tuple(signal), side, device
        self.entries = 1
        sizes = torch.tensor(float(signal[0]))
        self._index: list[Tensor] = []
        for n in signal[1:]:
            index = torch.arange(n) // side
            self._index.append(index.to(device))
            sizes = sizes[..., None] * torch.bincount(index)
        for n in signal:
            self.entries *= n
        self.root = sizes.to(device).sqrt()

    def start(self) -> Tensor:
        """Something of every direction, most of the constant: wide directions are smooth."""
        noise = torch.randn(self.root.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        return self.root * (1 + 0.3 * noise)

    def up(self, v: Tensor) -> Tensor:
        """``(1, C, *spatial)`` from coefficients."""
        v = v / self.root
        for axis, index in enumerate(self._index):
            v = v.index_select(axis, index)
        return v.expand(1, *self.signal)

    def down(self, x: Tensor) -> Tensor:
        """The adjoint."""
        v = x[0].sum(0)
        for axis, index in enumerate(self._index):
            shape = (*v.shape[:axis], self.root.shape[axis], *v.shape[axis + 1 :])
            v = v.new_zeros(shape).index_add(axis, index, v)
        return v / self.root


def _smallest_eigenvalue(apply: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """Of a symmetric matrix, from above, by Lanczos' process with full orthogonalisation; to a tenth."""
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    found: list[float] = []
    for _ in range(min(MOST, start.numel())):
        w = apply(basis[-1])
        diagonal.append((w * basis[-1]).sum())
        for _ in range(2):
            for b in basis:
                w = w - (w * b).sum() * b
        norm = w.norm()
        T = torch.diag(torch.stack(diagonal))
        if off:
            between = torch.stack(off)
            T = T + torch.diag(between, 1) + torch.diag(between, -1)
        found.append(max(float(torch.linalg.eigvalsh(T.double())[0]), 0.0))
        settled = len(found) > 8 and found[-1] > 0.98 * found[-8]
        if settled or float(norm) <= 1e-6 * float(T.abs().max()):
            break
        off.append(norm)
        basis.append(w / norm)
    return found[-1]
