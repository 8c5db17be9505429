"""A shard set gives back what was put in, in the same bytes every time, and never a damaged sample in silence."""

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from sample_files import KEY, grey_film

from mnemos.sharding import codecs
from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.manifest import file_sha256, load_manifest, write_manifest
from mnemos.sharding.modalities import MODALITIES
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.sample import Sample
from mnemos.sharding.tokenizer import MASK, PAD, UNK, load_tokenizer, starts_word, train_tokenizer
from mnemos.sharding.writer import ShardSetWriter

TEXTS = [
    f"The heart is normal in size. Pneumothorax is absent, lungs are clear: case {n}." for n in range(12)
]


def make_samples(name: str) -> tuple[list, tuple[int, ...]]:
    random = np.random.default_rng(1)
    if MODALITIES[name].kind == "text":
        return TEXTS, (48,)
    if MODALITIES[name].kind == "volume":
        return [random.integers(-1024, 1025, (4, 8, 8)).astype(np.int16) for _ in range(12)], (4, 8, 8)
    films = [grey_film(seed, (16, 24)) for seed in range(12)]
    channels = MODALITIES[name].channels
    return [np.stack([np.roll(film, c, axis=1) for c in range(channels)]) for film in films], (16, 24)


def write_set(directory: Path, name: str, **options) -> list:
    samples, shape = make_samples(name)
    tokenizer_file = None
    if MODALITIES[name].kind == "text":
        tokenizer_file = directory.parent / "tokenizer.json"
        train_tokenizer(TEXTS, 400).save(str(tokenizer_file))
    with ShardSetWriter(
        directory,
        modality=MODALITIES[name],
        source="synthetic",
        shape=shape,
        spacing_mm=(4.0, 3.0, 3.0) if len(shape) == 3 else None,
        preset="sample",
        classes=("a", "b"),
        recipe={"made": "by a test"},
        key=KEY,
        tokenizer_file=tokenizer_file,
        shard_bytes=8192,
        **options,
    ) as writer:
        for number, array in enumerate(samples):
            sample = Sample(
                array=array,
                source=f"secret_{number}",
                group=f"patient_{number // 2}",
                label=("a", "b", "")[number % 3],
                scale=0.5 + number,
                shift=-float(number),
            )
            writer.add("val" if number % 4 == 0 else "train", sample, cluster=np.int32(number))
    return samples


IMAGES = [name for name in MODALITIES if MODALITIES[name].kind == "image"]


@pytest.mark.parametrize(
    ("name", "lossless"), [*((name, False) for name in MODALITIES), *((name, True) for name in IMAGES)]
)
def test_round_trip(tmp_path, name, lossless):
    samples = write_set(tmp_path / "set", name, lossless=lossless)
    seen = 0
    for split in ("train", "val"):
        shards = ShardSet(tmp_path / "set", split)
        places = [n for n in range(12) if (n % 4 == 0) == (split == "val")]
        assert len(shards) == len(places) == shards.manifest.splits[split].samples
        for place, number in enumerate(places):
            stored = shards.read(place)
            if MODALITIES[name].kind == "text":
                tokenizer = load_tokenizer(tmp_path / "set" / "tokenizer.json")
                assert stored.tolist() == tokenizer.encode(samples[number]).ids[:48]
                assert shards.text(place) == samples[number]
            elif MODALITIES[name].kind == "image" and not lossless:
                assert stored.shape == samples[number].shape
                assert np.abs(stored.astype(int) - samples[number]).mean() < 3
            else:
                np.testing.assert_array_equal(stored, samples[number])
            assert shards.labels[place] == (0, 1, -1)[number % 3]
            assert shards.index["key"][place].decode() == hashed_name(KEY, f"secret_{number}")
            assert shards.index["group"][place].decode() == hashed_name(KEY, f"patient_{number // 2}")
            assert shards.index["scale"][place] == 0.5 + number
            assert shards.index["shift"][place] == -number
            assert shards.index["cluster"][place] == number
            seen += 1
    assert seen == 12


def test_plain_webdataset_reads_every_sample(tmp_path):
    write_set(tmp_path / "set", "ct")
    shards = ShardSet(tmp_path / "set", "train")
    assert len(shards.manifest.splits["train"].shards) > 1, "the set must span several shards"
    urls = [str(tmp_path / "set" / s.name) for s in shards.manifest.splits["train"].shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["vol"] for sample in found] == [shards.payload(place) for place in range(len(shards))]
    assert [sample["__key__"].encode() for sample in found] == shards.index["key"].tolist()


def test_same_samples_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_set(tmp_path / name, "ct")
    files = sorted(
        path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()
    )
    assert len(files) >= 5
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_fingerprint_follows_the_content(tmp_path):
    for name in ("ct", "mri"):
        write_set(tmp_path / name, name)
    assert load_manifest(tmp_path / "ct").fingerprint != load_manifest(tmp_path / "mri").fingerprint


def test_a_flipped_byte_anywhere_in_a_sample_is_a_data_error_with_shard_and_key(tmp_path):
    write_set(tmp_path / "set", "ct")
    shards = ShardSet(tmp_path / "set", "train")
    place = 3
    path = tmp_path / "set" / "train" / f"{shards.index['shard'][place]:06d}.tar"
    whole = path.read_bytes()
    start, span = int(shards.index["start"][place]), int(shards.index["span"][place])
    assert whole[start : start + 16] == shards.index["key"][place], "a span begins with a header"
    for at in range(start, start + span, 37):  # headers, payload, description and padding alike
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            ShardSet(tmp_path / "set", "train").read(place)
        assert path.name in str(caught.value)
        assert shards.index["key"][place].decode() in str(caught.value)
        ShardSet(tmp_path / "set", "train").read(place - 1)


def test_the_spans_are_the_shard(tmp_path):
    write_set(tmp_path / "set", "report")
    shards = ShardSet(tmp_path / "set", "train")
    end = 0
    for start, span, shard in zip(*(shards.index[name] for name in ("start", "span", "shard")), strict=True):
        assert start == (end if shard == 0 else 0) or shard > 0
        end = start + span
    for number, shard in enumerate(shards.manifest.splits["train"].shards):
        mine = shards.index["shard"] == number
        assert shard.samples == mine.sum()
        covered = int(shards.index["span"][mine].sum())
        rest = (tmp_path / "set" / shard.name).read_bytes()[covered:]
        assert not any(rest), "nothing but tar's end lies behind the samples"


def write_index(folder: Path, columns: dict, *, compressed: bool = False) -> None:
    """Put another index in the place of the train split's, with a manifest that knows it."""
    file = folder / "train" / "index.npz"
    (np.savez_compressed if compressed else np.savez)(file, **columns)
    manifest = load_manifest(folder)
    split = replace(manifest.splits["train"], index_sha256=file_sha256(file))
    manifest = replace(manifest, splits={**manifest.splits, "train": split})
    write_manifest(folder, replace(manifest, fingerprint=manifest.content_fingerprint()))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("shard", 99, "a shard that is not there"),
        ("shard", -1, "a shard that is not there"),
        ("start", -512, "outside its shard"),
        ("span", 1 << 30, "outside its shard"),
        ("span", -512, "outside its shard"),
        ("offset", 0, "outside its shard"),
        ("size", 1 << 28, "outside its shard"),
    ],
)
def test_an_index_that_leads_outside_is_refused(tmp_path, column, value, told):
    write_set(tmp_path / "set", "ct")
    columns = ShardSet(tmp_path / "set", "train").index
    columns[column][4] = value
    write_index(tmp_path / "set", columns)
    with pytest.raises(UserError, match=told):
        ShardSet(tmp_path / "set", "train")


def test_an_index_that_could_be_a_bomb_or_a_pickle_is_refused(tmp_path):
    write_set(tmp_path / "set", "ct")
    columns = ShardSet(tmp_path / "set", "train").index
    write_index(tmp_path / "set", columns, compressed=True)
    with pytest.raises(UserError, match="compressed"):
        ShardSet(tmp_path / "set", "train")
    write_index(tmp_path / "set", {**columns, "extra": np.array([{}] * 9, dtype=object)})
    with pytest.raises(UserError, match="allow_pickle"):
        ShardSet(tmp_path / "set", "train")


def test_an_index_that_declares_more_than_it_holds_is_refused(tmp_path):
    write_set(tmp_path / "set", "ct")
    columns = ShardSet(tmp_path / "set", "train").index
    write_index(tmp_path / "set", columns)
    file = tmp_path / "set" / "train" / "index.npz"
    content = file.read_bytes()
    assert content.count(b"'shape': (9,), }   ") == len(columns), "a header has room for a larger number"
    lying = tmp_path / "lying.npz"
    with zipfile.ZipFile(file) as honest, zipfile.ZipFile(lying, "w") as archive:
        for member in honest.infolist():
            column = honest.read(member).replace(b"'shape': (9,), }         ", b"'shape': (9000000000,), }")
            archive.writestr(member, column)
    lying.replace(file)
    manifest = load_manifest(tmp_path / "set")
    split = replace(manifest.splits["train"], index_sha256=file_sha256(file))
    manifest = replace(manifest, splits={**manifest.splits, "train": split})
    write_manifest(tmp_path / "set", replace(manifest, fingerprint=manifest.content_fingerprint()))
    with pytest.raises(UserError, match="declares"):
        ShardSet(tmp_path / "set", "train")


def test_samples_larger_than_any_are_refused(tmp_path):
    write_set(tmp_path / "set", "ct")
    manifest = replace(load_manifest(tmp_path / "set"), shape=(1 << 20, 1 << 20, 1 << 20))
    write_manifest(tmp_path / "set", replace(manifest, fingerprint=manifest.content_fingerprint()))
    with pytest.raises(UserError, match="larger than any"):
        load_manifest(tmp_path / "set")


def test_a_broken_sample_is_skipped_and_its_follower_stands_in(tmp_path):
    write_set(tmp_path / "set", "ct")
    shards = ShardSet(tmp_path / "set", "train")
    for place in (3, 4):
        path = tmp_path / "set" / shards.manifest.splits["train"].shards[shards.index["shard"][place]].name
        content = bytearray(path.read_bytes())
        content[int(shards.index["offset"][place])] ^= 1
        path.write_bytes(content)
    again = ShardSet(tmp_path / "set", "train")
    out = np.zeros((3, *again.stored_shape), again.dtype)
    taken, skipped = again.read_into([2, 3, 7], out)
    assert taken.tolist() == [2, 5, 7]
    assert [one.place for one in skipped] == [3, 4]
    assert all(again.index["key"][one.place].decode() in one.reason for one in skipped)
    for row, place in enumerate(taken):
        np.testing.assert_array_equal(out[row], again.read(int(place)))


def test_a_set_of_nothing_but_broken_samples_ends(tmp_path):
    write_set(tmp_path / "set", "ct")
    for path in (tmp_path / "set" / "train").glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    shards = ShardSet(tmp_path / "set", "train")
    with pytest.raises(DataError, match="9 broken samples in a row"):
        shards.read_into([0], np.zeros((1, *shards.stored_shape), shards.dtype))


@pytest.mark.parametrize("victim", ["train/000000.tar", "train/index.npz", "manifest.json"])
def test_a_truncated_or_missing_file_is_refused(tmp_path, victim):
    write_set(tmp_path / "set", "ct")
    path = tmp_path / "set" / victim
    whole = path.read_bytes()
    path.write_bytes(whole[:-700])
    with pytest.raises(UserError, match=Path(victim).name):
        ShardSet(tmp_path / "set", "train")
    path.unlink()
    with pytest.raises(UserError, match=Path(victim).name):
        ShardSet(tmp_path / "set", "train")


def test_a_changed_manifest_is_refused(tmp_path):
    write_set(tmp_path / "set", "ct")
    path = tmp_path / "set" / "manifest.json"
    path.write_text(path.read_text().replace('"a"', '"c"'))
    with pytest.raises(UserError, match="fingerprint"):
        load_manifest(tmp_path / "set")


@pytest.mark.parametrize("state", ["missing", "empty", "no shard set"])
def test_folders_that_are_no_shard_set(tmp_path, state):
    folder = tmp_path / "data"
    if state != "missing":
        folder.mkdir()
    if state == "no shard set":
        (folder / "film.jpg").touch()
    with pytest.raises(UserError, match=r"mnemos\.sharding\.build"):
        load_manifest(folder)


def test_nothing_is_left_when_writing_fails(tmp_path):
    with pytest.raises(DataError, match="shape"), open_writer(tmp_path / "set") as writer:
        writer.add("train", Sample(array=np.zeros((4, 8, 8), np.int16), source="good"))
        writer.add("train", Sample(array=np.zeros((4, 8, 9), np.int16), source="bad"))
    assert list(tmp_path.iterdir()) == []


def test_a_name_used_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="second sample"), open_writer(tmp_path / "set") as writer:
        for _ in range(2):
            writer.add("train", Sample(array=np.zeros((4, 8, 8), np.int16), source="same"))


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        open_writer(tmp_path / "set")
    assert (tmp_path / "set" / "precious.txt").read_text() == "mine"


def test_encoded_samples_move_to_another_set_unchanged(tmp_path):
    write_set(tmp_path / "set", "report")
    shards = ShardSet(tmp_path / "set", "train")
    with ShardSetWriter(
        tmp_path / "buffer",
        modality=shards.manifest.modality,
        source="synthetic",
        shape=shards.manifest.shape,
        spacing_mm=None,
        preset="sample",
        classes=shards.manifest.classes,
        recipe=shards.manifest.recipe,
        key=b"another key that must not matter",
        tokenizer_file=tmp_path / "set" / shards.manifest.tokenizer.file,
    ) as writer:
        for place in (5, 2):
            writer.add_encoded(
                "train", shards.payload(place), shards.text(place), shards.row(place), rank=place
            )
    buffer = ShardSet(tmp_path / "buffer", "train")
    assert len(ShardSet(tmp_path / "buffer", "val")) == 0
    for new, old in ((0, 5), (1, 2)):
        assert buffer.payload(new) == shards.payload(old)
        assert buffer.text(new) == shards.text(old)
        for column in ("key", "group", "label", "scale", "shift"):
            assert buffer.index[column][new] == shards.index[column][old]
        assert buffer.index["rank"][new] == old


def test_a_reader_travels_to_a_worker(tmp_path):
    write_set(tmp_path / "set", "xray")
    shards = ShardSet(tmp_path / "set", "train")
    first = shards.read(0)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(shards)).read(0), first)


def test_decoders_check_the_size_first():
    with pytest.raises(ValueError, match="16x24"):
        codecs.decode_jpeg(
            codecs.encode_image(np.zeros((1, 16, 24), np.uint8)), np.empty((24, 16, 1), np.uint8)
        )
    with pytest.raises(ValueError, match="voxels"):
        codecs.decode_volume(
            codecs.encode_volume(np.zeros((2, 3, 4), np.int16)), np.empty((2, 3, 5), np.int16)
        )
    with pytest.raises(ValueError, match="token ids"):
        codecs.decode_ids(codecs.encode_ids(np.arange(9)), 8)
    with pytest.raises(ValueError, match="65535"):
        codecs.encode_ids(np.array([65_536]))


def test_tokenizer_is_reproducible_and_marks_words(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 400)
    assert tokenizer.to_str() == train_tokenizer(TEXTS, 400).to_str()
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[MASK]", "[UNK]")] == [PAD, MASK, UNK]
    encoded = tokenizer.encode("the PNEUMOTHORAXES, again")
    assert encoded.ids == tokenizer.encode("The pneumothoraxes, AGAIN").ids
    starts = starts_word(tokenizer)
    assert len(starts) == tokenizer.get_vocab_size()
    words = np.cumsum(starts[encoded.ids])
    pieces = {}
    for word, token in zip(words, encoded.tokens, strict=True):
        pieces[word] = pieces.get(word, "") + token.replace("Ġ", "")
    assert list(pieces.values()) == ["the", "pneumothoraxes", ",", "again"]
    assert "pneumothorax" in {t.replace("Ġ", "") for t in tokenizer.get_vocab()}


def test_a_rare_name_does_not_enter_the_vocabulary():
    texts = [*TEXTS, *["seen by doctor Quodlibetius"] * 4]
    vocabulary = " ".join(train_tokenizer(texts, 1000).get_vocab())
    assert "quodlib" not in vocabulary
    assert "quodlib" in " ".join(train_tokenizer([*texts, texts[-1]], 1000).get_vocab())


def open_writer(directory: Path) -> ShardSetWriter:
    return ShardSetWriter(
        directory,
        modality=MODALITIES["ct"],
        source="synthetic",
        shape=(4, 8, 8),
        spacing_mm=(1.0, 1.0, 1.0),
        preset="sample",
        classes=(),
        recipe={},
        key=KEY,
    )
