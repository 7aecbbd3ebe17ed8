"""Class labels of class-conditional networks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posteriori.denoise import Conditioning, NetworkDenoiser

__all__ = ["class_labels", "label_tensor", "with_labels"]


def with_labels(denoiser: NetworkDenoiser, labels: int | Sequence[int] | Tensor) -> NetworkDenoiser:
    """The same denoiser, sharing its weights, for other classes.

    Args:
        denoiser: of a class-conditional network.
        labels: one for all measurements, or one for each of a batch of them, shape ``(B,)``.

    Raises:
        ValueError: when its network knows no classes, or not these.
    """
    if "labels" not in denoiser.backbone._buffers:
        raise ValueError(f"{type(denoiser.backbone).__name__} knows no classes: use the denoiser as it is")
    backbone: Any = copy.copy(denoiser.backbone)
    other = copy.copy(denoiser)
    backbone._buffers = {**backbone._buffers, "labels": label_tensor(labels, backbone.classes)}
    other._modules = {**denoiser._modules, "backbone": backbone}
    return other


def label_tensor(labels: int | Sequence[int] | Tensor | None, known: range | None) -> Tensor | None:
    """Labels as a tensor.

    Raises:
        ValueError: when one is not a whole number or not among the known ones.
    """
    if labels is None:
        return None
    try:
        tensor = torch.as_tensor(labels, device="cpu")  # also where networks are made without memory for their weights
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(0)
    if tensor.is_floating_point() or tensor.ndim > 1 or tensor.numel() == 0:
        raise ValueError(f"labels must be one whole number, or one per measurement, got {labels!r:.80}")
    if known is not None and not all(label in known for label in tensor.reshape(-1).tolist()):
        raise ValueError(f"labels must lie between {known[0]} and {known[-1]}, got {labels!r:.80}")
    return tensor


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
