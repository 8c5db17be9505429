"""Small shard sets of noise for any preset, one of every kind: enough to train on, and made in seconds."""

import string
from pathlib import Path

import numpy as np

from mnemos.sharding.modalities import DEFAULT_ORDER, MODALITIES, STORED_SIZES
from mnemos.sharding.sample import Sample
from mnemos.sharding.tokenizer import MIN_FREQUENCY, train_tokenizer
from mnemos.sharding.writer import ShardSetWriter

SAMPLES = {"train": 32, "val": 2}  # a batch that needs more goes round again
FILL = 0.67  # of the positions of a text, on average: what reports have
LETTERS = 6  # of a word

# the first modality of every kind: what a model that reads all kinds needs
OF_KIND = {MODALITIES[name].kind: name for name in reversed(DEFAULT_ORDER)}


def make_sets(folder: Path, preset: str, seed: int = 0) -> Path:
    """Write a set of the first modality of every kind below a folder, at a preset's sizes; return the folder.

    Texts are made of random letters, so many that the vocabulary is as large as the preset allows.
    """
    folder.mkdir(parents=True)
    size, rng = STORED_SIZES[preset], np.random.default_rng(seed)
    letters = rng.choice(list(string.ascii_lowercase), (size.vocab, LETTERS))
    words = sorted({"".join(word) for word in letters})
    tokenizer = train_tokenizer([" ".join(words)] * MIN_FREQUENCY, size.vocab)
    tokenizer_file = folder / ".tokenizer.json"  # hidden: it is copied into the set of texts
    tokenizer.save(str(tokenizer_file))
    tokens = np.array([len(one.ids) for one in tokenizer.encode_batch(words)])
    for name in OF_KIND.values():
        modality = MODALITIES[name]
        with ShardSetWriter(
            folder / name,
            modality=modality,
            source="synthetic",
            shape={"text": (size.text,), "image": size.image, "volume": size.volume}[modality.kind],
            spacing_mm=size.spacing_mm if modality.kind == "volume" else None,
            preset=preset,
            classes=(),
            recipe={"drawn": "noise, see bench/step_profile_data.py"},
            key=b"bench",
            tokenizer_file=tokenizer_file if modality.kind == "text" else None,
        ) as writer:
            for split, number in SAMPLES.items():
                for place in range(number):
                    if modality.kind == "text":
                        drawn: np.ndarray | str = _text(words, tokens, size.text, rng)
                    elif modality.kind == "image":
                        drawn = rng.integers(0, 256, (modality.channels, *size.image), dtype=np.uint8)
                    else:
                        drawn = rng.integers(-1024, 1025, size.volume, dtype=np.int16)
                    scale = {"text": 1.0, "image": 1 / 255, "volume": 1 / 1024}[modality.kind]
                    writer.add(split, Sample(array=drawn, source=f"{split} {place}", scale=scale))
    return folder


def _text(words: list[str], tokens: np.ndarray, most: int, rng: np.random.Generator) -> str:
    """Return words of at most `most` tokens together, of `FILL * most` on average."""
    length = rng.integers(round((2 * FILL - 1) * most), most, endpoint=True)
    chosen = rng.integers(len(words), size=most)
    count = max(1, int(np.searchsorted(tokens[chosen].cumsum(), length, side="right")))
    return " ".join(words[place] for place in chosen[:count])
