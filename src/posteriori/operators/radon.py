r"""Computed tomography with parallel beams: line integrals of an image.

    (A x)(theta, s) = integral of x along { p : p . (cos theta, -sin theta) = s },      unit: pixels

with ``p`` = (column, row) from the image's centre, the sense of rotation of ``skimage.transform.radon``. A ray is
followed along the axis it is closer to and the image interpolated linearly across it (Joseph 1982). The weights are a
sparse matrix, and the adjoint is its transpose: matched to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import full_precision
from posteriori.operators.dense import Matrix
from posteriori.operators.fourier import CircularConvolution
from posteriori.operators.krylov import KrylovOperator, Surrogate
from posteriori.operators.sparse import CompressedRows

__all__ = ["Radon"]


def joseph_weights(angles: Tensor, size: tuple[int, int], detectors: int, circle: bool) -> CompressedRows:
    """Joseph's weights, a row for every angle and detector."""
    h, w = size
    theta = torch.deg2rad(angles.double())
    offset = torch.arange(detectors, dtype=torch.float64) - detectors // 2
    rows, columns, values = [], [], []
    for k, (c, s) in enumerate(zip(theta.cos().tolist(), theta.sin().tolist(), strict=True)):
        # c column - s row = offset, solved for the coordinate across
        along_rows = abs(c) >= abs(s)
        n_along, n_across = (h, w) if along_rows else (w, h)
        steps = torch.arange(n_along, dtype=torch.float64) - n_along // 2
        across = (offset[:, None] + s * steps) / c if along_rows else (c * steps - offset[:, None]) / s
        across = across + n_across // 2
        ray = (k * detectors + torch.arange(detectors))[:, None].expand(-1, n_along)
        at = torch.arange(n_along).expand(detectors, -1)
        for index in (across.floor(), across.floor() + 1):
            weight = (1 - (across - index).abs()) / max(abs(c), abs(s))
            kept = (index >= 0) & (index < n_across) & (weight > 1e-9)
            row, column = (at, index.long()) if along_rows else (index.long(), at)
            if circle:
                kept &= (row - h // 2) ** 2 + (column - w // 2) ** 2 <= (min(h, w) // 2) ** 2
            rows.append(ray[kept])
            columns.append((row * w + column)[kept])
            values.append(weight[kept])
    return CompressedRows(torch.cat(rows), torch.cat(columns), torch.cat(values), (len(theta) * detectors, h * w))


class Radon(KrylovOperator):
    """Parallel-beam projections. Signals ``(B, ..., H, W)``, measurements ``(B, ..., angles, detectors)``.

    Few angles are sparse-view, a range of angles under 180 degrees is limited-angle tomography.

    Args:
        angles: in degrees.
        size: ``(H, W)``, or one number for square images. When left out, images are square and their size follows from
            what the operator is applied to; the weights are computed anew for every size, once.
        detectors: their number, one pixel apart; the one at ``detectors // 2`` sees the pixel ``(H // 2, W // 2)``.
            By default enough for the image's diagonal, or for its width with ``circle``.
        circle: whether only pixels within the inscribed circle are seen; those outside then count as 0.

    Raises:
        ValueError: when there are no angles, sizes are not positive, or ``detectors`` is given without ``size``.
    """

    def __init__(
        self,
        angles: Tensor | Sequence[float],
        size: int | Sequence[int] | None = None,
        detectors: int | None = None,
        *,
        circle: bool = False,
    ) -> None:
        degrees = torch.as_tensor(angles, dtype=torch.float64)
        if degrees.ndim != 1 or degrees.numel() == 0 or not bool(torch.isfinite(degrees).all()):
            raise ValueError(f"projection angles are a list of finite degrees, got shape {tuple(degrees.shape)}")
        if size is None and detectors is not None:
            raise ValueError("a number of detectors does not tell the size of the image: give size too")
        if detectors is not None and detectors < 1:
            raise ValueError(f"need at least one detector, got {detectors}")
        sizes = None if size is None else (size, size) if isinstance(size, int) else tuple(size)
        if sizes is not None and (len(sizes) != 2 or min(sizes) < 1):
            raise ValueError(f"a projected image has a size (H, W), got {sizes}")
        self.angles, self.circle = degrees, circle
        self.size = None if sizes is None else (int(sizes[0]), int(sizes[1]))
        if self.size is not None:
            self.shape = (1, *self.size)
        self._detectors = detectors
        # Memos by size: derived from the angles alone.
        self._memo: dict[tuple[int, int], CompressedRows] = {}
        self._spectra: dict[tuple[int, int], Tensor] = {}

    def detectors(self, size: tuple[int, int]) -> int:
        """Number of detectors for images of this size."""
        if self._detectors is not None:
            return self._detectors
        return min(size) if self.circle else math.ceil(math.hypot(*size)) + 1

    def image_size(self, detectors: int) -> tuple[int, int]:
        """``(H, W)`` of the images whose projections have this many detectors."""
        side = detectors if self.circle else int((detectors - 1) / math.sqrt(2))
        size = self.size or (side, side)
        if min(size) < 1 or self.detectors(size) != detectors:
            raise ValueError(f"{self.describe()} does not give projections of {detectors} detectors: check its size")
        return size

    def _weights(self, size: tuple[int, int]) -> CompressedRows:
        if size not in self._memo:
            self._memo[size] = joseph_weights(self.angles, size, self.detectors(size), self.circle)
        return self._memo[size]

    def forward(self, x: Tensor) -> Tensor:
        size = self.size or (x.shape[-1], x.shape[-1])
        if x.ndim < 3 or tuple(x.shape[-2:]) != size:
            raise ValueError(f"{self.describe()} takes batches (B, ..., {size[0]}, {size[1]}), got {tuple(x.shape)}")
        y = self._weights(size).product(x.flatten(-2))
        return y.unflatten(-1, (len(self.angles), self.detectors(size)))

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        if y.ndim < 3 or y.shape[-2] != len(self.angles):
            raise ValueError(
                f"projections are batches (B, ..., {len(self.angles)}, detectors) here, got {tuple(y.shape)}"
            )
        size = self.image_size(y.shape[-1])
        return self._weights(size).product(y.flatten(-2), transposed=True).unflatten(-1, size)

    def core(self, ndim: int) -> int:
        return 2

    def surrogate(self, like: Tensor) -> Surrogate:
        """The convolution that answers a point in the middle as ``A^T A`` does; it answers all points much alike."""
        h, w = size = (like.shape[-2], like.shape[-1])
        if size not in self._spectra:
            with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training too
                point = torch.zeros(1, 1, h, w, dtype=torch.float64, device=like.device)
                point[..., h // 2, w // 2] = 1
                answer = torch.fft.ifftshift(self.gram(point)[0, 0])
                self._spectra[size] = torch.fft.rfft2(answer).real.clamp_min(0)
        lam = self._spectra[size].to(like.device)
        return Surrogate(CircularConvolution(torch.ones(1, 1)), lam.reshape(*[1] * (like.ndim - 2), *lam.shape))

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return (*measurement_shape[:-2], *self.image_size(measurement_shape[-1]))

    def dense(self, size: int | None = None) -> Matrix:
        """The same projections with exact solves, of single images ``(B, 1, H, W)`` small enough for an SVD;
        measurements are flat, ``(B, angles * detectors)``."""
        if self.size is None and size is None:
            raise ValueError("a dense projector needs the size of the image: give size")
        h, w = self.size or (size or 0, size or 0)
        return Matrix(self._weights((h, w)).to_dense(), (1, h, w))

    def describe(self) -> str:
        of = "" if self.size is None else f" of {self.size[0]}x{self.size[1]}"
        return f"Radon({len(self.angles)} angles{of}) [{self.solver}]"

    def filtered_backprojection(self, y: Tensor) -> Tensor:
        """The classical inverse, ``(B, ..., H, W)``: ramp filter along the detectors, back-projection (for angles
        equally spaced over 180 degrees)."""
        detectors = y.shape[-1]
        n = 2 * detectors
        position = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64).round()
        odd = position % 2 == 1
        ramp = torch.where(odd, -1 / (math.pi * torch.where(odd, position, 1.0)) ** 2, 0.0)
        ramp[0] = 0.25  # the band-limited ramp, sampled (Kak & Slaney 1988, eq. 3.61)
        transfer = torch.fft.rfft(ramp).real.to(device=y.device, dtype=y.dtype)
        filtered = torch.fft.irfft(torch.fft.rfft(y, n=n) * transfer, n=n)[..., :detectors]
        return self.adjoint(filtered) * (math.pi / len(self.angles))
