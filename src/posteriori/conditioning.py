"""What a network is told beside its main input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Conditioning"]


@dataclass(frozen=True)
class Conditioning:
    """What a backbone may know beside its main input; every part has the batch first.

    Attributes:
        linear: linear estimate over the data's standard deviation, shape of the signal.
        diagonal: square root of the pixel diagonal of ``(Lambda + I/s^2)^-1`` over ``s``: in [0, 1], how uncertain
            every entry is under a Gaussian prior (for inpainting: the mask). Shape of the signal.
        sigma_y: measurement noise, shape ``(B,)``.
        known: share of a Gaussian prior's variance that ``x_t`` and the measurement remove, over the whole signal,
            shape ``(B,)``; from ``diagonal`` when left out. With tiles it must be that of the whole.
        classes: what a class-conditional network is told of each sample, shape ``(B,)``; its own labels when left out.
        smooth: the estimate of :mod:`posteriori.smooth` over the data's standard deviation, shape of the signal, for
            networks that ask for it (``smooth_input``).
        looks: of networks that look twice (``refine``), shape ``(B,)``: 0 for a first look; 1 where ``smooth`` is the
            answer of that instead; 2 for the second look, where ``x_t`` is that answer too.
    """

    linear: Tensor
    diagonal: Tensor
    sigma_y: Tensor
    known: Tensor = None  # type: ignore[assignment]
    classes: Tensor | None = None
    smooth: Tensor | None = None
    looks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.known is None:
            object.__setattr__(self, "known", 1 - self.diagonal.square().flatten(1).mean(1))

    def labels(self, c_noise: Tensor) -> Tensor:
        """``[c_noise, log(sigma_y)/4, log(known)/4]``, shape ``(B, 3)``: the scalars a network is told."""
        floor = 1e-4
        logs = (self.sigma_y.clamp_min(floor).log() / 4, self.known.clamp_min(floor).log() / 4)
        return torch.stack([c_noise, *logs], 1).float()

    def channels(self) -> Tensor:
        """``[linear, diagonal]``, and ``smooth`` where there is one, along dimension 1."""
        return torch.cat([self.linear, self.diagonal, *([] if self.smooth is None else [self.smooth])], 1)

    def add_smooth(self, output: Tensor) -> Tensor:
        """``F + g (smooth - linear)`` of a network whose output is ``[F, g]``: the last channel is a gain, by which the
        smooth estimate reaches the mean without having to pass the network.

        Of EDM's scaling with the spectral preconditioning, at the largest noise, ``F = 0`` and ``g = 1`` make the mean
        the smooth estimate, in whatever was not measured; elsewhere it is a term to be learned.
        """
        assert self.smooth is not None
        output = output.to(self.smooth.dtype)  # not rounded to the network's precision once more
        return torch.addcmul(output[:, :-1], output[:, -1:], self.smooth - self.linear)

    def crop(self, area: tuple[Any, ...]) -> Conditioning:
        """That of a part of the picture; what is said of the whole stays."""
        smooth = None if self.smooth is None else self.smooth[area]
        return replace(self, linear=self.linear[area], diagonal=self.diagonal[area], smooth=smooth)

    @staticmethod
    def join(parts: Sequence[Conditioning]) -> Conditioning:
        """One batch of several; classes and smooth estimates where all have them."""

        def together(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if any(v is None for v in values) else torch.cat(values)

        joined: dict[str, Any] = {f.name: together(f.name) for f in fields(Conditioning)}
        return Conditioning(**joined)
