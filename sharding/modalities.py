"""The modalities: the one place where they are named.

A shard set's manifest carries the whole record, so that training reads dimensions, channels, sizes and value
scales from the data and asks for a name only to order the stages. Appending a modality is one entry here.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "image", "volume"]


@dataclass(frozen=True, kw_only=True)
class Modality:
    """What is fixed about one modality, whatever its source.

    Attributes:
        name: as users type it.
        title: as reports and plots print it.
        kind: text (1D), image (2D) or volume (3D).
        channels: 1 grey, 3 RGB; 0 for text.
        values: how stored values become model values. "unit": uint8 / 255. "hounsfield": int16 HU / 1024,
            clipped to +-1024. "zscore": int16, clipped to the 0.2 and 99.8 percentiles, scale and shift kept
            per sample.
        augment: what the pretext task does to a training sample on the device. "crop": random resized crop
            and horizontal flip; "mirror": each axis with probability one half, in half of the samples;
            "none".
    """

    name: str
    title: str
    kind: Kind
    channels: int
    values: Literal["tokens", "unit", "hounsfield", "zscore"]
    augment: Literal["none", "crop", "mirror"]


MODALITIES = {
    modality.name: modality
    for modality in (
        Modality(name="report", title="Reports", kind="text", channels=0, values="tokens", augment="none"),
        Modality(name="xray", title="X-ray", kind="image", channels=1, values="unit", augment="crop"),
        Modality(name="ct", title="CT", kind="volume", channels=1, values="hounsfield", augment="mirror"),
        Modality(name="mri", title="MRI", kind="volume", channels=1, values="zscore", augment="mirror"),
        Modality(
            name="pathology", title="Pathology", kind="image", channels=3, values="unit", augment="crop"
        ),
    )
}
DEFAULT_ORDER = tuple(MODALITIES)  # the paper's order of stages: Ye et al., CVPR 2024


@dataclass(frozen=True, kw_only=True)
class StoredSize:
    """Sizes of stored samples under one preset.

    Attributes:
        image: (Y, X) pixels.
        volume: (Z, Y, X) voxels.
        spacing_mm: (Z, Y, X) millimetres a voxel.
        stride: sub-volume stride along Z in voxels, by modality.
        text: most token ids of a text.
        vocab: most entries of a byte-pair vocabulary trained on the texts.
    """

    image: tuple[int, int]
    volume: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    stride: dict[str, int]
    text: int
    vocab: int


_PAPER = StoredSize(
    image=(224, 224),
    volume=(16, 192, 192),
    spacing_mm=(1.0, 1.0, 1.0),
    stride={"ct": 12, "mri": 8},
    text=112,
    vocab=30_000,
)
STORED_SIZES = {
    "sample": StoredSize(
        image=(64, 64),
        volume=(8, 64, 64),
        spacing_mm=(4.0, 3.0, 3.0),
        stride={"ct": 4, "mri": 4},
        text=64,
        vocab=1_024,
    ),
    "base": _PAPER,
    "large": _PAPER,
    "huge": _PAPER,
    "giant": _PAPER,
    "official": _PAPER,
}

DICOM_TYPES = {  # what a DICOM file's Modality field may say; a modality not named here takes any
    "xray": ("CR", "DX", "RG", "PX", "OT"),
    "ct": ("CT",),
    "mri": ("MR",),
}
