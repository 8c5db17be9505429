"""NCT-CRC-HE: patches of stained bowel tissue in nine classes, as published on Zenodo (record 1214456).

    NCT-CRC-HE-100K/ADI/ADI-AAAFLCLY.tif           100,000 patches of 86 slides, colours normalised
    NCT-CRC-HE-100K-NONORM/ADI/ADI-AAAFLCLY.tif    the same patches, not normalised
    CRC-VAL-HE-7K/ADI/ADI-TCGA-AAICEQFN.tif        7,180 patches of 50 other patients

Each is a TIFF of 224x224 pixels. Folders and counts are those of zenodo.org/records/1214456. The patients of single
patches were not published.
"""

from pathlib import Path

from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import Modality
from mnemos.sharding.sources import images
from mnemos.sharding.sources.published import check_root
from mnemos.sharding.sources.source import FindOptions, Source
from mnemos.sharding.sources.units import Unit, relative_name

CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
TRAIN = ("NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM")
VALIDATE = "CRC-VAL-HE-7K"


def find_patches(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every patch; its class is its folder's name.

    With both parts there the first trains and CRC-VAL-HE-7K validates: other patients. With one alone the split is
    by patch, which is not independent.

    Raises:
        UserError: not the folder that holds the parts, both forms of the first one, or a folder of no known class.
    """
    check_root(source, (*TRAIN, VALIDATE), SOURCE.name, f"{TRAIN[0]}/ADI/*.tif and {VALIDATE}/ADI/*.tif")
    parts = [name for name in (*TRAIN, VALIDATE) if (source / name).is_dir()]
    if len(set(parts) & set(TRAIN)) > 1:
        raise UserError(
            f"{source} holds {TRAIN[0]} and {TRAIN[1]}; they are the same patches: move one of them elsewhere"
        )
    splits = {part: "val" if part == VALIDATE else "train" for part in parts} if len(parts) > 1 else {}
    units = []
    for part in parts:
        for folder in sorted(path for path in (source / part).iterdir() if path.is_dir()):
            if folder.name not in CLASSES:
                raise UserError(
                    f"{folder} is none of the classes {', '.join(CLASSES)}; unpack the data set afresh or move it away"
                )
            units += [
                Unit(
                    name=relative_name(path, source),
                    reader="image",
                    files=(path,),
                    label=folder.name,
                    split=splits.get(part, ""),
                )
                for path in folder.glob("*.tif")
            ]
    return units


SOURCE = Source(
    name="nct-crc-he",
    about="NCT-CRC-HE-100K and CRC-VAL-HE-7K, patches of bowel tissue",
    kinds=("image",),
    fits=lambda modality: modality.channels == 3,
    find=find_patches,
    readers={"image": images.read_unit},
)
