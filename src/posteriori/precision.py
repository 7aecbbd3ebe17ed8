"""A network in bfloat16 where that is fast, with everything around it in full precision.

Some processors with bfloat16 arithmetic do twice as much of it a second, others, which have one unit for it where they
have two for float32, half as much: it is tried out. What it costs in quality was measured for the architectures that
say so (``reduced_precision``); every other network stays in float32 unless asked.
"""

from __future__ import annotations

import copy
import time
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from posteriori.conditioning import Conditioning

__all__ = ["PRECISIONS", "Precision", "ReducedPrecision", "choose_precision", "cpu_has_bfloat16", "prefers_bfloat16"]

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS = ("auto", "float32", "bfloat16")


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies bfloat16 itself (emulated, it is slower than float32); not, when unknown."""
    try:
        flags = cpuinfo.read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def _seconds(dtype: torch.dtype) -> float:
    """What a 3x3 convolution of 64 channels on 64x64 pixels takes on the CPU."""
    x, weight = (
        torch.ones(shape, dtype=dtype).to(memory_format=torch.channels_last)
        for shape in ((1, 64, 64, 64), (64, 64, 3, 3))
    )
    began = time.perf_counter()
    functional.conv2d(x, weight, padding=1)
    return time.perf_counter() - began


@lru_cache(maxsize=1)
def _bfloat16_speedup() -> float:
    """Time of a convolution in float32 over that in bfloat16: the quickest of some, in turn, in a few milliseconds."""
    with torch.inference_mode():
        turns = [[_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)] for _ in range(5)]
    single, half = (min(times) for times in zip(*turns, strict=True))
    return single / half


def prefers_bfloat16(device: str | torch.device) -> bool:
    """Whether a device, ``"cpu"``, ``"cuda"``, ..., is quicker in bfloat16: a CPU by a fifth or more, tried out once a
    process where there is arithmetic for it at all."""
    kind = torch.device(device).type
    if kind == "cpu":
        return cpu_has_bfloat16() and _bfloat16_speedup() > 1.2
    return kind == "cuda" and torch.cuda.is_bf16_supported(False)


def choose_precision(network: nn.Module, device: str | torch.device = "cpu") -> Precision:
    """What ``"auto"`` means for a network: bfloat16 on CPUs that are quicker in it, where its cost was measured to be
    small."""
    known = getattr(network, "reduced_precision", None) == torch.bfloat16
    return "bfloat16" if known and torch.device(device).type == "cpu" and prefers_bfloat16(device) else "float32"


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
