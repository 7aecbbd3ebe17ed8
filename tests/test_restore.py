"""From a photo to a result: problems, tiles, figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from posteriori.denoise import Conditioning, NetworkDenoiser
from posteriori.images import Photo
from posteriori.methods import available_methods
from posteriori.operators import CircularConvolution, GaussianBlur, Inpainting, PaddedConvolution
from posteriori.problems import InputError, TaskOptions, build_problem
from posteriori.restore import Restoration, RestoreOptions, load_model, psnr, restore, whitened_residual
from posteriori.tiling import TiledBackbone, tile_axis
from tiny_model import save_tiny_model, tiny_network


def smooth_photo(h: int = 32, w: int = 48, channels: int = 3) -> Photo:
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    waves = [torch.sin(2 * x + k) * torch.cos(1.5 * y - k) * 0.8 for k in range(channels)]
    return Photo(torch.stack(waves))


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> NetworkDenoiser:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("model"))))


def run(photo: Photo, denoiser: NetworkDenoiser, samples: int = 2, nfe: int = 2, **options: object) -> Restoration:
    task = TaskOptions(**{"sigma_y": 0.05, "degrade": True, **options})  # type: ignore[arg-type]
    return restore(build_problem(photo, task), denoiser, task, RestoreOptions(samples=samples, nfe=nfe))


@pytest.mark.parametrize("task", ["inpaint", "box", "sr", "gaussian", "motion", "denoise"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_task_has_the_photo_shape_and_honest_figures(denoiser: NetworkDenoiser, task: str, channels: int) -> None:
    """A result of another size than its photo, or a figure that is not what its definition says."""
    photo = smooth_photo(channels=channels)
    r = run(photo, denoiser, task=task)
    assert r.samples is not None
    assert r.std is not None
    assert r.picture(r.mean).size == (48, 32)
    assert r.picture(r.mean).mode == ("L" if channels == 1 else "RGB")
    assert r.samples.shape[0] == 2
    torch.testing.assert_close(r.std, (r.samples[0] - r.samples[1]).abs() / math.sqrt(2))
    x_0 = photo.pixels
    error = (r.mean[0, :channels].clamp(-1, 1) - x_0).double().square().mean()
    assert r.report["psnr"]["mean"] == pytest.approx(10 * math.log10(4 / float(error)), abs=1e-4)
    # the residual written out, on the photo's own channels
    y, x = r.problem.y[:, :channels], r.mean[:, :channels]
    gap = (y - r.problem.A(x)).double()
    m = gap.numel()
    if r.problem.mask is not None:
        gap, m = gap * r.problem.mask, int(r.problem.mask.sum()) * channels
    assert r.report["residual"]["mean"] == pytest.approx(float((gap.square().sum() / m).sqrt()) / 0.05, rel=1e-4)
    assert set(r.report) == {
        "task", "operator", "method", "model", "precision", "sigma_y", "sigma_y_source", "sigma_y_estimate",
        "nfe", "evaluations", "backward_passes", "settings", "seed", "seconds", "residual", "psnr",
    }  # fmt: skip
    assert set(r.report["residual"]) == {"linear", "mmse", "mean", "samples"}
    assert set(r.report["psnr"]) == {"input", "linear", "mmse", "mean", "samples"}
    assert r.report["evaluations"] == 1 + 2 * 2


def test_truth_has_a_whitened_residual_of_one(denoiser: NetworkDenoiser) -> None:
    """The residual's normalisation is wrong: 1 would no longer mean 'as far from y as the noise'."""
    for options in ({"task": "inpaint"}, {"task": "sr", "scale": 2}, {"task": "gaussian"}):
        task = TaskOptions(sigma_y=0.1, degrade=True, **options)  # type: ignore[arg-type]
        p = build_problem(smooth_photo(128, 128), task)
        assert p.x_0 is not None
        residual = whitened_residual(p.A, p.x_0, p.y, 0.1)
        assert residual == pytest.approx(1, abs=4 / math.sqrt(2 * float(p.A.measurement_count(p.y))))
    assert whitened_residual(p.A, p.x_0, p.y, 0.0) is None


def test_psnr_is_clamped_and_finite() -> None:
    """Values outside the range that no picture can show would count; a perfect result would not be valid JSON."""
    x_0 = torch.ones(1, 3, 4, 4)
    assert psnr(x_0 * 5, x_0) == 100
    assert psnr(x_0 - 0.2, x_0) == pytest.approx(20, abs=1e-4)


def test_grey_photos_have_the_likelihood_of_their_one_channel() -> None:
    """Three copies of one noisy value taken as three measurements would be trusted sqrt(3) times too much."""
    task = TaskOptions(task="gaussian", sigma_y=0.05, degrade=True)
    p = build_problem(smooth_photo(channels=1), task)
    assert p.y.shape[1] == 3
    g = torch.randn(1, 1, 32, 48)
    three = (p.y - p.A(g.expand(-1, 3, -1, -1))).square().sum() / p.sigma_model**2
    one = (p.y[:, :1] - p.A(g)).square().sum() / 0.05**2
    torch.testing.assert_close(three, one)


def test_same_channels_whether_grey_or_equal_colours(denoiser: NetworkDenoiser) -> None:
    """The grey photo's own measurement and picture have one channel, whatever the network works on."""
    grey = run(smooth_photo(channels=1), denoiser, task="denoise")
    assert torch.equal(grey.mean[:, 0], grey.mean[:, 2])
    assert torch.equal(grey.problem.y[:, 0], grey.problem.y[:, 1])


def test_default_operators() -> None:
    """The documented defaults: exact solves, reflect for Gaussian blur, circular for motion."""
    photo = smooth_photo(40, 40)

    def operator(**options: object) -> object:
        return build_problem(photo, TaskOptions(sigma_y=0.05, degrade=True, **options)).A  # type: ignore[arg-type]

    x = photo.pixels[None]
    gaussian = operator(task="gaussian")
    torch.testing.assert_close(gaussian(x), GaussianBlur(3.0, boundary="reflect")(x))  # type: ignore[operator]
    assert isinstance(operator(task="motion"), CircularConvolution)
    assert isinstance(operator(task="motion", boundary="reflect"), PaddedConvolution)
    box = operator(task="box")
    assert isinstance(box, Inpainting)
    assert float((1 - box.weights).sum()) == 20 * 20
    assert float((1 - operator(task="box", box=(8, 12)).weights).sum()) == 8 * 12  # type: ignore[attr-defined]
    share = float((1 - operator(task="inpaint").weights).mean())  # type: ignore[attr-defined]
    assert share == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 1600))
    small = operator(task="sr")(x)  # type: ignore[operator]
    torch.testing.assert_close(small, torch.nn.functional.avg_pool2d(x, 4))


def test_slow_solves_are_announced(denoiser: NetworkDenoiser) -> None:
    """A user waits twenty times longer without knowing that another boundary is exact."""
    kernel = build_problem(smooth_photo(), TaskOptions(task="motion", sigma_y=0.05, degrade=True, boundary="reflect"))
    assert any("--boundary circular" in note for note in kernel.notes)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_motion_with_reflect_boundary_works(denoiser: NetworkDenoiser) -> None:
    """The iterative path has no test of its own through the sampler; its answer has to explain the measurement."""
    r = run(smooth_photo(16, 20), denoiser, task="motion", boundary="reflect", samples=1, nfe=3)
    assert r.report["residual"]["linear"] < 1.5
    assert all(torch.isfinite(v).all() for v in (r.mean, r.linear))


def test_transparent_pixels_can_be_the_mask(denoiser: NetworkDenoiser) -> None:
    """What is hidden under transparent pixels must not matter, and the result must be opaque."""
    photo = smooth_photo()
    alpha = torch.ones(1, 32, 48)
    alpha[:, 5:12, 7:20] = 0
    task = TaskOptions(task="inpaint", sigma_y=0.05)
    first = build_problem(Photo(photo.pixels, alpha), task)
    second = build_problem(Photo(torch.where(alpha > 0, photo.pixels, torch.tensor(0.77)), alpha), task)
    assert torch.equal(first.y, second.y)
    assert first.alpha is None
    assert torch.equal(first.A.weights, alpha)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="--mask"):
        build_problem(photo, task)


def test_alpha_is_put_back(denoiser: NetworkDenoiser) -> None:
    """A cut-out would lose its outline, or the outline of an enlarged one would not fit."""
    alpha = torch.linspace(0.1, 1, 32 * 48).reshape(1, 32, 48)
    photo = replace(smooth_photo(), alpha=alpha)
    assert run(photo, denoiser, task="denoise").picture(smooth_photo().pixels[None]).mode == "RGBA"
    problem = build_problem(photo, TaskOptions(task="sr", sigma_y=0.05, scale=2))
    assert problem.alpha is not None
    assert problem.alpha.shape == (1, 64, 96)


def test_a_small_photo_is_enlarged(denoiser: NetworkDenoiser) -> None:
    """Super-resolution of a photo that is already small: the result is `scale` times larger."""
    r = run(smooth_photo(16, 20), denoiser, task="sr", scale=3, degrade=False)
    assert r.mean.shape == (1, 3, 48, 60)
    assert r.report["psnr"] is None


def test_kept_measurement_gives_the_same_result(denoiser: NetworkDenoiser) -> None:
    """measurement.npy would not be the measurement that was restored."""
    first = run(smooth_photo(), denoiser, task="gaussian")
    second = run(Photo(first.problem.y[0]), denoiser, task="gaussian", degrade=False)
    torch.testing.assert_close(first.mean, second.mean)


def test_restoring_is_reproducible_and_seeds_differ(denoiser: NetworkDenoiser) -> None:
    """The same command twice would give different pictures; or every seed the same."""
    a, b = (run(smooth_photo(), denoiser, task="inpaint", seed=3) for _ in range(2))
    c = run(smooth_photo(), denoiser, task="inpaint", seed=4)
    assert torch.equal(a.mean, b.mean)
    assert not torch.equal(a.problem.y, c.problem.y)


def test_sample_does_not_depend_on_how_many_there_are(denoiser: NetworkDenoiser) -> None:
    """`--samples 8` after `--samples 4` would show four other pictures."""
    two = run(smooth_photo(), denoiser, task="denoise", samples=2)
    one = run(smooth_photo(), denoiser, task="denoise", samples=1)
    assert one.samples is not None
    assert two.samples is not None
    assert one.std is not None
    torch.testing.assert_close(one.samples[0], two.samples[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["linear", "tv"])
def test_methods_without_samples(denoiser: NetworkDenoiser, method: str) -> None:
    """A method with one answer must not be reported as if it had samples."""
    assert method in available_methods()
    task = TaskOptions(task="denoise", sigma_y=0.1, degrade=True)
    r = restore(build_problem(smooth_photo(), task), denoiser, task, RestoreOptions(method=method))
    assert r.samples is None
    assert r.mmse is None
    assert r.std is None
    assert r.report["residual"]["samples"] == []
    assert r.report["psnr"]["mean"] > r.report["psnr"]["input"]


def test_no_noise(denoiser: NetworkDenoiser) -> None:
    """sigma_y = 0 divides by zero in the residual, and must not in the report."""
    r = run(smooth_photo(), denoiser, task="inpaint", sigma_y=0.0)
    assert r.report["residual"]["samples"] == [None, None]
    observed = r.problem.mask
    assert observed is not None
    torch.testing.assert_close(r.mean[0] * observed, smooth_photo().pixels * observed, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "core", "halo", "blend", "stride"), [
    (100, 100, 0, 0, 1), (101, 32, 8, 4, 4), (517, 64, 30, 32, 16), (1000, 512, 64, 32, 16), (130, 64, 0, 1, 4),
])  # fmt: skip
def test_tiles_cover_an_axis(size: int, core: int, halo: int, blend: int, stride: int) -> None:
    """Weights that do not sum to 1 brighten or darken a band; a tile off the stride's grid shows a pattern; a weight
    within the halo shows the cut edge."""
    total = np.zeros(size)
    for tile in tile_axis(size, core, halo, blend, stride):
        assert tile.start % stride == 0
        assert tile.stop % stride == 0 or tile.stop == size
        total[tile.start : tile.stop] += tile.weight.numpy()
        if tile.start > 0:
            assert float(tile.weight[:halo].abs().sum()) == 0
        if tile.stop < size:
            assert float(tile.weight[len(tile.weight) - halo :].abs().sum()) == 0
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_tiled_network_is_the_network() -> None:
    """Photos larger than a tile would be restored by another network than small ones, with seams."""
    network = tiny_network()
    torch.manual_seed(1)
    inputs, linear, diagonal = (torch.randn(2, 3, 133, 182) for _ in range(3))
    conditioning = Conditioning(linear, diagonal.abs(), torch.tensor([0.05, 0.1]))
    c_noise = torch.tensor([-0.3, 0.4])
    with torch.no_grad():
        whole = network(inputs, c_noise, conditioning)
        tiled = TiledBackbone(network, core=40, halo=network.receptive_radius, blend=8)
        assert len(tile_axis(133, 40, tiled.halo, 8, network.stride)) > 1
        torch.testing.assert_close(tiled(inputs, c_noise, conditioning), whole, atol=1e-5, rtol=1e-5)
        near = TiledBackbone(network, core=40, halo=16, blend=8)(inputs, c_noise, conditioning)
        none = TiledBackbone(network, core=40, halo=0, blend=0)(inputs, c_noise, conditioning)
    assert float((near - whole).abs().max()) < 0.05 * float(whole.std())
    assert float((near - whole).norm()) < 0.1 * float((none - whole).norm())


def test_networks_that_see_everything_are_not_tiled() -> None:
    """Attention over a tile is not attention over the photo: an error, not a wrong picture."""
    with pytest.raises(ValueError, match="stride"):
        TiledBackbone(torch.nn.Conv2d(3, 3, 1))


def test_custom_operator_from_a_file(denoiser: NetworkDenoiser, tmp_path: Path) -> None:
    """The user's own operator would not be found, or not be given the photo's shape."""
    (tmp_path / "mine.py").write_text(
        "import posteriori as po\n"
        "def halve(shape):\n"
        "    return po.operators.Callable(lambda x: 0.5 * x[..., ::2, :], shape=shape)\n"
    )
    r = run(smooth_photo(16, 18), denoiser, task="custom", operator=f"{tmp_path}/mine.py:halve", samples=1, nfe=1)
    assert r.problem.y.shape == (1, 3, 8, 18)
    assert r.mean.shape == (1, 3, 16, 18)
    assert r.report["psnr"]["input"] is None
