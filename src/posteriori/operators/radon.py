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
from posteriori.operators.krylov import KrylovOperator
from posteriori.operators.sparse import CompressedRows

__all__ = ["Radon"]


def _rays(angles: Tensor, size: tuple[int, int], detectors: int) -> CompressedRows:
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
            rows.append(ray[kept])
            columns.append((row * w + column)[kept])
            values.append(weight[kept])
    return CompressedRows(torch.cat(rows), torch.cat(columns), torch.cat(values), (len(theta) * detectors, h * w))


class Radon(KrylovOperator):
    """Parallel-beam projections. Signals ``(B, ..., H, W)``, measurements ``(B, ..., angles, detectors)``.

    Few angles are sparse-view, a range of angles under 180 degrees is limited-angle tomography.

    Args:
        angles: in degrees.
        size: ``(H, W)``, or one number for square images.
        detectors: one pixel apart, the middle one at ``detectors // 2`` sees the centre; by default enough for the
            image's diagonal.

    Raises:
        ValueError: when there are no angles, or sizes are not positive.
    """

    def __init__(
        self, angles: Tensor | Sequence[float], size: int | Sequence[int], detectors: int | None = None
    ) -> None:
        degrees = torch.as_tensor(angles, dtype=torch.float64)
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        if degrees.ndim != 1 or degrees.numel() == 0 or not bool(torch.isfinite(degrees).all()):
            raise ValueError(f"projection angles are a list of finite degrees, got shape {tuple(degrees.shape)}")
        if len(sizes) != 2 or min(sizes) < 1:
            raise ValueError(f"a projected image has a size (H, W), got {sizes}")
        count = 2 * math.ceil(math.hypot(*sizes) / 2) + 1 if detectors is None else detectors
        if count < 1:
            raise ValueError(f"need at least one detector, got {count}")
        self.angles = degrees
        self.size, self.output = (int(sizes[0]), int(sizes[1])), (degrees.numel(), count)
        self._matrix = _rays(degrees, self.size, count)

    def _checked(self, v: Tensor, sizes: tuple[int, int]) -> Tensor:
        if v.ndim < 3 or tuple(v.shape[-2:]) != sizes:
            raise ValueError(f"{self.describe()} takes batches (B, ..., {sizes[0]}, {sizes[1]}), got {tuple(v.shape)}")
        return v.flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return self._matrix.product(self._checked(x, self.size)).unflatten(-1, self.output)

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        return self._matrix.product(self._checked(y, self.output), transposed=True).unflatten(-1, self.size)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return (*measurement_shape[:-2], *self.size)

    def describe(self) -> str:
        h, w = self.size
        return f"Radon({self.output[0]} angles of {h}x{w}) [{self.solver}]"

    def filtered_backprojection(self, y: Tensor) -> Tensor:
        """The classical inverse: ramp filter along the detectors, back-projection (for equally spaced angles)."""
        n = 2 * self.output[1]
        position = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64).round()
        odd = position % 2 == 1
        ramp = torch.where(odd, -1 / (math.pi * torch.where(odd, position, 1.0)) ** 2, 0.0)
        ramp[0] = 0.25  # the band-limited ramp, sampled (Kak & Slaney 1988, eq. 3.61)
        transfer = torch.fft.rfft(ramp).real.to(device=y.device, dtype=y.dtype)
        filtered = torch.fft.irfft(torch.fft.rfft(y, n=n) * transfer, n=n)[..., : self.output[1]]
        return self.adjoint(filtered) * (math.pi / self.output[0])
