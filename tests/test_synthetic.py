"""The sample shards: labels cannot be read off brightness or colour, a constant predicts little, neighbours tell much."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mnemos.sharding.command import run_command
from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import MODALITIES
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.synthetic import bodies, chests, heads, make, tiles
from mnemos.sharding.synthetic.drawing import stream
from mnemos.sharding.synthetic.studies import Finding, Study, draw_studies
from mnemos.sharding.tokenizer import train_tokenizer

GROUPS = {"train": 66, "val": 24}  # 264 and 96 samples
TINY = {"train": 3, "val": 3}
PICTURES = ("xray", "ct", "mri", "pathology")
LEAST_CONSTANT = {"xray": 0.8, "ct": 0.8, "mri": 0.8, "pathology": 0.5}
PATCH = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "sample"
    make.make_sample_shards(root, progress=False, groups=GROUPS)
    return root


@cache
def values(root: Path, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return model values [N, C, Y, X] (volumes: [N, Z, Y, X], Z in the place of C) and labels [N]."""
    shard_set = ShardSet(root / name, split)
    scale, shift = (
        shard_set.index[column].reshape(-1, 1, 1, 1).astype(np.float32) for column in ("scale", "shift")
    )
    stored = np.stack([shard_set.read(place) for place in range(len(shard_set))])
    return stored * scale + shift, shard_set.labels


def as_targets(patches: np.ndarray) -> np.ndarray:
    """Normalise each patch [..., P] by its own mean and unbiased variance: what the pretext task predicts."""
    mean = patches.mean(-1, keepdims=True)
    return (patches - mean) / np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)


def as_patches(values_NCYX: np.ndarray) -> np.ndarray:
    """Cut into [N, L, P]; a grey image is not broadcast, which leaves the normalised values the same but for 3P - 1."""
    num, channels, height, width = values_NCYX.shape
    grid = values_NCYX.reshape(num, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.transpose(0, 2, 4, 3, 5, 1).reshape(num, -1, PATCH * PATCH * channels)


def ramps(patches: np.ndarray, channels: int) -> np.ndarray:
    """Return mean and slope down and across of every patch and colour: [N, L, 3 * (1 or channels)]."""
    num, places, _ = patches.shape
    grid = patches.reshape(num, places, PATCH, PATCH, channels)
    slope = (np.arange(PATCH) - (PATCH - 1) / 2) / 2.3  # of unit variance
    if channels not in (1, 3):
        grid = grid.mean(-1, keepdims=True)
    parts = [
        grid.mean((2, 3)),
        np.einsum("nlyxc,y->nlc", grid, slope) / 64,
        np.einsum("nlyxc,x->nlc", grid, slope) / 64,
    ]
    return np.concatenate(parts, -1).astype(np.float64)


def brightness(values_NCYX: np.ndarray, name: str) -> np.ndarray:
    """Return mean and spread of each colour."""
    flat = by_colour(values_NCYX, name)
    return np.concatenate([flat.mean(-1), flat.std(-1)], 1)


def histogram(values_NCYX: np.ndarray, name: str) -> np.ndarray:
    """Return the share of values in each of 32 steps, by colour."""
    low, high = (-3, 3) if name == "mri" else (-1, 1) if name == "ct" else (0, 1)
    steps = np.clip((by_colour(values_NCYX, name) - low) / (high - low) * 32, 0, 31).astype(int)
    return (
        np.stack([np.concatenate([np.bincount(colour, minlength=32) for colour in row]) for row in steps])
        / steps.shape[-1]
    )


def colours(values_NCYX: np.ndarray, name: str) -> np.ndarray:
    """Return the share of pixels of each of 6 x 6 x 6 colours (grey: of 100 grey values), as square roots."""
    flat = by_colour(values_NCYX, name)
    if flat.shape[1] == 3:
        cells = np.clip((flat * 6).astype(int), 0, 5)
        index, size = cells[:, 0] * 36 + cells[:, 1] * 6 + cells[:, 2], 216
    else:
        low, high = flat.min(), flat.max()
        index, size = ((flat[:, 0] - low) / (high - low) * 99).astype(int), 100
    return np.sqrt(np.stack([np.bincount(row, minlength=size) for row in index]) / index.shape[-1])


def by_colour(values_NCYX: np.ndarray, name: str) -> np.ndarray:
    """Return [N, C, values]; a volume's slices are one grey channel."""
    return values_NCYX.reshape(len(values_NCYX), MODALITIES[name].channels, -1)


@pytest.mark.parametrize("feature", [brightness, histogram, colours])
@pytest.mark.parametrize("name", PICTURES)
def test_no_class_is_told_without_looking_at_shape(shards: Path, name: str, feature) -> None:
    (train, train_labels), (val, val_labels) = values(shards, name, "train"), values(shards, name, "val")
    train, val = feature(train, name), feature(val, name)
    for model in (LogisticRegression(C=0.1, max_iter=1000), KNeighborsClassifier(15)):
        told = make_pipeline(StandardScaler(), model).fit(train, train_labels).predict(val)
        assert balanced_accuracy_score(val_labels, told) <= 0.7


@pytest.mark.parametrize("name", PICTURES)
def test_a_constant_predicts_little(shards: Path, name: str) -> None:
    train, val = (as_targets(as_patches(values(shards, name, split)[0])) for split in ("train", "val"))
    assert np.square(val - train.mean(0)).mean() >= LEAST_CONSTANT[name]


@pytest.mark.parametrize("name", PICTURES)
def test_visible_patches_tell_about_masked_ones(shards: Path, name: str) -> None:
    """The best linear guess of the masked slopes from a quarter of the patches beats the constant by far."""
    patches = {split: as_patches(values(shards, name, split)[0]) for split in ("train", "val")}
    channels = patches["train"].shape[-1] // PATCH**2
    seen = {split: ramps(part, channels) for split, part in patches.items()}
    wanted = {split: ramps(as_targets(part), channels) for split, part in patches.items()}
    for part in (seen, wanted):
        mean = part["train"].mean(0)
        part.update({split: array - mean for split, array in part.items()})
    spread = seen["train"].std((0, 1))
    x, y = (
        (seen["train"] / spread).reshape(len(seen["train"]), -1),
        wanted["train"].reshape(len(seen["train"]), -1),
    )
    inner, cross = x.T @ x / len(x), y.T @ x / len(x)
    inner += 0.2 * np.trace(inner) / len(inner) * np.eye(len(inner))
    rng = np.random.default_rng(0)
    left = whole = 0.0
    width = seen["train"].shape[-1]
    for row, target in zip(seen["val"] / spread, wanted["val"], strict=True):
        visible, masked = np.split(rng.permutation(len(row)), [len(row) // 4])
        given = (visible[:, None] * width + np.arange(width)).ravel()
        asked = (masked[:, None] * width + np.arange(width)).ravel()
        guess = cross[np.ix_(asked, given)] @ np.linalg.solve(
            inner[np.ix_(given, given)], row[visible].ravel()
        )
        left += np.square(target[masked].ravel() - guess).sum()
        whole += np.square(target[masked]).sum()
    assert left <= 0.85 * whole


@pytest.mark.parametrize(
    ("draw", "least"), [(bodies.draw_bodies, 30), (heads.draw_heads, 0.03)], ids=["ct", "mri"]
)
def test_a_label_adds_a_lesion_and_nothing_else(draw, least: float) -> None:
    size = make.SIZE
    for case in range(4):
        without, with_lesion = (
            draw(np.full(4, label), stream(case, "lesion"), size.volume, size.spacing_mm).astype(float)
            for label in (0, 1)
        )
        changed = np.abs(with_lesion - without) > least
        share = changed.mean((1, 2, 3))
        assert (share > 0.001).all() and (share < 0.2).all()
        for sample in changed:  # in one place, well inside the field of view
            spread = np.array([places.std() for places in np.nonzero(sample)])
            assert (spread * size.spacing_mm < 25).all()


def one_study(**changes) -> Study:
    study = Study(
        label="opacity",
        group=0,
        findings=(),
        heart=0.0,
        volume=0.0,
        aorta=0.0,
        spine=0.0,
        reader=0,
        earlier=None,
    )
    return Study(**{**vars(study), **changes})


@pytest.mark.parametrize("kind", ["consolidation", "nodule", "effusion"])
def test_a_finding_is_in_the_film_and_on_its_side(monkeypatch: pytest.MonkeyPatch, kind) -> None:
    axis = ((np.arange(64) + 0.5) / 32 - 1).astype(np.float32)
    whole = np.broadcast_to(axis, (1, 64, 64)), np.broadcast_to(axis[:, None], (1, 64, 64))
    monkeypatch.setattr(chests, "_pose", lambda *_: whole)
    for side in ("right", "left"):
        for zone in ("lower",) if kind == "effusion" else ("upper", "mid", "lower"):
            finding = Finding(kind=kind, side=side, zone=zone, size=0.8)
            film, clear = (
                chests.draw_chests([one_study(findings=shown)], stream(5, kind, side, zone))[0].astype(int)
                for shown in ((finding,), ())
            )
            row, column = np.nonzero(film - clear > 20)
            assert len(row) > 20, "the finding is too faint"
            assert (column.mean() < 32) == (side == "right"), "the patient's right is on the image's left"
            assert abs(row.mean() / 32 - 1 - (0.4 if kind == "effusion" else chests.ZONE_Y[zone])) < 0.2


def test_tiles_differ_in_where_nuclei_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nuclei ring the white in glands, crowd in nests, and are spread out elsewhere; there are as many in each."""
    drawn = []
    draw_nuclei = tiles._nuclei
    monkeypatch.setattr(tiles, "_nuclei", lambda *given: drawn.append(draw_nuclei(*given)) or drawn[-1])
    labels = np.arange(180) % 3
    pictures = tiles.draw_tiles(labels, np.arange(180), stream(3, "tiles"))
    cover = drawn[0][0]
    white = (pictures.min(1) > 200) & (cover == 0)
    near = np.zeros(len(labels))
    for shift in np.ndindex(3, 3):  # the share of nuclei within 6 pixels of white
        offset = 6 * np.array(shift) - 6
        near += (np.roll(white, offset, (1, 2)) * cover).sum((1, 2)) / cover.sum((1, 2))
    crowded = cover.reshape(len(labels), 4, 16, 4, 16).mean((2, 4)).std((1, 2)) / cover.mean((1, 2))
    amount, ringing, crowding = (
        dict(zip(tiles.CLASSES, (part[labels == label].mean() for label in range(3)), strict=True))
        for part in (cover.mean((1, 2)), near, crowded)
    )
    assert max(amount.values()) < 1.15 * min(amount.values())
    assert ringing["glandular"] > 1.2 * ringing["diffuse"]
    assert crowding["nested"] > 1.2 * crowding["diffuse"]


KEYWORDS = {
    "effusion": ("effusion", "pleural fluid", "layering fluid"),
    "nodule": ("nodule", "nodular", "rounded opacity"),
    "consolidation": (
        "airspace opacity",
        "consolidation",
        "infiltrate",
        "opacification",
        "hazy",
        "pneumonia",
        "infection",
    ),
}


def test_reports_say_what_the_films_show() -> None:
    """Every finding is named with its side, and nothing else is but to be denied."""
    studies = draw_studies(make.SEED, "train", 60, make.VISITS)
    texts = [str(sample.array) for sample in make.draw_reports("train", 60)]
    for study, text in zip(studies, texts, strict=True):
        sentences = [
            part.strip() for part in text.replace("impression:", ".").replace("findings:", ".").split(".")
        ]
        denied = ("no ", "without", "there is no", "negative", "clear")
        told = [sentence for sentence in sentences if not any(word in sentence for word in denied)]
        for kind, words in KEYWORDS.items():
            about = [sentence for sentence in told if any(word in sentence for word in words)]
            shown = [finding for finding in study.findings if finding.kind == kind]
            sides = {side for sentence in about for side in ("left", "right") if side in sentence}
            assert sides == {finding.side for finding in shown}, text
            assert len(about) >= 2 * len(shown), text  # among the findings and in the impression
        assert ("cardiomegaly" in text or "enlarged heart" in text) == (study.heart > 0.18)


def test_reports_are_whole_and_need_their_context() -> None:
    written = {
        split: [str(sample.array) for sample in make.draw_reports(split, groups)]
        for split, groups in make.GROUPS.items()
    }
    tokenizer = train_tokenizer(written["train"], make.SIZE.vocab)
    ids = [tokenizer.encode(text).ids for texts in written.values() for text in texts]
    assert max(map(len, ids)) <= make.SIZE.text, "a report is cut off"
    assert len({word for text in written["train"] for word in text.split()}) > 250
    singles = np.bincount(np.concatenate(ids), minlength=make.SIZE.vocab)
    pairs = np.zeros((make.SIZE.vocab, make.SIZE.vocab))
    for text in ids:
        np.add.at(pairs, (text[:-1], text[1:]), 1)
    assert entropy(singles) > 4
    assert entropy(pairs) - entropy(singles) < 0.4 * entropy(singles)  # of a word, given the one before


def entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


@pytest.mark.parametrize("name", MODALITIES)
def test_splits_hold_whole_groups_and_balanced_classes(shards: Path, name: str) -> None:
    seen: dict[str, set[bytes]] = {}
    for split, groups in GROUPS.items():
        part = ShardSet(shards / name, split)
        assert len(part) == groups * make.VISITS
        hashed, counts = np.unique(part.index["group"], return_counts=True)
        assert len(hashed) == groups and (counts == make.VISITS).all()
        seen[split] = set(hashed.tolist())
        shares = np.bincount(part.labels, minlength=len(part.manifest.classes)) / len(part)
        assert 2 <= len(shares) <= 3 and shares.min() >= 0.9 / len(shares)
    assert not seen["train"] & seen["val"]


def test_reports_and_films_are_of_the_same_patients(shards: Path) -> None:
    for split in GROUPS:
        films, texts = (ShardSet(shards / name, split) for name in ("xray", "report"))
        for column in ("key", "group", "label"):
            assert (films.index[column] == texts.index[column]).all()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for order, names in (("forth", list(MODALITIES)), ("back", list(MODALITIES)[::-1])):
        for name in names:
            make.make_set(name, tmp_path / order / name, TINY)
    for path in sorted((tmp_path / "forth").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "back" / path.relative_to(tmp_path / "forth")).read_bytes(), (
            path
        )
    for name in MODALITIES:
        make.make_set(name, tmp_path / "other" / name, TINY, seed=1)
        texts = [
            (tmp_path / seed / name / "train" / "000000.tar").read_bytes() for seed in ("forth", "other")
        ]
        assert texts[0] != texts[1]


def test_the_full_set_stays_small(shards: Path) -> None:
    written = sum(path.stat().st_size for path in shards.rglob("*.tar"))
    full = written * sum(make.GROUPS.values()) / sum(GROUPS.values())
    assert full < 100e6
    assert (
        900 <= make.GROUPS["train"] * make.VISITS <= 1100 and 180 <= make.GROUPS["val"] * make.VISITS <= 220
    )


def test_the_recipe_says_synthetic(shards: Path) -> None:
    for name in MODALITIES:
        manifest = ShardSet(shards / name, "val").manifest
        assert f"synthetic, generator version {make.VERSION}" in manifest.recipe["source"]
        assert manifest.preset == "sample"


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty"):
        make.make_sample_shards(tmp_path / "mine")
    assert run_command(make.main, ["--out", str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_broken_generator_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise MemoryError("out of memory")

    monkeypatch.setitem(make.GENERATORS, "xray", (fail, ("a",), "broken"))
    with pytest.raises(MemoryError):
        make.make_set("xray", tmp_path / "xray", TINY)
    assert not list(tmp_path.iterdir())
