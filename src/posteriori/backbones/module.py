r"""Any network as a backbone: how it is called, and what it returns.

A network either predicts (its output is ``F`` up to sign, of :mod:`posteriori.scaling`), or denoises:

    D(u, q)  ->  F(c_in u, q) = (D(u, q) - c_skip(q) u) / c_out(q)      with EDM's scalars, exactly undone outside

Images in another range are moved there and back: with ``x = h u + c``, ``D(u, q) = (net(x, h q) - c)/h``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from posteriori.backbones.labels import class_labels, label_tensor
from posteriori.backbones.widening import find_layer, first_layer, widen
from posteriori.denoise import Conditioning
from posteriori.operators.base import per_sample
from posteriori.scaling import Scaling

__all__ = ["Call", "ModuleBackbone"]


@dataclass(frozen=True)
class Call:
    """How a network is called; plain values, so that a card can state it.

    Attributes:
        method: of the network, ``method(x, label, **arguments)``.
        arguments: further keyword arguments, the same in every call.
        classes: keyword of the class labels; the network knows none when empty.
        one_hot: number of classes, for networks that want one-hot vectors (-1 is then no class, a zero vector).
        denoises: whether it returns the image, at noise ``label = q``, rather than a prediction.
        data_std: of EDM's scalars, for networks that denoise.
        value_range: of its images, for networks that denoise.
        sign: -1 when its output is the negative of the prediction.
        whole: whether the label is rounded to a whole number (a table of steps).
    """

    method: str = "forward"
    arguments: dict[str, Any] = field(default_factory=dict)
    classes: str = ""
    one_hot: int = 0
    denoises: bool = False
    data_std: float = 0.5
    value_range: tuple[float, float] = (-1.0, 1.0)
    sign: int = 1
    whole: bool = False

    def __post_init__(self) -> None:
        low, high = self.value_range
        if not low < high:
            raise ValueError(f"value_range must be (low, high), got ({low}, {high})")
        if not self.method.isidentifier() or self.method.startswith("_"):  # a card may come from anywhere
            raise ValueError(f"method must be the name of a public method, got {self.method!r}")


class ModuleBackbone(nn.Module):
    """A network of any class.

    Args:
        network: copied, so that yours stays as it is.
        call: how it is called.
        identity: what a card says of the network itself (``kind``, ``class``, perhaps ``config``).
        conditioned: add inputs for the measurement, at zero weight.
        layer: name of the layer that sees the noisy signal; the first convolution when left out.
        embedding: name of a linear layer of the noise embedding, which is then told ``sigma_y`` and how much is known.
        image_channels: of the signal; the layer's inputs when left out.
        labels: class labels, one number or one per measurement.

    Raises:
        ValueError: when a layer cannot be found or widened.
    """

    labels: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        call: Call,
        identity: dict[str, Any],
        conditioned: bool = True,
        layer: str | None = None,
        embedding: str | None = None,
        image_channels: int | None = None,
        labels: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.call, self.identity = call, identity
        self.layer = layer or first_layer(network)
        self.embedding = embedding
        self.image_channels = image_channels or int(find_layer(network, self.layer)[1].shape[1])
        if call.classes:
            self.register_buffer("labels", label_tensor(labels, self.classes), persistent=False)
        elif labels is not None:
            raise ValueError("labels are given, but not how the network takes them: add classes='class_labels'")
        self.told = widen(self.network, self.layer, self.image_channels, embedding) if conditioned else None

    @property
    def classes(self) -> range | None:
        """The labels that the network knows, where that can be told."""
        return range(-1, self.call.one_hot) if self.call.one_hot else None

    @property
    def config(self) -> dict[str, Any]:
        """What a card says of it; with the network itself, the arguments that make it again."""
        labels = getattr(self, "labels", None)
        return {
            **self.identity,
            "call": {**asdict(self.call), "value_range": list(self.call.value_range)},
            "conditioned": self.told is not None,
            "layer": self.layer,
            "embedding": self.embedding,
            "image_channels": self.image_channels,
            **({} if labels is None else {"labels": labels.tolist()}),
        }

    def _ask(self, x: Tensor, label: Tensor, classes: Tensor | None) -> Tensor:
        arguments = dict(self.call.arguments)
        if classes is not None:
            if self.call.one_hot:
                rows = functional.one_hot(classes.clamp_min(0), self.call.one_hot)
                classes = (rows * (classes >= 0)[:, None]).to(x)
            arguments[self.call.classes] = classes
        output = getattr(self.network, self.call.method)(x, label, **arguments)
        output = getattr(output, "sample", output)
        output = output[0] if isinstance(output, tuple) else output
        return output[:, : x.shape[1]]  # what is more is a learned variance

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        call = self.call
        if self.told is not None:
            self.told.update(conditioning, inputs)
        classes = class_labels(self.labels, conditioning, inputs.shape[0]) if call.classes else None
        if not call.denoises:
            label = c_noise.round().long() if call.whole else c_noise
            output = self._ask(inputs, label, classes)
            return output if call.sign == 1 else call.sign * output
        edm, q = Scaling("edm", call.data_std), per_sample(c_noise, inputs)
        low, high = call.value_range
        centre, half = (high + low) / 2, (high - low) / 2
        u = inputs / edm.input(q)
        estimate = (self._ask(half * u + centre, half * c_noise, classes) - centre) / half
        return (estimate - edm.skip(q) * u) / edm.out(q)
