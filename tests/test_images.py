"""Photos, masks and kernels from files; pictures and sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posteriori.images import ImageError, encode_png, find_photos, read_kernel, read_mask, read_photo, to_picture
from posteriori.sheets import contact_sheet, std_map, with_colour_bar

H, W = 20, 28
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)


def saved(folder: Path, image: Image.Image, name: str = "photo.png", **options: object) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def as_tensor(array: np.ndarray) -> torch.Tensor:
    channels = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(channels.astype(np.float32)) / 127.5 - 1


@pytest.mark.parametrize("kind", ["RGB", "L", "RGBA", "LA", "P", "P with transparency", "1", "CMYK"])
def test_every_8_bit_kind_is_read(tmp_path: Path, kind: str) -> None:
    """A photo of this kind would come out with wrong colours, values, channels or alpha."""
    alpha_values = RNG.integers(0, 256, (H, W), dtype=np.uint8)
    expected, alpha, name = as_tensor(COLOUR), None, "photo.png"
    if kind == "RGB":
        image = Image.fromarray(COLOUR)
    elif kind == "L":
        image, expected = Image.fromarray(GREY), as_tensor(GREY)
    elif kind == "RGBA":
        image, alpha = Image.fromarray(np.dstack([COLOUR, alpha_values])), alpha_values
    elif kind == "LA":
        image, expected, alpha = Image.fromarray(np.dstack([GREY, alpha_values])), as_tensor(GREY), alpha_values
    elif kind.startswith("P"):
        image = Image.fromarray(COLOUR).quantize(16)
        expected = as_tensor(np.asarray(image.convert("RGB")))
        if "transparency" in kind:
            image.info["transparency"] = 3
            alpha = np.where(np.asarray(image) == 3, 0, 255).astype(np.uint8)
    elif kind == "1":
        image = Image.fromarray(GREY > 127)
        expected = as_tensor(np.where(GREY > 127, 255, 0).astype(np.uint8))
    else:
        image, name = Image.fromarray(COLOUR).convert("CMYK"), "photo.tif"
        expected = as_tensor(np.asarray(image.convert("RGB")))
    photo = read_photo(saved(tmp_path, image, name))
    torch.testing.assert_close(photo.pixels, expected)
    assert photo.size == (H, W)
    if alpha is None:
        assert photo.alpha is None
    else:
        assert photo.alpha is not None
        torch.testing.assert_close(photo.alpha[0], torch.from_numpy(alpha.astype(np.float32)) / 255)


def test_equal_colours_are_a_grey_photo(tmp_path: Path) -> None:
    """A grey scan saved in colour would be restored as three measurements with independent noise, where there is one:
    its noise would be taken for detail."""
    rng = np.random.default_rng(3)
    grey = Image.fromarray(rng.integers(0, 256, (24, 20), dtype=np.uint8))
    opaque = Image.merge("RGBA", [grey] * 3 + [Image.new("L", grey.size, 200)])
    for name, picture in {"a.png": grey.convert("RGB"), "b.jpg": grey.convert("RGB"), "c.png": opaque}.items():
        picture.save(tmp_path / name)
        photo = read_photo(tmp_path / name)
        assert photo.grey, name
        assert (photo.alpha is not None) == (name == "c.png")
        if name != "b.jpg":
            torch.testing.assert_close(photo.pixels, as_tensor(np.array(grey)))
    tinted = grey.convert("RGB")
    tinted.putpixel((0, 0), (10, 10, 11))
    tinted.save(tmp_path / "d.png")
    assert not read_photo(tmp_path / "d.png").grey


def test_16_bit_grey_keeps_its_precision(tmp_path: Path) -> None:
    """Reading through 8 bits would round away the lower byte, or clip everything above 255 to white."""
    values = RNG.integers(0, 65536, (H, W)).astype(np.uint16)
    photo = read_photo(saved(tmp_path, Image.fromarray(values)))
    assert photo.pixels.shape == (1, H, W)
    torch.testing.assert_close(photo.pixels[0], torch.from_numpy(values.astype(np.float32) / 32767.5 - 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """A photo from a phone held upright would be restored lying on its side."""
    exif = Image.Exif()
    exif[274] = orientation
    path = saved(tmp_path, Image.fromarray(COLOUR), exif=exif)
    turned = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: np.rot90(a),
    }  # fmt: skip
    torch.testing.assert_close(read_photo(path).pixels, as_tensor(np.ascontiguousarray(turned[orientation](COLOUR))))


def test_pictures_survive_a_round_trip(tmp_path: Path) -> None:
    """An off-by-one in the scaling would darken a photo that passes through unchanged; alpha would be lost."""
    alpha = torch.linspace(0, 1, H * W).reshape(1, H, W)
    path = tmp_path / "out.png"
    path.write_bytes(encode_png(to_picture(as_tensor(COLOUR), alpha), note="kept"))
    with Image.open(path) as image:
        assert image.info["note"] == "kept"
        np.testing.assert_array_equal(np.asarray(image)[..., :3], COLOUR)
    again = read_photo(path)
    torch.testing.assert_close(again.alpha, alpha, atol=0.5 / 255 + 1e-6, rtol=0)


def test_a_float_measurement_is_read_unclipped(tmp_path: Path) -> None:
    """The noise that leaves [-1, 1] is what makes a float measurement worth keeping."""
    y = RNG.normal(0, 2, (3, H, W)).astype(np.float32)
    np.save(tmp_path / "y.npy", y)
    np.testing.assert_array_equal(read_photo(tmp_path / "y.npy").pixels.numpy(), y)


def test_masks_are_white_where_missing(tmp_path: Path) -> None:
    """Inverted, a mask would make the program invent what was there and keep what was scratched."""
    missing = np.zeros((H, W), dtype=np.uint8)
    missing[3:9, 4:11] = 255
    layer = np.zeros((H, W, 4), dtype=np.uint8)
    layer[3:9, 4:11] = 255
    kinds = {
        "grey.png": Image.fromarray(missing), "colour.png": Image.fromarray(missing).convert("RGB"),
        "one.png": Image.fromarray(missing > 0), "deep.png": Image.fromarray(missing.astype(np.uint16) * 257),
        "layer.png": Image.fromarray(layer),
    }  # fmt: skip
    for name, image in kinds.items():
        mask = read_mask(saved(tmp_path, image, name), (H, W))
        np.testing.assert_array_equal(mask[0].numpy(), (missing == 0).astype(np.float32), err_msg=name)


def test_kernels_agree_in_every_format(tmp_path: Path) -> None:
    """A kernel transposed, or not scaled to sum 1, would blur along the wrong axis or change the brightness."""
    kernel = np.outer([1, 2, 1], [0, 4, 1, 0, 0]).astype(np.float64)
    np.save(tmp_path / "k.npy", kernel)
    np.savetxt(tmp_path / "k.txt", kernel)
    np.savetxt(tmp_path / "k.csv", kernel, delimiter=",")
    saved(tmp_path, Image.fromarray((kernel * 20).astype(np.uint8)), "k.png")
    for name in ("k.npy", "k.txt", "k.csv", "k.png"):
        read = read_kernel(tmp_path / name)
        assert float(read.sum()) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(read.numpy(), kernel / kernel.sum(), atol=1e-6, err_msg=name)


def test_bad_files_are_named(tmp_path: Path) -> None:
    """The user of a folder of a thousand photos has to learn which one is broken, and why."""
    good = saved(tmp_path, Image.fromarray(COLOUR), "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    saved(tmp_path, Image.fromarray(COLOUR[:15]), "small.png")
    saved(tmp_path, Image.new("L", (2049, 16)), "large.png")
    saved(tmp_path, Image.fromarray(np.ones((H, W), dtype=np.float32)), "float.tif")
    np.save(tmp_path / "nan.npy", np.full((H, W), np.nan))
    np.save(tmp_path / "vector.npy", np.ones(5))
    cases = {
        "empty.png": "is empty", "text.png": "not an image", "cut.png": "cannot be read", "small.png": "28x15",
        "large.png": "2049x16", "float.tif": "unknown range", "nan.npy": "NaN", "vector.npy": "shape",
        "none.png": "does not exist",
    }  # fmt: skip
    for name, reason in cases.items():
        with pytest.raises(ImageError, match=reason) as caught:
            read_photo(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_folders_are_searched_and_name_clashes_refused(tmp_path: Path) -> None:
    """Two photos that share a stem would overwrite each other's results without a word."""
    for name in ("b.png", "a.jpg"):
        saved(tmp_path, Image.fromarray(COLOUR), name)
    (tmp_path / "notes.txt").write_text("no photo")
    assert [p.name for p in find_photos([tmp_path])] == ["a.jpg", "b.png"]
    saved(tmp_path, Image.fromarray(COLOUR), "a.png")
    with pytest.raises(ImageError, match="both write"):
        find_photos([tmp_path])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ImageError, match="holds no photo"):
        find_photos([tmp_path / "nothing"])


def test_std_map_states_its_scale() -> None:
    """A picture of uncertainty without its scale says nothing; the scale has to cover nearly all of the map."""
    std = torch.rand(3, 40, 50) * 0.123
    picture, top = std_map(std)
    assert picture.size == (50, 40)
    assert 0.08 < top <= 0.13
    brightness = np.asarray(picture.convert("L"), dtype=np.float64)
    order = std.square().mean(0).sqrt().flatten().argsort()
    assert np.all(np.diff(brightness.flatten()[order.numpy()]) > -3)  # brighter is larger
    barred = np.asarray(with_colour_bar(picture, top))
    assert barred.shape == (40, 50, 3)
    assert barred[-1, 0].sum() < 30 < 500 < barred[-1, -1].sum()
    assert std_map(torch.zeros(1, 4, 4))[1] == 0


def test_contact_sheet_shows_every_picture() -> None:
    """A picture cut off, overlapped by its neighbour or scaled out of shape."""
    pictures = [Image.new("RGB", size, colour) for size, colour in [((64, 32), "red"), ((32, 64), "lime")]]
    sheet = contact_sheet([[("one\nsmall", pictures[0]), ("two", pictures[1])]], ["row"], "Head", 64, "foot")
    values = np.asarray(sheet)
    for colour in ((255, 0, 0), (0, 255, 0)):
        assert (values == colour).all(-1).sum() == 64 * 32
