"""PubMed RCT: sentences of abstracts by their role, as published at github.com/Franck-Dernoncourt/pubmed-rct.

    PubMed_20k_RCT/train.txt, dev.txt, test.txt    (PubMed_200k_RCT and ..._numbers_replaced_with_at_sign alike)

    ###24293578
    OBJECTIVE<tab>To investigate the efficacy of 6 weeks of daily low-dose oral prednisolone ...
    METHODS<tab>A total of 125 patients with primary knee OA were randomized ...
    (an empty line ends an abstract)

Format: Dernoncourt and Lee, IJCNLP 2017. The abstracts were published by their authors, so that nothing is scrubbed.
"""

from collections.abc import Iterator
from pathlib import Path

from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import Modality
from mnemos.sharding.sources import texts
from mnemos.sharding.sources.published import check_root
from mnemos.sharding.sources.source import FindOptions, Source
from mnemos.sharding.sources.units import Unit

CLASSES = ("BACKGROUND", "CONCLUSIONS", "METHODS", "OBJECTIVE", "RESULTS")
SPLITS = {"train.txt": "train", "dev.txt": "val"}
TEST = "official test split, kept for testing"
_FILES = (*SPLITS, "test.txt")
_LINE_CHARACTERS = 1 << 20  # the longest sentence has some thousand
_ABSTRACT = "###"


def find_sentences(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every sentence; the group is its abstract, the label its role.

    train.txt trains, dev.txt validates, test.txt is left out.

    Raises:
        UserError: not a folder with the three files, or one of them is no UTF-8 text.
    """
    check_root(source, ("dev.txt", "test.txt"), SOURCE.name, ", ".join(_FILES))
    missing = [name for name in _FILES if not (source / name).is_file()]
    if missing:
        packed = next((path.name for path in sorted(source.glob("train.*")) if path.name != "train.txt"), "")
        advice = f"unpack {packed} there" if packed and "train.txt" in missing else "complete the download"
        raise UserError(
            f"{source} lacks {' and '.join(missing)}; {SOURCE.name} needs {', '.join(_FILES)}: {advice}"
        )
    return [unit for name in _FILES for unit in _sentences(source / name)]


def _sentences(file: Path) -> Iterator[Unit]:
    abstract, left_out = "", "" if file.name in SPLITS else TEST
    for number, line in enumerate(_lines(file), start=1):
        if line.startswith(_ABSTRACT):
            abstract = line.removeprefix(_ABSTRACT).strip()
        elif line.strip():
            name = f"{file.name}:{number}"
            if left_out:
                yield Unit(name=name, reader="text", files=(file,), left_out=left_out)
                continue
            role, _, sentence = line.partition("\t")
            broken = ""
            if role not in CLASSES or not abstract:
                broken = f"the line is no sentence of an abstract: {_ABSTRACT}number, then CLASS<tab>sentence is read"
            yield Unit(
                name=name,
                reader="text",
                files=(file,),
                text="" if broken else texts.clean_text(sentence),
                label="" if broken else role,
                group=abstract,
                split=SPLITS[file.name],
                broken=broken,
            )


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as text:
            while line := text.readline(_LINE_CHARACTERS):
                yield line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}); download it again") from error


SOURCE = Source(
    name="pubmed-rct",
    about="PubMed RCT, sentences of abstracts",
    kinds=("text",),
    find=find_sentences,
    readers={"text": texts.read_unit},
    public=True,
)
