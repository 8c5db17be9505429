"""From a sample to the bytes that are stored of it, in whatever process: only writing them is one process's work."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mnemos.sharding.codecs import encode_ids, encode_image, encode_volume
from mnemos.sharding.errors import DataError
from mnemos.sharding.modalities import Modality
from mnemos.sharding.sample import Sample

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_DIGEST_BYTES = 16  # two of a billion samples share one by chance with a probability of 1e-21


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as it is stored.

    Attributes:
        source, group, label, scale, shift: as in ``Sample``.
        payload: the encoded array or token ids.
        text: the text itself; "" for images and volumes.
        digest: 16 bytes, the same for samples of the same content: the text's, or else the payload's.
    """

    source: str
    group: str
    label: str
    scale: float
    shift: float
    payload: bytes
    text: str
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes the samples of one set; travels to other processes.

    Attributes:
        modality: its ``kind`` and ``channels`` decide.
        payload: the set's payload kind.
        shape: stored size, as in the manifest.
        tokenizer_file: of texts.
    """

    modality: Modality
    payload: str
    shape: tuple[int, ...]
    tokenizer_file: Path | None = None

    def encode(self, sample: Sample) -> Encoded:
        """Encode one sample; ids of a text beyond the stored size are cut.

        Raises:
            DataError: it cannot be stored: wrong size or type, or an empty text.
        """
        array, text = sample.array, ""
        try:
            if isinstance(array, str):
                text = array
                payload = encode_ids(np.array(self._ids(array)))
            else:
                payload = self._encode_array(array)
        except ValueError as error:
            raise DataError(str(error), source=sample.source) from error
        content = text.encode("utf-8", "surrogatepass") if text else payload
        return Encoded(
            source=sample.source,
            group=sample.group,
            label=sample.label,
            scale=sample.scale,
            shift=sample.shift,
            payload=payload,
            text=text,
            digest=hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest(),
        )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids[: self.shape[0]]
        if not ids:
            raise ValueError("the text is empty")
        return ids

    def _encode_array(self, array: np.ndarray) -> bytes:
        image = self.modality.kind == "image"
        shape = (self.modality.channels, *self.shape) if image else self.shape
        if array.shape != shape:
            raise ValueError(f"a sample of shape {array.shape} in a set of {shape}")
        return encode_image(array, self.payload) if image else encode_volume(array)

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from mnemos.sharding.tokenizer import load_tokenizer

        if self.tokenizer_file is None:
            raise ValueError(f"a text in a set of {self.modality.kind}s")
        return load_tokenizer(self.tokenizer_file)
