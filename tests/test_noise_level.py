"""The estimated noise level against the noise that was added, for every kind of measurement."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import posteriori as po
from posteriori.bench import noise_level
from posteriori.operators import (
    Bayer,
    Blur,
    Callable,
    Crop,
    Downsampling,
    GaussianBlur,
    Grayscale,
    Identity,
    Inpainting,
    LinearOperator,
    Matrix,
    Sampling,
    Weighting,
    motion_kernel,
    stack,
)


def photo(size: int = 96, seed: int = 0, channels: int = 3) -> Tensor:
    """Smooth shading with edges and a textured quarter, ``(1, C, size, size)``."""
    rng = np.random.default_rng(seed)
    u, v = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    picture = np.stack([np.sin(3 * u + c) * np.cos(2 * v - c) for c in range(channels)]) * 0.5
    for _ in range(6):
        cy, cx, r = rng.uniform(0, 1, 3)
        picture[:, (u - cx) ** 2 + (v - cy) ** 2 < (0.05 + 0.2 * r) ** 2] += rng.uniform(-0.4, 0.4, (channels, 1))
    picture[:, : size // 3, : size // 3] += 0.1 * np.sin(60 * u * v)[: size // 3, : size // 3]
    return torch.from_numpy(picture.clip(-0.95, 0.95)).float()[None]


def mask(share: float, size: int = 96) -> Tensor:
    return torch.rand(size, size, generator=torch.Generator().manual_seed(3)) < share


OPERATORS: dict[str, LinearOperator] = {
    "denoise": Identity(),
    "inpaint": Inpainting(mask(0.3)),
    "extreme inpaint": Inpainting(mask(0.1)),
    "box": Inpainting(torch.ones(96, 96) * (torch.arange(96) // 32 != 1)),
    "weights": Weighting(torch.linspace(0.3, 2, 96).expand(96, 96)),
    "sr": Downsampling(2),
    "gaussian": GaussianBlur(3.0),
    "slight blur": GaussianBlur(0.6),
    "motion": Blur(motion_kernel(31, 0.5, 1), "circular"),
    "motion, reflect": Blur(motion_kernel(15, 0.5, 1), "reflect"),
    "grey": Grayscale(),
    "mosaic": Bayer(),
    "masked blur": Inpainting(mask(0.7)) @ GaussianBlur(1.0),
    "scaled crop": 0.5 * Crop(8, 8),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("sigma_y", [0.03, 0.15])
def test_every_task(name: str, sigma_y: float) -> None:
    """A user who does not know the noise would be given a wrong level: within 12 %; where measured
    pixels have distant neighbours, within 25 %."""
    A = OPERATORS[name]
    y = po.measure(A, torch.cat([photo(seed=0), photo(seed=1)]), torch.tensor([sigma_y, 2 * sigma_y]), seed=4)
    found = po.estimate_sigma_y(A, y)
    assert found.shape == (2,)
    error = (found / torch.tensor([sigma_y, 2 * sigma_y], dtype=torch.float64)).log().abs()
    assert float(error.max()) < (0.25 if name in ("extreme inpaint", "mosaic") else 0.12), found


def test_samples_do_not_influence_each_other() -> None:
    """A photo's noise would depend on those beside it, and parameters per sample be mixed up."""
    masks = Inpainting(torch.stack([mask(0.5), mask(0.9)])[:, None])
    y = po.measure(masks, torch.cat([photo(seed=0), photo(seed=1)]), 0.1, seed=1)
    together = po.estimate_sigma_y(masks, y)
    for i, share in enumerate((0.5, 0.9)):
        alone = po.estimate_sigma_y(Inpainting(mask(share)), y[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])


def test_noise_beyond_the_signal_is_measured_without_bias() -> None:
    """Where a blur lets nothing through there is nothing to mistake for noise: 20 photos, to 1 % each, mean 0.2 %."""
    A = GaussianBlur(3.0)
    y = po.measure(A, photo(64).expand(20, -1, -1, -1), 0.01, seed=0)
    error = po.estimate_sigma_y(A, y) / 0.01 - 1
    assert float(error.abs().max()) < 0.05
    assert abs(float(error.mean())) < 0.005


def test_redundant_measurements_need_no_picture() -> None:
    """More equations than unknowns: what no signal explains is noise, whatever the signal. Within 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    M = Matrix(torch.randn(500, 40, generator=generator))
    x = 10 * torch.randn(3, 40, generator=generator)
    for A, freedom in [(M, 460), (stack([M, Matrix(M.matrix[:100])], [0.3, 0.6]), 560)]:
        y = po.measure(A, x, 0.3, seed=1)
        error = po.estimate_sigma_y(A, y) / 0.3 - 1
        assert float(error.abs().max()) < 4 / (2 * freedom) ** 0.5


def test_stack_of_pictures() -> None:
    """Several photos of one scene: the level that belongs to the joint measurement."""
    A = stack([GaussianBlur(2.0), Downsampling(2)], [0.02, 0.08], shape=(3, 96, 96))
    y = po.measure(A, photo(), 0.04, seed=0)
    assert A.sigma_y == pytest.approx(0.04)
    assert abs(math.log(float(po.estimate_sigma_y(A, y)) / 0.04)) < 0.1


def test_saturated_pixels_do_not_hide_the_noise() -> None:
    """A dark photo clipped at black: half its noise is cut off, the estimate would be far too low."""
    x = photo() * 0.4 - 0.75
    y = po.measure(Identity(), x, 0.1, seed=0).clamp(-1, 1)
    eight_bit = ((y + 1) * 127.5).round() / 127.5 - 1
    assert float((eight_bit == -1).float().mean()) > 0.03
    assert abs(math.log(float(po.estimate_sigma_y(Identity(), eight_bit)) / 0.1)) < 0.1


def test_grey_photos_in_three_channels() -> None:
    """One noise seen three times: differences of the channels are 0, and so would be the estimate."""
    y = po.measure(Identity(), photo(channels=1), 0.05, seed=0)
    one = po.estimate_sigma_y(Identity(), y)
    torch.testing.assert_close(po.estimate_sigma_y(Identity(), y.expand(-1, 3, -1, -1)), one)
    assert abs(math.log(float(one) / 0.05)) < 0.1


def test_volumes() -> None:
    """Slices of a volume are photos of one noise."""
    volume = torch.stack([photo(48, seed=s, channels=1)[0] for s in range(4)], 1)[None]
    y = po.measure(Identity(), volume, 0.1, seed=0)
    assert abs(math.log(float(po.estimate_sigma_y(Identity(), y)) / 0.1)) < 0.1


@pytest.mark.parametrize(("A", "shape", "message"), [
    (Identity(), (40,), "no neighbourhoods"),
    (Sampling(torch.arange(50), 100), (100,), "no neighbourhoods"),
    (Matrix(torch.randn(30, 40, generator=torch.Generator().manual_seed(0))), (40,), "no entry is redundant"),
    (Inpainting(torch.arange(1024).reshape(32, 32) % 37 == 0), (1, 32, 32), "scattered"),
    (Identity(), (3, 4, 4), "scattered"),
    (Callable(lambda x: x[:, :, torch.randperm(64, generator=torch.Generator().manual_seed(0))][
        ..., torch.randperm(64, generator=torch.Generator().manual_seed(1))], shape=(1, 64, 64)), (1, 64, 64), "alike"),
])  # fmt: skip
def test_what_cannot_be_known_is_refused(A: LinearOperator, shape: tuple[int, ...], message: str) -> None:
    """A made-up level would be taken for knowledge."""
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(5))
    with pytest.raises(ValueError, match=message):
        po.estimate_sigma_y(A, po.measure(A, x, 0.05, seed=0))


def test_not_a_number_is_refused() -> None:
    """A NaN would go through every median."""
    with pytest.raises(ValueError, match="NaN"):
        po.estimate_sigma_y(Identity(), torch.full((1, 3, 32, 32), float("nan")))


def test_the_measuring_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of the documentation could not be made again; an interrupted run would begin anew."""
    for seed in range(2):
        po.write_image(photo(64, seed)[0], tmp_path / f"p{seed}.png")
    arguments = [str(tmp_path), "--size", "64", "--tasks", "denoise,sr", "--out", str(tmp_path / "rows.jsonl")]
    assert noise_level.main(arguments) == 0
    first = capsys.readouterr().out
    assert "| denoise |" in first
    assert "| sr |" in first
    lines = (tmp_path / "rows.jsonl").read_text()
    assert noise_level.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "rows.jsonl").read_text() == lines
