"""Whole-slide images: tissue tiles at a stated size of pixel, read by OpenSlide.

Only pixels of the pyramid are read. Label and macro pictures, which name the patient, are never touched, and nothing
of a slide's TIFF tags but its pixel size is used.
"""

from collections import Counter
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from mnemos.sharding.errors import DataError, LeftOut, UserError
from mnemos.sharding.modalities import Modality, StoredSize
from mnemos.sharding.sample import Sample
from mnemos.sharding.sources.source import Outcome
from mnemos.sharding.sources.tissue import tissue_mask, tissue_share
from mnemos.sharding.sources.units import Unit

if TYPE_CHECKING:
    from openslide import OpenSlide

MICRONS = 0.5  # of a stored pixel: an objective of 20x
MOST_TILES = 100  # of a patient
LEAST_TISSUE = 0.5  # share of a tile
COARSE = 1.25  # how much larger than a stored one a slide's finest pixel may be: more would be interpolation
_FINER = 1.05  # a level this much coarser than asked for will do: 0.5015 um is 20x as well
_MICRONS = (0.05, 10.0)  # a pixel outside this range is a header's mistake
_POWER_MICRONS = 10.0  # times an objective's power: 20x has 0.5 um
_CORRUPT = 16  # tiles that cannot be decoded: a slide with so many is left, once they are most of those tried
_SPARE = 10  # times the tiles wanted are kept as candidates, in case some cannot be decoded
_CACHE_BYTES = 8 << 20  # of decoded tiles, per open slide: tiles at random places share next to none
_MOST_PIXELS = 1 << 36  # of a slide; real ones have some 2**33
_OVERVIEW_PIXELS = 1 << 22  # the picture that tissue is looked for in
_SMALLEST_LEVEL_PIXELS = 1 << 32
_BLOCK = 2048  # edge of what is read at a time
_TILE_EDGE = 4096  # of the file's own tiles, which the decoder takes whole


def require_openslide() -> None:
    """Raise UserError where OpenSlide cannot be imported."""
    try:
        import openslide  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"whole-slide images are read by OpenSlide, which is missing ({error}); "
            "install it with `pip install openslide-python openslide-bin`"
        ) from error


def read_patient(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    """Read a unit that is all slides of one patient: at most ``MOST_TILES`` tiles, spread over all of them.

    The tiles lie on a grid; those with tissue are taken in the order of a hash of slide and place, so that any number
    of them is spread evenly, and the same ones are chosen each time. A tile that cannot be decoded is skipped and
    counted; where a slide cannot be opened, the others are kept and the reason is told.

    Raises:
        DataError: no slide can be opened, or none of those that can has a tile to give.
        LeftOut: no tile has enough tissue.
    """
    broken: list[str] = []
    places: list[tuple[int, int, int, int]] = []  # hash, slide, row, column
    slides: list[Slide] = []
    with ExitStack() as stack:
        for path in unit.files:
            try:
                slide = stack.enter_context(Slide(path, size.image))
                places += [
                    (mixed, len(slides), row, column) for mixed, row, column in slide.places(MOST_TILES)
                ]
                slides.append(slide)
            except DataError as error:
                broken.append(f"slide {path.name}: {error.reason}")
        if broken and not places:
            raise DataError("; ".join(broken))
        if not places:
            raise LeftOut(f"no tile with at least {LEAST_TISSUE:.0%} of tissue")
        tried: Counter[int] = Counter()
        corrupt: Counter[int] = Counter()
        samples: list[Sample] = []
        for _, number, row, column in sorted(places):
            if len(samples) == MOST_TILES:
                break
            if corrupt[number] >= max(_CORRUPT, tried[number] / 2):
                continue
            tried[number] += 1
            try:
                tile_CYX = slides[number].tile(row, column)
            except DataError:
                corrupt[number] += 1
                continue
            source = f"{unit.name}/{slides[number].path.name}:{row}:{column}"
            group = unit.group or unit.name
            samples.append(
                Sample(array=tile_CYX, source=source, group=group, label=unit.label, scale=1 / 255)
            )
    if not samples:
        raise DataError(f"none of its {corrupt.total()} tiles tried can be decoded")
    skipped = {"tile that cannot be decoded": corrupt.total()} if corrupt else {}
    return Outcome(samples=tuple(samples), broken="; ".join(broken), skipped=skipped)


class Slide:
    """An open slide and the grid of tiles on it; a context manager.

    Args:
        path: any format OpenSlide reads.
        size_YX: pixels of a stored tile, each ``MICRONS`` wide.

    Raises:
        DataError: it cannot be opened, does not say how large its pixels are, or declares what no slide has.
    """

    def __init__(self, path: Path, size_YX: tuple[int, int]) -> None:
        self.path = path
        self.size_YX = size_YX
        self._open: OpenSlide | None = None
        slide = self._handle()
        try:
            self._microns_YX = _pixel_size(slide.properties)
            _check_size(slide)
        except DataError:
            self.close()
            raise
        # Pixels of the finest level that a tile covers.
        self._extent_YX = tuple(n * MICRONS / um for n, um in zip(size_YX, self._microns_YX, strict=True))
        self._level = max(
            level
            for level, factor in enumerate(slide.level_downsamples)
            if level == 0 or factor * max(self._microns_YX) <= MICRONS * _FINER
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; it is opened again when it is next read."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def places(self, most: int) -> list[tuple[int, int, int]]:
        """Return (hash, row, column) of tiles with enough tissue, the ``10 * most`` smallest hashes of them."""
        slide = self._handle()
        width, height = slide.dimensions
        overview_YXC, scale_YX = self._overview()
        rows, columns = (int(n / extent) for n, extent in zip((height, width), self._extent_YX, strict=True))
        edges_Y, edges_X = (
            np.arange(num + 1) * extent / scale
            for num, extent, scale in zip((rows, columns), self._extent_YX, scale_YX, strict=True)
        )
        found = np.argwhere(tissue_share(tissue_mask(overview_YXC), edges_Y, edges_X) >= LEAST_TISSUE)
        seed = int.from_bytes(blake2b(self.path.name.encode(), digest_size=8).digest())
        hashes = _mixed(found[:, 0].astype(np.uint64) << np.uint64(32) | found[:, 1].astype(np.uint64), seed)
        chosen = np.argsort(hashes, kind="stable")[: _SPARE * most]
        return [(int(hashes[n]), int(found[n, 0]), int(found[n, 1])) for n in chosen]

    def tile(self, row: int, column: int) -> np.ndarray:
        """Return a tile of the grid as stored, uint8 [3, Y, X]; DataError where it cannot be decoded."""
        factor = self._handle().level_downsamples[self._level]
        height, width = (max(1, round(extent / factor)) for extent in self._extent_YX)
        top, left = (round(n * extent) for n, extent in zip((row, column), self._extent_YX, strict=True))
        picture = self._region((left, top), self._level, (width, height))
        picture = picture.resize(
            self.size_YX[::-1], Image.Resampling.BICUBIC
        )  # widens its filter: antialiased
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

    def _overview(self) -> tuple[np.ndarray, tuple[float, float]]:
        """Return the smallest level as uint8 [Y, X, 3], reduced where it is large, and the finest pixels a pixel."""
        slide = self._handle()
        level = slide.level_count - 1
        width, height = slide.level_dimensions[level]
        factor = slide.level_downsamples[level]
        if width * height > _SMALLEST_LEVEL_PIXELS:
            raise DataError(f"its smallest level still has {width}x{height} pixels")
        reduce = max(1, int(np.ceil(np.sqrt(width * height / _OVERVIEW_PIXELS))))
        block = max(1, _BLOCK // reduce) * reduce
        rows = []
        for top in range(0, height, block):
            row = []
            for left in range(0, width, block):
                size = (min(block, width - left), min(block, height - top))
                picture = self._region((round(left * factor), round(top * factor)), level, size)
                row.append(np.asarray(picture.reduce(reduce)))
            rows.append(np.concatenate(row, axis=1))
        return np.concatenate(rows), (factor * reduce, factor * reduce)

    def _region(self, place_XY: tuple[int, int], level: int, size_XY: tuple[int, int]) -> Image.Image:
        """Read a region as RGB, white where the slide has no pixels; the place counts pixels of the finest level."""
        from openslide import OpenSlideError

        try:
            region = self._handle().read_region(place_XY, level, size_XY)
        except OpenSlideError as error:
            self.close()  # after an error a handle gives nothing but that error
            raise DataError(f"a tile cannot be decoded ({error})") from error
        picture = Image.new("RGB", region.size, "white")
        picture.paste(region, mask=region.getchannel("A"))
        return picture

    def _handle(self) -> "OpenSlide":
        if self._open is None:
            from openslide import OpenSlide, OpenSlideCache, OpenSlideError

            try:
                self._open = OpenSlide(self.path)
                self._open.set_cache(OpenSlideCache(_CACHE_BYTES))
            except OpenSlideError as error:
                raise DataError(
                    f"it is no slide that OpenSlide can open ({error or type(error).__name__})"
                ) from error
        return self._open


def _pixel_size(properties: Any) -> tuple[float, float]:
    """Return micrometres a pixel of the finest level, (Y, X), as stated or from the objective's power."""
    try:
        if "openslide.mpp-x" in properties:
            across = float(properties["openslide.mpp-x"])
            microns = float(properties.get("openslide.mpp-y", across)), across
        else:
            power = _POWER_MICRONS / float(properties["openslide.objective-power"])
            microns = power, power
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise DataError("it states neither the size of its pixels nor its objective's power") from error
    if not all(_MICRONS[0] <= um <= _MICRONS[1] for um in microns):
        raise DataError(f"its pixels are said to be {microns[1]:g} x {microns[0]:g} um")
    if max(microns) > MICRONS * COARSE:
        raise DataError(f"its finest pixels are {max(microns):g} um; tiles have pixels of {MICRONS:g} um")
    return microns


def _check_size(slide: "OpenSlide") -> None:
    """Refuse a header that declares more pixels, or larger tiles of the file's own, than slides have."""
    width, height = slide.dimensions
    if width * height > _MOST_PIXELS:
        raise DataError(f"it declares {width}x{height} pixels")
    for level in range(slide.level_count):
        for edge in ("width", "height"):
            if int(slide.properties.get(f"openslide.level[{level}].tile-{edge}", 0)) > _TILE_EDGE:
                raise DataError(f"its file is made of tiles of more than {_TILE_EDGE} pixels")


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Return a uint64 hash of each uint64 (the finaliser of splitmix64)."""
    mixed = numbers ^ np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
