"""A network in bfloat16 where that is fast, with everything around it in full precision.

Processors with bfloat16 arithmetic do twice as much of it a second. What it costs in quality was measured for the
architectures that say so (``reduced_precision``); every other network stays in float32 unless asked.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from posteriori.conditioning import Conditioning

__all__ = ["PRECISIONS", "Precision", "ReducedPrecision", "choose_precision", "cpu_has_bfloat16", "has_bfloat16"]

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS = ("auto", "float32", "bfloat16")


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies bfloat16 itself (emulated, it is slower than float32); not, when unknown."""
    try:
        flags = cpuinfo.read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether a device, ``"cpu"``, ``"cuda"``, ..., multiplies bfloat16 itself."""
    kind = torch.device(device).type
    return cpu_has_bfloat16() if kind == "cpu" else kind == "cuda" and torch.cuda.is_bf16_supported(False)


def choose_precision(network: nn.Module, device: str | torch.device = "cpu") -> Precision:
    """What ``"auto"`` means for a network: bfloat16 on CPUs that have it, where its cost was measured to be small."""
    known = getattr(network, "reduced_precision", None) == torch.bfloat16
    return "bfloat16" if known and torch.device(device).type == "cpu" and cpu_has_bfloat16() else "float32"


class ReducedPrecision(nn.Module):
    """A backbone in bfloat16 autocast, wherever no gradient is asked for.

    Convolutions keep a copy of their weights in bfloat16: autocast alone would convert them in every evaluation.

    Args:
        backbone: ``F(inputs, c_noise, conditioning)``, its weights fixed.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        fast = copy.deepcopy(backbone).requires_grad_(False)
        for module in fast.modules():
            if isinstance(module, nn.Conv2d):
                nn.Module.to(module, torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._fast = [fast]  # in a list, so that it is no second set of parameters

    @property
    def stride(self) -> int | None:
        """That of the backbone, ``None`` when it states none."""
        return getattr(self.backbone, "stride", None)

    def bytes_per_pixel(self) -> int:
        """As the backbone says, with two bytes for an activation."""
        return int(self.backbone.bytes_per_pixel(entry=2))  # type: ignore[operator]

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        asked = (inputs, conditioning.linear, *self.backbone.parameters())
        if torch.is_grad_enabled() and any(v.requires_grad for v in asked):
            result: Tensor = self.backbone(inputs, c_noise, conditioning)
            return result
        fast = self._fast[0].to(inputs.device)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            result = fast(inputs, c_noise, conditioning)
        return result.to(inputs.dtype)
