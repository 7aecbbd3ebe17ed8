"""Class labels of class-conditional networks."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.denoise import Conditioning, NetworkDenoiser

__all__ = ["class_labels", "with_labels"]


def with_labels(denoiser: NetworkDenoiser, labels: int | Sequence[int] | Tensor) -> NetworkDenoiser:
    """The same denoiser, sharing its weights, for other classes.

    Args:
        denoiser: of a class-conditional network.
        labels: one for all measurements, or one for each of a batch of them, shape ``(B,)``.

    Raises:
        ValueError: when its network knows no classes.
    """
    if "labels" not in denoiser.backbone._buffers:
        raise ValueError(f"{type(denoiser.backbone).__name__} knows no classes: use the denoiser as it is")
    backbone, other = copy.copy(denoiser.backbone), copy.copy(denoiser)
    backbone._buffers = {**backbone._buffers, "labels": torch.as_tensor(labels)}
    other._modules = {**denoiser._modules, "backbone": backbone}
    return other


def class_labels(labels: Tensor | None, conditioning: Conditioning, batch: int) -> Tensor:
    """Labels of a batch, shape ``(batch,)``: those of the conditioning, or the network's own.

    A batch may hold several copies of the measurements, sample-major, as :meth:`ExactPosterior.expand` makes them.

    Raises:
        ValueError: when there are none, or not as many as measurements.
    """
    if conditioning.classes is not None:
        return conditioning.classes
    if labels is None:
        raise ValueError(
            "this network is class-conditional: give load_pretrained(..., labels=3), one number or one per measurement"
        )
    device = conditioning.sigma_y.device
    if batch % labels.numel():
        raise ValueError(f"{labels.numel()} labels do not fit a batch of {batch}: give one number, or one for each")
    return labels.reshape(-1).repeat(batch // labels.numel()).to(device)
