"""Whatever happens to a set's bytes, a sample is read as it was written, or refused by its shard and key.

Damage is drawn by hypothesis, the same every time. `pytest -s` prints how WebDataset's own reader fares with it.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_sets import PAYLOADS, contents, copied, files, write_small_set

from mnemos.sharding import manifest as manifests
from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.manifest import load_manifest, write_manifest
from mnemos.sharding.reader import ShardSet, Skipped
from mnemos.sharding.stream import RawBatch, Request, stream
from mnemos.sharding.tokenizer import PAD

DECODED = 2_000  # payloads of each kind
bounded = settings(
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for payload in PAYLOADS:
        write_small_set(folder / payload, payload)
    return folder


Damage = tuple[int, float, str, int]
damages = st.lists(
    st.tuples(
        st.integers(0, 99),  # which file
        st.floats(0, 1, exclude_max=True),  # where in it
        st.sampled_from(["flip", "flip", "flip", "zero", "fill", "cut", "insert"]),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)


def apply(whole: dict[str, bytes], drawn: list[Damage]) -> dict[str, bytes]:
    """Return the files that changed; half of the damage goes to shards."""
    names = sorted(whole)
    shards = [name for name in names if name.endswith(".tar")]
    changed = dict[str, bytes]()
    for file, place, way, number in drawn:
        name = (shards if file < 50 else names)[file % len(shards if file < 50 else names)]
        data = bytearray(changed.get(name, whole[name]))
        at = int(place * len(data))
        if way == "flip" and data:
            data[at] ^= 1 << number % 8
        elif way == "zero":
            data[at : at + number] = bytes(len(data[at : at + number]))
        elif way == "fill":
            data[at : at + number] = b"\xff" * len(data[at : at + number])
        elif way == "cut":
            del data[at:]
        elif way == "insert":
            data[at:at] = bytes([number])
        changed[name] = bytes(data)
    return {name: data for name, data in changed.items() if data != whole[name]}


class Reading:
    """Reads all of a damaged set in both ways and compares with what was written."""

    def __init__(
        self, folder: Path, whole: dict[str, bytes], original: dict[str, list[Any]], changed: dict[str, bytes]
    ) -> None:
        self.folder, self.whole, self.original, self.changed = folder, whole, original, changed

    def run(self) -> int:
        """Return how many samples were refused."""
        refused = 0
        for split in ("train", "val"):
            try:
                shards = ShardSet(self.folder, split)
            except UserError as error:
                assert any(name in str(error) for name in self.changed), error
                return 0
            assert not {"manifest.json", f"{split}/index.npz"} & set(self.changed), "nobody noticed"
            hit = {place for place in range(len(shards)) if self.is_hit(shards, place)}
            try:
                self.read_into(shards, hit)
                self.stream(shards, hit)
            except UserError as error:
                assert "tokenizer.json" in self.changed and "tokenizer.json" in str(error)
            refused += len(hit)
        return refused

    def is_hit(self, shards: ShardSet, place: int) -> bool:
        """Return whether a sample's bytes are others than they were."""
        row = shards.row(place)
        name = shards.manifest.splits[shards.split].shards[row["shard"]].name
        if name not in self.changed:
            return False
        begin, end = int(row["start"]), int(row["start"] + row["span"])
        return self.changed[name][begin:end] != self.whole[name][begin:end]

    def read_into(self, shards: ShardSet, hit: set[int]) -> None:
        text = shards.manifest.kind == "text"
        for place in range(len(shards)):
            out: Any = [] if text else np.zeros((1, *shards.stored_shape), shards.dtype)
            try:
                taken, skipped = shards.read_into([place], out)
            except DataError as error:
                assert hit == set(range(len(shards)))
                self.names_its_sample(shards, place - 1, str(error))
                continue
            assert (int(taken[0]) == place) == (place not in hit)
            assert [one.place for one in skipped] == self.skipped_for(place, hit, len(shards))
            for one in skipped:
                self.names_its_sample(shards, one.place, one.reason)
            stored = out[0] if shards.manifest.kind != "image" else out[0].transpose(2, 0, 1)
            np.testing.assert_array_equal(stored, self.expected(shards, int(taken[0])))

    def stream(self, shards: ShardSet, hit: set[int]) -> None:
        told: list[int] = []

        def plan() -> Iterator[Request]:
            for step in range(0, len(shards), 2):
                samples = np.arange(step, min(step + 2, len(shards)))
                yield Request(step=step, member=0, samples=samples, places=samples)

        def on_skip(one: ShardSet, skipped: Skipped) -> None:
            self.names_its_sample(one, skipped.place, skipped.reason)
            told.append(skipped.place)

        seen = 0
        batches = stream([shards], plan, on_skip=on_skip, workers=0, pin=False)
        try:
            for batch in batches:
                seen += self.compare(shards, batch, hit)
                del batch
        except DataError:
            assert hit == set(range(len(shards)))
            return
        assert seen == len(shards) and set(told) == hit

    def compare(self, shards: ShardSet, batch: RawBatch, hit: set[int]) -> int:
        for row, place in enumerate(batch.place_B.tolist()):
            taken = (place + len(self.skipped_for(place, hit, len(shards)))) % len(shards)
            stored = batch.data[row].numpy()
            if shards.manifest.kind == "text":
                stored = stored[stored != PAD]
            elif shards.manifest.kind == "volume":
                stored = stored[0]
            np.testing.assert_array_equal(stored, self.expected(shards, taken))
            assert float(batch.scale_B[row]) == float(shards.index["scale"][taken])
        return len(batch.place_B)

    def expected(self, shards: ShardSet, place: int) -> np.ndarray:
        return np.asarray(self.original[shards.index["key"][place].decode()][0])

    def skipped_for(self, place: int, hit: set[int], total: int) -> list[int]:
        """Return the broken samples met before one is found that stands in for `place`."""
        met = []
        while place in hit:
            met.append(place)
            place = (place + 1) % total
        return met

    def names_its_sample(self, shards: ShardSet, place: int, reason: str) -> None:
        row = shards.row(place % len(shards))
        name = shards.manifest.splits[shards.split].shards[row["shard"]].name
        assert name in reason and row["key"].decode() in reason, reason


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_sample_is_read_as_it_was_or_refused_by_name(sets, tmp_path, payload):
    folder = copied(sets / payload, tmp_path / "set")
    whole, original, came = files(folder), contents(folder), Counter[str]()

    @bounded
    @given(damages)
    def check(drawn: list[Damage]) -> None:
        changed = apply(whole, drawn)
        try:
            for name, data in changed.items():
                (folder / name).write_bytes(data)
            refused = Reading(folder, whole, original, changed).run()
            came["with refused samples" if refused else "as a whole" if changed else "not"] += 1
        finally:
            for name in changed:
                (folder / name).write_bytes(whole[name])

    check()
    assert came["with refused samples"] >= 5 and came["as a whole"] >= 5, came


def test_whoever_computes_every_hash_gets_no_further(sets, tmp_path):
    """Damage to an index under a manifest that vouches for it: any UserError or DataError, nothing else."""
    folder = copied(sets / "vol", tmp_path / "set")
    whole, came = (folder / "train" / "index.npz").read_bytes(), Counter[str]()
    directory = whole.index(b"PK\1\2")  # where zip says how its members are stored
    byte = st.one_of(st.integers(0, len(whole) - 1), st.integers(directory, len(whole) - 1))
    value = st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 8, 32, 64, 128]))

    @settings(bounded, max_examples=200)
    @example([(directory + 8, 1)])  # "encrypted"
    @example([(directory + 6, 64)])  # "of a version to come"
    @given(st.lists(st.tuples(byte, value), min_size=1, max_size=4))
    def check(changes: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for place, value in changes:
            data[place] = value
        (folder / "train" / "index.npz").write_bytes(data)
        vouch_for_index(folder)
        came[outcome(folder)] += 1

    check()
    assert came["UserError"] > 50 and set(came) <= {"UserError", "DataError", "read"}, came


def vouch_for_index(folder: Path) -> None:
    """Write the manifest anew with the right hash of the train split's index."""
    manifest = load_manifest(folder)
    sha256 = manifests.file_sha256(folder / "train" / "index.npz")
    split = replace(manifest.splits["train"], index_sha256=sha256)
    manifest = replace(manifest, splits={**manifest.splits, "train": split})
    write_manifest(folder, replace(manifest, fingerprint=manifest.content_fingerprint()))


def outcome(folder: Path) -> str:
    """Read every sample and return the name of the first error of ours, or "read"; any other error is a failure."""
    try:
        for split in ("train", "val"):
            shards = ShardSet(folder, split)
            for place in range(len(shards)):
                shards.read(place)
                shards.text(place)
    except (UserError, DataError) as error:
        return type(error).__name__
    return "read"


@pytest.mark.parametrize("payload", ["ids", "png"])
def test_a_manifest_that_says_anything_gets_no_further(sets, tmp_path, payload):
    """A value anywhere in the manifest replaced by another, its checksum and fingerprint right again."""
    folder = copied(sets / payload, tmp_path / "set")
    record, came = json.loads((folder / "manifest.json").read_text()), Counter[str]()
    leaves = list(places(record))
    anything = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({})
    )

    @settings(bounded, max_examples=200)
    @given(st.sampled_from(leaves), anything)
    def check(place: tuple[Any, ...], value: Any) -> None:
        changed = json.loads(json.dumps(record))
        inside = changed
        for step in place[:-1]:
            inside = inside[step]
        inside[place[-1]] = value
        vouch_for(folder / "manifest.json", changed)
        came[outcome(folder)] += 1

    check()
    assert came["UserError"] > 50 and set(came) <= {"UserError", "DataError", "read"}, came


def places(record: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a JSON value."""
    inside = (
        record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    )
    for name, value in inside:
        yield (*above, name)
        yield from places(value, (*above, name))


def vouch_for(file: Path, record: dict[str, Any]) -> None:
    """Write a manifest's record with the checksums its reader expects, where they can be computed at all."""
    del record["checksum"]
    try:
        body = {name: value for name, value in record.items() if name != "format"}
        record["fingerprint"] = manifests._from_record(json.loads(json.dumps(body))).content_fingerprint()
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError):
        record["fingerprint"] = "none can be computed"
    try:
        file.write_bytes(manifests._sealed(record))
    except UnicodeEncodeError:
        file.write_text(json.dumps(record))


def test_decoders_refuse_damage_and_never_crash(tmp_path):
    """A crash in a decoder's C would end this process and its readers; so it is tried in another one."""
    worker = Path(__file__).with_name("fuzz_decoders.py")
    last = tmp_path / "last"
    done = subprocess.run(
        [sys.executable, str(worker), str(DECODED), str(last)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    tried = last.read_bytes()[:400] if last.exists() else b""
    assert done.returncode == 0, f"{done.returncode} at {tried!r}: {done.stderr[-500:]}"
    found = json.loads(done.stdout)
    for payload, came in found["results"].items():
        print(f"{payload}: {came}")
        assert set(came) <= {"decoded", "refused"} and came["refused"] > DECODED // 20, (payload, came)
    assert found["slowest_s"] < 2 and found["peak_bytes"] < 512 << 20, found


def test_one_flipped_bit_of_a_shard_beside_webdatasets_own_reader(sets, tmp_path):
    """Count samples that are lost, or come otherwise than they were written, without a word."""
    folder = copied(sets / "vol", tmp_path / "set")
    name, draw = "train/000000.tar", random.Random(11)
    whole = (folder / name).read_bytes()
    end = len(whole.rstrip(b"\0"))
    truth = plain(folder / name)
    silent, noticed = Counter[str](), Counter[str]()
    for _ in range(200):
        bit = draw.randrange(end * 8)
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(data)
        shards = ShardSet(folder, "train")
        mine = [place for place in range(len(shards)) if shards.index["shard"][place] == 0]
        try:
            for place in mine:
                if shards.payload(place) != truth[shards.index["key"][place].decode()]["vol"]:
                    silent["ours"] += 1
            silent["ours"] += 1  # nothing was refused, although a bit of a sample is another one
        except DataError:
            noticed["ours"] += 1
        try:
            found = plain(folder / name)
            silent["webdataset lost samples"] += not truth.keys() <= found.keys()
            silent["webdataset changed samples"] += truth.keys() <= found.keys() and found != truth
        except Exception:  # noqa: BLE001  whatever it says, it says something
            noticed["webdataset"] += 1
    print(f"single-bit flips: {dict(noticed)} noticed, {dict(silent)} silent, of 200")
    assert noticed["ours"] == 200 and silent["ours"] == 0


def plain(path: Path) -> dict[str, dict[str, bytes]]:
    """Return what `webdataset.WebDataset` reads of a shard: key -> extension -> bytes."""
    found = {}
    for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
        key = sample.pop("__key__")
        found[key] = {name: value for name, value in sample.items() if not name.startswith("__")}
    return found
