"""Which units train and which validate: the publisher's word, whole groups, and units that are left out."""

from sample_files import KEY

from mnemos.sharding.building.splits import assign_splits
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES
from mnemos.sharding.sources.samples import read_unit
from mnemos.sharding.sources.units import Unit


def unit(name: str, group: str, split: str = "", left_out: str = "") -> Unit:
    return Unit(name=name, reader="image", files=(), group=group, split=split, left_out=left_out)


def test_published_splits_hold_and_groups_stay_whole():
    validating = [unit("v", "p50", "val"), unit("w", "p0", "val")]
    units = [*validating, *(unit(f"t{n}", f"p{n}", "train") for n in range(20))]
    splits = dict(zip((one.name for one in units), assign_splits(units, 0.9, KEY), strict=True))
    assert {name for name, split in splits.items() if split == "val"} == {"v", "w", "t0"}
    assert assign_splits(units, 0, KEY) == list(splits.values()), (
        "no share of ours, but the publisher's stays"
    )


def test_units_left_out_have_no_say_in_the_split():
    free = [unit(f"f{n}", f"g{n}") for n in range(20)]
    alone = assign_splits(free, 0.3, KEY)
    gone = [unit(f"x{n}", f"h{n}", "val", "test") for n in range(50)]
    assert assign_splits(free + gone, 0.3, KEY)[:20] == alone and alone.count("val") == 6


def test_a_unit_known_to_be_broken_or_left_out_is_not_read():
    size = STORED_SIZES["sample"]
    for given in (
        unit("a", "", left_out="no reason"),
        Unit(name="a", reader="image", files=(), broken="torn"),
    ):
        outcome = read_unit(given, MODALITIES["xray"], size)
        assert (outcome.broken, outcome.left_out, outcome.samples) == (given.broken, given.left_out, ())
