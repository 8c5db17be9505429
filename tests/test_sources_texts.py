"""The published data sets of texts, through the build command; the sections of reports; what users get wrong."""

from pathlib import Path

import pytest
from lookalikes import SPLIT_OF_PATIENT, patient, study, write_mimic_reports, write_mimic_tables, write_rct
from sample_files import KEY, key_file

from mnemos.sharding import build
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.sources.registry import sources
from mnemos.sharding.sources.report_sections import findings_and_impression, report_text, section_kind

NEW_STYLE = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___ year old woman with cough  // pneumonia?
 
 TECHNIQUE:  Chest PA and lateral
 
 COMPARISON:  ___
 
 FINDINGS: 
 
 The cardiac silhouette is large, 16.5 cm.  There is a tube
 that ends 4.1 cm above the carina.
 
 No effusion, compared with ___, is seen.
 
 IMPRESSION: 
 
 1.  No pneumonia.
 2.  Large heart.
"""
OLD_STYLE = """                                 FINAL REPORT
 CHEST, TWO VIEWS:  ___
 
 HISTORY:  Fever.
 
 PA AND LATERAL VIEWS OF THE CHEST:  Lungs are clear.  The heart is of
 normal size.
"""
WET_READ = """ WET READ: ___ ___ ___ 9:34 PM
  IMPRESSION: Perhaps a pneumothorax.
  WET READ VERSION #1 
 ______________________________________________________________________________
                                 FINAL REPORT
 REASON FOR EXAM:  ___-year-old man, chest tube.
 
 FINDINGS:  AP view: the tube has been withdrawn.
 
 CONCLUSION:  No pneumothorax.
"""
ADDENDUM = """ ADDENDUM  The wording was changed.
 ______________________________________________________________________________
                                 FINAL REPORT
 FINDINGS: 
 
 FINDINGS:  The lungs are low.
 
 IMPRESION:  Low lung volumes.
 
 RECOMMENDATION(S):  None.
 
 NOTIFICATION:  Told to Dr. ___ by telephone.
"""
NO_SECTION = """                                 FINAL REPORT
 HISTORY:  Cough, to rule out pneumonia.
 
 COMPARISON:  There are no prior films.
 
 As compared to the last film, nothing has changed.
"""
SECTIONS = {
    "new style": (
        NEW_STYLE,
        (
            "No pneumonia. Large heart. The cardiac silhouette is large, 16.5 cm. There is a tube that ends 4.1 cm "
            "above the carina. No effusion, compared with ___, is seen."
        ),
    ),
    "old style": (OLD_STYLE, "Lungs are clear. The heart is of normal size."),
    "wet read": (WET_READ, "No pneumothorax. AP view: the tube has been withdrawn."),
    "wet read alone has an impression": (
        WET_READ.split(" CONCLUSION")[0],
        "AP view: the tube has been withdrawn.",
    ),
    "addendum": (ADDENDUM, "Low lung volumes. The lungs are low."),
    "no section": (NO_SECTION, ""),
    "nothing": ("", ""),
    "windows": (" IMPRESSION:  Clear\r\n lungs.\r\n", "Clear lungs."),
    "no FINAL REPORT": ("FINDINGS: Clear lungs.", "Clear lungs."),
    "a colon in a sentence": (" FINDINGS:  Two things: DEVICES: none, and\n AP: rotated.", None),
    "several marks": (" FINDINGS:  Told Dr. ___ ___ on ___.", "Told Dr. ___ on ___."),
    "a line across": (" FINDINGS:  Clear.\n ____________\n Told ___.", "Clear. Told ___."),
    "not UTF-8": (" IMPRESSION:  A \ufffd\ufffd mild oedema .", "A mild oedema."),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_sections_of_a_report(case):
    report, expected = SECTIONS[case]
    findings, impression = findings_and_impression(report)
    text = report_text(findings, impression)
    if expected is None:
        assert text.startswith("Two things: DEVICES: none") and not impression
    else:
        assert text == expected


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("FINDINGS", "findings"),
        ("IMPRESSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("IMPERSSION", "impression"),
        ("IMOPRESSION", "impression"),
        ("FINIDNGS", "findings"),
        ("FINDING", "findings"),
        ("CONCLUSION", "impression"),
        ("CHEST, SINGLE AP VIEW", "findings"),
        ("PORTABLE UPRIGHT RADIOGRAPH", "findings"),
        ("EXAMINATION", "other"),
        ("REASON FOR EXAMINATION", "other"),
        ("COMPARISON CHEST RADIOGRAPH", "other"),
        ("INDICATION", "other"),
        ("CLINICAL INFORMATION", "other"),
        ("WET READ", "other"),
        ("DR", "other"),
    ],
)
def test_headings(heading, kind):
    assert section_kind(heading) == kind


AS_THEY_ARE = ("--scrubber", "none", "--rare-words", "0")  # in so few texts every word is rare


def run(tmp_path: Path, source: str, root: Path, *flags: str) -> int:
    """Build with the tests' key and return the exit code."""
    given = ["report", str(root), "--out", str(tmp_path / "set"), "--key-file", key_file(tmp_path)]
    return build.main([*given, "--source", source, *flags])


def stored(directory: Path) -> dict[str, tuple[str, str, str, str]]:
    """Return (split, class, hashed group, text) of every stored sample by its hashed key."""
    found = {}
    for split in ("train", "val"):
        shards = ShardSet(directory, split)
        for place, key in enumerate(shards.index["key"].tolist()):
            label = int(shards.labels[place])
            name = shards.manifest.classes[label] if label >= 0 else ""
            found[key.decode()] = (split, name, shards.index["group"][place].decode(), shards.text(place))
    return found


def reports() -> dict[tuple[int, int], str]:
    """Return a text for every study of the look-alike, one without sections and one of two words."""
    texts = {
        (number, place): NEW_STYLE.replace("cough", f"cough {number}").replace(
            "Large heart", f"Case {number}{place}"
        )
        for number in SPLIT_OF_PATIENT
        for place in range(2)
    }
    return texts | {(12, 0): NO_SECTION, (13, 0): " IMPRESSION:  Unchanged ___ ___ film.\n"}


def test_mimic_cxr_reports_with_the_tables_of_the_films(tmp_path):
    root = write_mimic_reports(tmp_path / "mimic-cxr-reports", reports())
    write_mimic_tables(root, packed=True)
    assert run(tmp_path, "mimic-cxr-reports", root, *AS_THEY_ARE) == 0
    found = stored(tmp_path / "set")
    assert load_manifest(tmp_path / "set").skipped == {
        "study without a PA or AP film": 6,
        "official test split, kept for testing": 1,
        "report with neither findings nor impression": 1,
        "report of fewer than 3 words": 1,
    }
    assert len(found) == 3, "one text a study"
    for number in (10, 11, 14):
        key = hashed_name(KEY, f"files/p{number}/p{patient(number)}/s{study(number, 0)}.txt")
        split, label, group, text = found[key]
        assert (split, label) == ("val" if number == 14 else "train", "")
        assert group == hashed_name(KEY, f"p{patient(number)}"), "the group of the same patient's films"
        assert text.startswith(f"No pneumonia. Case {number}0. The cardiac") and "year old" not in text


def test_mimic_cxr_reports_without_tables_are_split_by_patient(tmp_path):
    root = write_mimic_reports(tmp_path / "mimic-cxr-reports", reports())
    assert run(tmp_path, "mimic-cxr-reports", root, "--val-fraction", "0.3", *AS_THEY_ARE) == 0
    found = stored(tmp_path / "set")
    assert len(found) == 10
    groups = {
        split: {group for side, _, group, _ in found.values() if side == split} for split in ("train", "val")
    }
    assert not groups["train"] & groups["val"] and len(groups["val"]) == 2


def test_a_report_too_long_to_be_one_is_broken(tmp_path, capsys):
    root = write_mimic_reports(tmp_path / "r", {key: text * 4 for key, text in reports().items()})
    long = next(root.glob("files/p10/*/*.txt"))
    long.write_text(" FINDINGS: clear lungs" * 60_000)
    assert run(tmp_path, "mimic-cxr-reports", root, "--val-fraction", "0") == 0
    assert f"{long.name}: it is longer than 1 MB" in capsys.readouterr().out


def test_pubmed_rct(tmp_path):
    root = write_rct(tmp_path / "pubmed-rct" / "PubMed_20k_RCT")
    assert run(tmp_path, "pubmed-rct", root) == 0
    found = stored(tmp_path / "set")
    manifest = load_manifest(tmp_path / "set")
    assert manifest.classes == ("BACKGROUND", "CONCLUSIONS", "METHODS", "OBJECTIVE", "RESULTS")
    assert manifest.skipped == {"official test split, kept for testing": 10}
    assert len(found) == 30
    line = {"train": 1, "val": 1}
    for number in range(24293578, 24293584):
        split = "train" if number < 24293582 else "val"
        file = "train.txt" if split == "train" else "dev.txt"
        for role in ("BACKGROUND", "OBJECTIVE", "METHODS", "RESULTS", "CONCLUSIONS"):
            line[split] += 1
            assert found[hashed_name(KEY, f"{file}:{line[split]}")] == (
                split,
                role,
                hashed_name(KEY, str(number)),
                f"Abstract {number} says of its {role.lower()} that p < 0.05 .",
            )
        line[split] += 2  # the empty line and the next abstract's number


def test_a_line_that_is_no_sentence_is_broken_and_named(tmp_path, capsys):
    root = write_rct(tmp_path / "rct")
    lines = (root / "train.txt").read_text().splitlines()
    lines[2] = lines[2].replace("\t", " ")
    (root / "train.txt").write_text("\n".join(lines))
    assert run(tmp_path, "pubmed-rct", root) == 0
    assert "train.txt:3: the line is no sentence of an abstract" in capsys.readouterr().out


def test_only_published_texts_need_no_scrubbing():
    assert [name for name, source in sources().items() if source.public] == ["pubmed-rct"]


def rct(folder: Path) -> Path:
    return write_rct(folder / "data")


def without_train(root: Path) -> Path:
    (root / "train.txt").rename(root / "train.7z")
    return root


def latin(root: Path) -> Path:
    (root / "dev.txt").write_bytes("###1\nMETHODS\tDüsseldorf\n".encode("latin-1"))
    return root


def spoilt_table(root: Path) -> Path:
    write_mimic_tables(root, packed=False)
    (root / "mimic-cxr-2.0.0-metadata.csv").write_text("dicom_id,study_id\n1,2\n")
    return root


MISTAKES = {
    "the repository": (
        "pubmed-rct",
        rct,
        lambda root: root.parent,
        ["train.txt, dev.txt, test.txt", "give {root}"],
    ),
    "train.txt still packed": ("pubmed-rct", rct, without_train, ["lacks train.txt", "unpack train.7z"]),
    "no UTF-8": ("pubmed-rct", rct, latin, ["dev.txt", "UTF-8"]),
    "a level too deep": (
        "mimic-cxr-reports",
        lambda folder: write_mimic_reports(folder / "data", reports()),
        lambda root: root / "files",
        ["p10/", "files/p10/p10000032/s50414267.txt", "give {root}"],
    ),
    "the archive": (
        "mimic-cxr-reports",
        lambda folder: folder,
        lambda root: (root / "mimic-cxr-reports.zip").write_bytes(b"PK") and root,
        ["mimic-cxr-reports.zip", "unpacked into"],
    ),
    "a table without the column": (
        "mimic-cxr-reports",
        lambda folder: write_mimic_reports(folder / "data", reports()),
        spoilt_table,
        ["metadata.csv", "not ViewPosition"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_that_says_what_was_expected(tmp_path, capsys, case):
    source, write, spoil, expected = MISTAKES[case]
    root = write(tmp_path)
    assert run(tmp_path, source, spoil(root)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    for words in expected:
        assert words.format(root=root) in printed.err, printed.err
    assert not (tmp_path / "set").exists()
