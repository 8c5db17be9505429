"""Picture files become stored samples of the right size, the right way up, in the right colours."""

import numpy as np
import pytest
from PIL import Image
from sample_files import grey_film

from mnemos.sharding.errors import DataError
from mnemos.sharding.sources import images

SIZE = (32, 32)


def coloured() -> np.ndarray:
    """Return RGB [64, 64, 3]: red left, green right, blue below."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:48, :32, 0] = picture[:48, 32:, 1] = picture[48:, :, 2] = 200
    return picture


def test_colours_keep_their_channel_and_place(tmp_path):
    Image.fromarray(coloured()).save(tmp_path / "a.png")
    stored = images.read_image(tmp_path / "a.png", 3, SIZE)
    assert stored.shape == (3, 32, 32) and stored.dtype == np.uint8
    assert stored[:, 8, 4].tolist() == [200, 0, 0]
    assert stored[:, 8, 28].tolist() == [0, 200, 0]
    assert stored[:, 30, 16].tolist() == [0, 0, 200]


def test_colour_becomes_luminance_where_grey_is_stored(tmp_path):
    Image.fromarray(coloured()).save(tmp_path / "a.png")
    stored = images.read_image(tmp_path / "a.png", 1, SIZE)
    weights = {(8, 4): 0.299, (8, 28): 0.587, (30, 16): 0.114}
    for place, weight in weights.items():
        assert stored[(0, *place)] == pytest.approx(200 * weight, abs=1)


def test_grey_becomes_three_equal_channels(tmp_path):
    Image.fromarray(grey_film(0)).save(tmp_path / "a.jpg")
    stored = images.read_image(tmp_path / "a.jpg", 3, SIZE)
    assert (stored[0] == stored[1]).all() and (stored[0] == stored[2]).all() and stored.std() > 10


def test_exif_rotation_is_applied(tmp_path):
    upright = Image.fromarray(coloured())
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a viewer turns the stored pixels by 90 degrees clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    upright.save(tmp_path / "upright.jpg", quality=95, subsampling=0)
    turned = images.read_image(tmp_path / "turned.jpg", 3, SIZE).astype(int)
    np.testing.assert_allclose(turned, images.read_image(tmp_path / "upright.jpg", 3, SIZE), atol=12)


def test_deep_pictures_are_stretched_between_their_percentiles(tmp_path):
    pixels = grey_film(1, (64, 64)).astype(np.uint16) * 13 + 700  # about 12 bits of 16
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    stored = images.read_image(tmp_path / "deep.png", 1, (64, 64))[0]
    low, high = np.percentile(pixels, (0.5, 99.5))
    np.testing.assert_allclose(stored, np.clip((pixels - low) / (high - low), 0, 1) * 255, atol=0.51)
    assert (stored.min(), stored.max()) == (0, 255)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (33, 50), (50, 20)], ids=str)
def test_the_shortest_side_is_resized_and_the_centre_kept(tmp_path, shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    radius = np.hypot(y - (shape[0] - 1) / 2, x - (shape[1] - 1) / 2) / min(shape)
    Image.fromarray(np.where(radius < 0.3, 255, 0).astype(np.uint8)).save(tmp_path / "disc.png")
    stored = images.read_image(tmp_path / "disc.png", 1, SIZE)[0] / 255
    y, x = np.mgrid[:32, :32]
    assert (stored * y).sum() / stored.sum() == pytest.approx(15.5, abs=0.6)
    assert (stored * x).sum() / stored.sum() == pytest.approx(15.5, abs=0.6)
    assert stored.sum() == pytest.approx(np.pi * (0.3 * 32) ** 2, rel=0.12), (
        "a disc stays a disc of that size"
    )


def test_large_jpegs_opened_at_a_fraction_look_the_same(tmp_path):
    Image.fromarray(grey_film(5, (1024, 1024))).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(grey_film(5, (1024, 1024))).save(tmp_path / "a.png")
    fast = images.read_image(tmp_path / "a.jpg", 1, SIZE).astype(int)
    np.testing.assert_allclose(fast, images.read_image(tmp_path / "a.png", 1, SIZE), atol=3)


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")  # 81 million: Pillow by itself only warns
    with pytest.raises(DataError, match="64 million"):
        images.read_image(tmp_path / "bomb.png", 1, SIZE)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gif", "flat"])
def test_broken_pictures_are_refused(tmp_path, damage):
    path = tmp_path / "a.jpg"
    Image.fromarray(grey_film(0, (200, 200))).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1500])
    elif damage == "text":
        path.write_text("no picture at all")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "gif":
        Image.fromarray(grey_film(0)).save(path, format="GIF")
    else:
        path = tmp_path / "flat.png"
        Image.fromarray(np.full((50, 50), 900, np.uint16)).save(path)
    with pytest.raises(DataError, match=r"decoded|not a JPEG|one value"):
        images.read_image(path, 1, SIZE)
