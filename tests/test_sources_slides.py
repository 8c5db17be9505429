"""TCGA as gdc-client downloads it: pyramidal slides written here, tiled by the build command."""

import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from sample_files import KEY, key_file

from mnemos.sharding import build
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.sources import slides, tcga
from mnemos.sharding.sources.samples import find_units, read_unit
from mnemos.sharding.sources.slides import Slide, read_patient
from mnemos.sharding.sources.source import FindOptions
from mnemos.sharding.sources.tissue import tissue_mask, tissue_share
from mnemos.sharding.sources.units import Unit

PATHOLOGY, SIZE = MODALITIES["pathology"], STORED_SIZES["sample"]
GLASS, TISSUE, PLANTED = (244, 243, 245), (200, 120, 170), (0, 255, 255)
SLIDE = "TCGA-A1-A0SB-01Z-00-DX1.B34C267B-CAAA-4AB6-AD5C-276C26F997A1.svs"
EDGE = 256  # of the file's own tiles
SHEET_COLUMNS = ("File ID", "File Name", "Data Category", "Data Type", "Project ID", "Case ID", "Sample ID")


def section(height: int = 1024, width: int = 1536, seed: int = 0) -> np.ndarray:
    """Return a slide's pixels [Y, X, 3]: glass, and from 256 on a section whose shade tells the place."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = GLASS
    y, x = np.mgrid[: height - 256, : width - 256]
    shade = np.random.default_rng(seed).integers(-6, 7, (height - 256, width - 256)) + (y // 64 % 2) * 20 - 10
    pixels[256:, 256:] = np.clip(np.array(TISSUE) + (shade + x // 64 % 2)[..., None], 0, 255)
    return pixels


def write_slide(
    path: Path, pixels: np.ndarray, *, header: str = "|AppMag = 20|MPP = 0.5", levels=(4, 8)
) -> Path:
    """Write an Aperio file: levels in tiles; thumbnail, label and macro in strips, with planted colour and text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = f"Aperio Image Library v11.2.1\n{pixels.shape[1]}x{pixels.shape[0]} [0,0] (256x256) JPEG/RGB Q=70{header}"
    tiled = {
        "photometric": "rgb",
        "tile": (EDGE, EDGE),
        "compression": "zlib",
        "compressionargs": {"level": 1},
        "metadata": None,
    }
    strips = {"photometric": "rgb", "rowsperstrip": 16, "metadata": None}
    planted = np.full((64, 96, 3), PLANTED, np.uint8)
    with tifffile.TiffWriter(path) as file:
        file.write(
            pixels, description=f"{about}|User = CANARY-NAME|Date = 04/18/06", software="CANARY", **tiled
        )
        file.write(planted, description="Aperio Image Library v11.2.1\nCANARY", **strips)
        for factor in levels:
            file.write(np.ascontiguousarray(pixels[::factor, ::factor]), description=about, **tiled)
        for subfile, name in ((1, "label"), (9, "macro")):
            text = f"Aperio Image Library v11.2.1\n{name} 96x64 CANARY"
            file.write(planted, description=text, subfiletype=subfile, **strips)
    return path


def spoil_tiles(path: Path, which, page: int = 0) -> None:
    """Overwrite some of a slide's own tiles with what no decoder takes."""
    with tifffile.TiffFile(path) as file:
        places = [(file.pages[page].dataoffsets[n], file.pages[page].databytecounts[n]) for n in which]
    data = bytearray(path.read_bytes())
    for offset, size in places:
        data[offset : offset + size] = bytes(size)
    path.write_bytes(data)


def unit_of(*paths: Path) -> Unit:
    return Unit(name="TCGA-A1-A0SB", reader="slide", files=paths, group="TCGA-A1-A0SB")


def run(tmp_path, folder, *flags, out="set"):
    given = ["pathology", str(folder), "--source", "tcga", "--out", str(tmp_path / out)]
    return build.main([*given, "--key-file", key_file(tmp_path), "--workers", "1", *flags])


def write_tcga(root: Path) -> Path:
    """Write three patients' slides, one patient with two, as gdc-client leaves them."""
    names = {
        "22a29915-6712-4f7a-8dba-985ae9a1f005": SLIDE,
        "e5976406-473a-4fbd-8c97-e95187cdc1bd": "TCGA-A1-A0SB-01A-01-TS1.0F2E3D4C.svs",
        "fb3e261b-92ac-4027-b4d9-eb971a92a4c3": "TCGA-V4-A9E5-01Z-00-DX1.AAAA1111.svs",
        "6746fe84-0d92-4cf6-83b4-634b5ec6c630": "TCGA-V4-A9E7-01Z-00-DX1.BBBB2222.svs",
    }
    for seed, (folder, name) in enumerate(names.items()):
        write_slide(root / folder / name, section(seed=seed))
        (root / folder / "logs").mkdir()
        (root / folder / "logs" / f"{name}.parcel").write_text("CANARY")
        (root / folder / "annotations.txt").write_text("id\tcase\nCANARY\tTCGA-A1-A0SB\n")
    projects = ("TCGA-BRCA", "TCGA-BRCA", "TCGA-UVM", "TCGA-UVM")
    rows = [
        (file, name, "Biospecimen", "Slide Image", project, name[:12], name[:16])
        for (file, name), project in zip(names.items(), projects, strict=True)
    ]
    sheet = "\n".join("\t".join(row) for row in (SHEET_COLUMNS, *rows))
    (root / "gdc_sample_sheet.2026-11-20.tsv").write_text(sheet + "\n")
    return root


@pytest.fixture(scope="module")
def tcga_tree(tmp_path_factory):
    return write_tcga(tmp_path_factory.mktemp("tcga"))


@pytest.fixture
def few_tiles(monkeypatch):
    monkeypatch.setattr(slides, "MOST_TILES", 12)


def test_tcga_goes_through_the_build(tcga_tree, tmp_path, few_tiles):
    assert run(tmp_path, tcga_tree) == 0
    sets = [ShardSet(tmp_path / "set", split) for split in ("train", "val")]
    manifest = sets[0].manifest
    assert manifest.classes == ("TCGA-BRCA", "TCGA-UVM") and manifest.source == "tcga"
    assert "micrometres" in manifest.recipe["tiles"]
    groups = {}
    for shards in sets:
        for place in range(len(shards)):
            tile = shards.read(place)
            assert tile.shape == (3, 64, 64)
            inside = np.abs(tile.astype(int) - np.array(TISSUE)[:, None, None]).max(axis=0) < 40
            assert inside.mean() > 0.45, "tissue, and neither glass nor what a label shows"
            planted = np.abs(tile.astype(int) - np.array(PLANTED)[:, None, None]).max(axis=0) < 60
            assert not planted.any()
            label = manifest.classes[shards.labels[place]]
            groups.setdefault(shards.index["group"][place].decode(), []).append(label)
    expected = {"TCGA-A1-A0SB": "TCGA-BRCA", "TCGA-V4-A9E5": "TCGA-UVM", "TCGA-V4-A9E7": "TCGA-UVM"}
    assert groups == {hashed_name(KEY, patient): [project] * 12 for patient, project in expected.items()}
    written = b"".join(path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file())
    assert b"CANARY" not in written and b"Aperio" not in written and b"A0SB" not in written
    assert run(tmp_path, tcga_tree, out="again") == 0
    for path in (tmp_path / "set").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "set")).read_bytes()


def test_tiles_are_spread_over_all_slides_of_a_patient(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "MOST_TILES", 40)
    paths = [write_slide(tmp_path / f"{n}.svs", section(seed=n)) for n in range(2)]
    outcome = read_patient(unit_of(*paths), PATHOLOGY, SIZE)
    places = [sample.source.rpartition("/")[2].split(":") for sample in outcome.samples]
    assert len({tuple(place) for place in places}) == 40
    assert min(sum(name == f"{n}.svs" for name, _, _ in places) for n in range(2)) > 8
    rows, columns = (np.array([int(place[axis]) for place in places]) for axis in (1, 2))
    assert rows.min() >= 4 and columns.min() >= 4, "the section begins at pixel 256"
    assert rows.max() >= 14 and columns.max() >= 21 and np.median(columns) > 9, "not the first ones"
    monkeypatch.setattr(slides, "MOST_TILES", 7)
    fewer = read_patient(unit_of(*paths), PATHOLOGY, SIZE)
    assert [sample.source for sample in fewer.samples] == [sample.source for sample in outcome.samples[:7]]


@pytest.mark.parametrize(
    ("header", "levels", "edge", "factor"),
    [
        ("|AppMag = 20|MPP = 0.5", (4, 8), 64, 1),
        ("|AppMag = 40|MPP = 0.25", (4, 8), 128, 1),
        ("|AppMag = 40|MPP = 0.25", (2, 8), 64, 2),
        ("|AppMag = 40", (4, 8), 128, 1),
        ("|AppMag = 40|MPP = 0.2", (8,), 160, 1),
        ("|MPP = 0.125", (4, 8), 64, 4),
    ],
    ids=["20x", "40x", "40x with a level of 20x", "power alone", "odd pixels", "80x"],
)
def test_a_stored_pixel_is_half_a_micron(tmp_path, header, levels, edge, factor):
    """The tile at (row, column) is the region of that many microns, from the level that is just fine enough."""
    pixels = np.random.default_rng(0).integers(60, 200, (1024, 1024, 3), np.uint8)
    path = write_slide(tmp_path / SLIDE, pixels, header=header, levels=levels)
    with Slide(path, SIZE.image) as slide:
        tile = slide.tile(1, 2)
    extent = edge * factor
    region = pixels[extent : 2 * extent, 2 * extent : 3 * extent][::factor, ::factor]
    from PIL import Image

    expected = Image.fromarray(region).resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(tile, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("", "neither the size of its pixels nor"),
        ("|MPP = 1.0", "finest pixels are 1 um"),
        ("|MPP = 0.0001", "said to be 0.0001"),
        ("|AppMag = 0", "neither|said to be"),
    ],
    ids=["nothing", "coarse", "absurd", "no power"],
)
def test_a_slide_without_a_usable_pixel_size_is_broken(tmp_path, header, reason):
    path = write_slide(tmp_path / SLIDE, section(), header=header)
    outcome = read_unit(unit_of(path), PATHOLOGY, SIZE)
    assert not outcome.samples and any(part in outcome.broken for part in reason.split("|"))
    assert SLIDE in outcome.broken


def test_tiles_that_cannot_be_decoded_are_skipped_and_counted(tmp_path, monkeypatch):
    """OpenSlide gives up on a handle after an error: the slide is opened again and the rest is read."""
    monkeypatch.setattr(slides, "MOST_TILES", 500)
    path = write_slide(tmp_path / SLIDE, section())
    whole = read_patient(unit_of(path), PATHOLOGY, SIZE)
    spoil_tiles(path, [2 * 6 + 3])  # of 4 x 6; it holds 4 x 4 of ours
    outcome = read_patient(unit_of(path), PATHOLOGY, SIZE)
    assert outcome.skipped == {"tile that cannot be decoded": 16} and not outcome.broken
    kept = {sample.source: sample.array for sample in outcome.samples}
    assert len(kept) == len(whole.samples) - 16
    for sample in whole.samples:
        if sample.source in kept:
            np.testing.assert_array_equal(kept[sample.source], sample.array)
    monkeypatch.setattr(slides, "MOST_TILES", 100)
    outcome = read_patient(unit_of(path), PATHOLOGY, SIZE)
    assert len(outcome.samples) == 100, "others take their place"


def test_tiles_passed_over_are_counted_in_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "MOST_TILES", 500)
    folder = tmp_path / "tree" / "22a29915-6712-4f7a-8dba-985ae9a1f005"
    spoil_tiles(write_slide(folder / SLIDE, section()), [2 * 6 + 3])
    assert run(tmp_path, tmp_path / "tree") == 0
    assert ShardSet(tmp_path / "set", "train").manifest.skipped["tile that cannot be decoded"] == 16


def test_a_slide_that_is_mostly_corrupt_is_left(tmp_path, monkeypatch):
    path = write_slide(tmp_path / SLIDE, section())
    spoil_tiles(path, range(24))
    tried = []
    tile = Slide.tile
    monkeypatch.setattr(
        Slide, "tile", lambda slide, row, column: tried.append(row) or tile(slide, row, column)
    )
    outcome = read_unit(unit_of(path), PATHOLOGY, SIZE)
    assert "none of its 16 tiles tried" in outcome.broken and len(tried) == 16


@pytest.mark.parametrize("content", ["empty", "text", "truncated", "no overview"])
def test_a_slide_that_cannot_be_read_breaks_alone(tmp_path, content, few_tiles):
    bad = write_slide(tmp_path / "bad.svs", section())
    if content == "no overview":
        spoil_tiles(bad, [0], page=3)
    else:
        data = bad.read_bytes()
        bad.write_bytes(
            {"empty": b"", "text": b"no slide" * 99, "truncated": data[: len(data) // 2]}[content]
        )
    alone = read_unit(unit_of(bad), PATHOLOGY, SIZE)
    assert alone.broken.startswith("slide bad.svs: ") and not alone.samples
    both = read_unit(unit_of(bad, write_slide(tmp_path / SLIDE, section())), PATHOLOGY, SIZE)
    assert both.broken.startswith("slide bad.svs: ") and len(both.samples) == 12


def test_a_header_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    path = write_slide(tmp_path / SLIDE, section())
    for limit, value in (("_MOST_PIXELS", 1000), ("_SMALLEST_LEVEL_PIXELS", 1000), ("_TILE_EDGE", 128)):
        with monkeypatch.context() as patch:
            patch.setattr(slides, limit, value)
            assert read_unit(unit_of(path), PATHOLOGY, SIZE).broken


def test_glass_alone_is_left_out(tmp_path):
    path = write_slide(tmp_path / SLIDE, np.full((512, 512, 3), GLASS, np.uint8))
    assert "tissue" in read_unit(unit_of(path), PATHOLOGY, SIZE).left_out


def test_label_and_macro_are_never_read(tmp_path, monkeypatch, few_tiles):
    path = write_slide(tmp_path / SLIDE, section())
    assert set(openslide.OpenSlide(path).associated_images) == {"thumbnail", "label", "macro"}

    def refuse(slide):
        raise AssertionError("asked for the label")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    assert len(read_patient(unit_of(path), PATHOLOGY, SIZE).samples) == 12


def test_what_a_slide_has_no_pixels_for_is_white(tmp_path):
    path = write_slide(tmp_path / SLIDE, section(300, 300), levels=())
    with Slide(path, (64, 64)) as slide:
        beyond = slide._region((280, 280), 0, (64, 64))
    assert beyond.getpixel((40, 40)) == (255, 255, 255) and beyond.getpixel((5, 5)) != (255, 255, 255)


def test_a_large_overview_is_read_in_blocks(tmp_path, monkeypatch):
    path = write_slide(tmp_path / SLIDE, section(), levels=())
    with Slide(path, SIZE.image) as slide:
        whole = slide.places(100)
        monkeypatch.setattr(slides, "_OVERVIEW_PIXELS", 1024 * 1536 // 64)
        monkeypatch.setattr(slides, "_BLOCK", 200)
        regions = []
        region = slide._region
        monkeypatch.setattr(slide, "_region", lambda *given: regions.append(given) or region(*given))
        assert slide.places(100) == whole
    assert len(regions) == 6 * 8 and max(size for _, _, edges in regions for size in edges) <= 200


def test_pens_and_the_scanners_border_are_no_tissue():
    picture = np.full((64, 64, 3), GLASS, np.uint8)
    blocks = {
        "eosin": (230, 150, 190),
        "haematoxylin": (110, 80, 150),
        "pale": (232, 210, 228),
        "green pen": (30, 140, 70),
        "blue pen": (30, 40, 150),
        "cyan pen": (40, 120, 190),
        "red pen": (210, 20, 40),
        "black": (12, 10, 14),
        "grey": (150, 150, 150),
    }
    for number, colour in enumerate(blocks.values()):
        picture[6 * number : 6 * number + 6, 8:40] = colour
    mask = tissue_mask(picture)
    found = {
        name for number, name in enumerate(blocks) if mask[6 * number : 6 * number + 6, 8:40].mean() > 0.5
    }
    assert found == {"eosin", "haematoxylin", "pale"} and not mask[:, 40:].any() and not mask[54:].any()
    full = np.full((32, 32, 3), blocks["eosin"], np.uint8)
    full[::2] = blocks["haematoxylin"]
    assert tissue_mask(full).all(), "a slide full of tissue is not cut in half"
    assert not tissue_mask(np.zeros((8, 8, 3), np.uint8)).any()


def test_the_share_of_tissue_in_a_cell():
    mask = np.zeros((8, 8), bool)
    mask[:4, :6] = True
    share = tissue_share(mask, np.array([0, 4, 8]), np.array([0.0, 4.0, 8.0]))
    np.testing.assert_array_equal(share, [[1, 0.5], [0, 0]])
    tiny = tissue_share(mask, np.arange(9) * 0.5, np.arange(13) * 0.5)  # cells of half a pixel
    assert tiny.shape == (8, 12) and (tiny == 1).all()


def test_half_a_tile_of_tissue_is_enough(tmp_path, monkeypatch):
    pixels = np.full((512, 512, 3), GLASS, np.uint8)
    pixels[:, :32] = TISSUE  # half of column 0
    pixels[:, 160:184] = TISSUE  # three eighths of column 2
    monkeypatch.setattr(slides, "MOST_TILES", 500)
    outcome = read_patient(unit_of(write_slide(tmp_path / SLIDE, pixels)), PATHOLOGY, SIZE)
    assert {sample.source.rpartition(":")[2] for sample in outcome.samples} == {"0"} and len(
        outcome.samples
    ) == 8


def test_units_are_patients_with_their_project(tcga_tree, tmp_path):
    units = find_units(tcga_tree, PATHOLOGY, FindOptions(), "tcga")
    assert [(unit.name, unit.label, len(unit.files)) for unit in units] == [
        ("TCGA-A1-A0SB", "TCGA-BRCA", 2),
        ("TCGA-V4-A9E5", "TCGA-UVM", 1),
        ("TCGA-V4-A9E7", "TCGA-UVM", 1),
    ]
    for name in (
        f"TCGA-MESO/uuid/{SLIDE}",
        "uuid2/scan-of-mine.svs",
        "uuid3/TCGA-UD-AAC1-01Z-00-DX1.x.svs.partial",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    by_name = {unit.name: unit for unit in find_units(tmp_path, PATHOLOGY, FindOptions(), "tcga")}
    assert by_name["TCGA-A1-A0SB"].label == "TCGA-MESO", "a folder named like a project tells it, too"
    assert "barcode" in by_name["uuid2/scan-of-mine.svs"].broken
    assert "not ended" in by_name["uuid3/TCGA-UD-AAC1-01Z-00-DX1.x.svs.partial"].broken


@pytest.mark.parametrize(
    ("sheet", "needs"),
    [
        (None, "holds 1 .txt but pathology is built from TCGA slides"),
        ("File Name\tProject ID\nother.svs\tTCGA-OV\n", "speaks of none of the 1 slides"),
        ("a\tb\n1\t2\n", "a sample sheet has File Name and Project ID"),
    ],
    ids=["no slide", "another sheet", "no sheet"],
)
def test_mistakes_with_tcga(tmp_path, capsys, sheet, needs):
    folder = tmp_path / "slides"
    folder.mkdir()
    if sheet is None:
        (folder / "MANIFEST.txt").write_text("id\n")
    else:
        (folder / SLIDE).touch()
        (folder / "gdc_sample_sheet.tsv").write_text(sheet)
    assert run(tmp_path, folder) == 2
    error = capsys.readouterr().err
    assert needs in error and "Traceback" not in error and not (tmp_path / "set").exists()


def test_without_openslide_the_line_to_install_it_is_told(tcga_tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    assert run(tmp_path, tcga_tree) == 2
    assert "pip install openslide-python openslide-bin" in capsys.readouterr().err


def test_tcga_gives_colour_and_nothing_else(tcga_tree):
    assert not tcga.SOURCE.fits(MODALITIES["xray"]) and tcga.SOURCE.fits(PATHOLOGY)
