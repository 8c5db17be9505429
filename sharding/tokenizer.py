"""The byte-pair tokenizer of the reports: trained on them, stored beside them, the same for every reader.

Byte-level (no unknown characters) over lower-cased text: hospitals differ in what they shout, and one word
should not have three ids.
"""

import string
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mnemos.sharding.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, MASK, UNK = 0, 1, 2
SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[UNK]")  # in the order of the ids above
MIN_FREQUENCY = 5  # a merge seen less often could spell out one patient's name
_SPACE = "Ġ"  # how the byte-level alphabet writes the space before a word


def train_tokenizer(texts: Iterable[str], vocab: int) -> "Tokenizer":
    """Train a byte-level BPE tokenizer.

    Args:
        texts: of the training split alone, and scrubbed (`scrubbing.scrub_texts`): what the vocabulary learns by
            heart travels with every encoder.
        vocab: most entries; fewer where the texts hold fewer frequent pieces. At least 259 (bytes +
            specials), at most 65,536 (ids are stored as uint16).

    Returns:
        A Hugging Face tokenizer whose ids 0, 1, 2 are PAD, MASK, UNK. The same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if not 256 + len(SPECIAL_TOKENS) <= vocab <= 65_536:
        raise ValueError(f"vocab is {vocab}; allowed: {256 + len(SPECIAL_TOKENS)} to 65536")
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path | str) -> "Tokenizer":
    """Read a stored tokenizer; UserError where the file is missing or is not one of ours."""
    from tokenizers import Tokenizer

    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"tokenizer {path} does not exist; it is written with the shards: build the set again"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer {path} is damaged ({error}); build the set again") from error
    ids = tuple(tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    if ids != (PAD, MASK, UNK):
        raise UserError(
            f"tokenizer {path} numbers {SPECIAL_TOKENS} as {ids}, not 0, 1, 2: it is not one of ours"
        )
    return tokenizer


def starts_word(tokenizer: "Tokenizer") -> np.ndarray:
    """Tell which tokens begin a word, for masking whole words.

    Returns:
        bool [V]: True for a token with a space before it, for punctuation (a unit of its own) and for the
        special tokens; False for a piece that carries a word on.
    """
    vocab = tokenizer.get_vocab()
    starts_V = np.zeros(max(vocab.values()) + 1, dtype=bool)
    for token, number in vocab.items():
        starts_V[number] = token in SPECIAL_TOKENS or token[0] == _SPACE or token[0] in string.punctuation
    return starts_V
