"""MIMIC-CXR: the radiologists' reports, as mimic-cxr-reports.zip from PhysioNet unpacks.

    files/p10/p10000032/s50414267.txt   one report a study
    mimic-cxr-2.0.0-split.csv.gz        from MIMIC-CXR-JPG, put beside files/ by the user: which studies train
    mimic-cxr-2.0.0-metadata.csv.gz     the same: dicom_id, study_id, ViewPosition, ...

Layout and columns are those of physionet.org/content/mimic-cxr and .../mimic-cxr-jpg. The selection is the paper's,
by way of MGCA (HKU-MedAI/MGCA, preprocess/mimic_cxr.py): studies with a PA or AP film, impression and findings, three
words at least. One text a study, where MGCA has one a film. Without the tables every study is taken.
"""

from pathlib import Path

from mnemos.sharding.modalities import Modality
from mnemos.sharding.sources import texts
from mnemos.sharding.sources.mimic_cxr_jpg import SPLIT_COLUMNS, SPLITS, TABLES, TEST
from mnemos.sharding.sources.published import check_root, optional_table, rows
from mnemos.sharding.sources.report_sections import findings_and_impression, num_words, report_text
from mnemos.sharding.sources.source import FindOptions, Source
from mnemos.sharding.sources.units import Unit, relative_name

FRONTAL = ("PA", "AP")
LEAST_WORDS = 3
MOST_BYTES = 1 << 20  # the longest report has some thousand
_REPORTS = "files/p1[0-9]/p*/s*.txt"


def find_reports(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every report, its text cut and cleaned; the group is the patient.

    Raises:
        UserError: not the folder that holds files/, or a table that is not as published.
    """
    check_root(source, (_REPORTS,), SOURCE.name, "files/p10/p10000032/s50414267.txt")
    split_table = optional_table(source, f"{TABLES}split", SPLIT_COLUMNS)
    metadata = optional_table(source, f"{TABLES}metadata", ("study_id", "ViewPosition"))
    splits = (
        {study: split for study, split in rows(split_table, ("study_id", "split"))} if split_table else None
    )
    frontal: set[str] | None = None
    if metadata:
        views = rows(metadata, ("study_id", "ViewPosition"))
        frontal = {study for study, view in views if view in FRONTAL}
    units = []
    for path in source.glob(_REPORTS):
        study, split = path.stem.removeprefix("s"), ""
        left_out = "study without a PA or AP film" if frontal is not None and study not in frontal else ""
        if splits is not None and not left_out:
            split = SPLITS.get(splits.get(study, ""), "")
            left_out = TEST if splits.get(study) == "test" else "" if split else "study in no published split"
        units.append(_unit(path, relative_name(path, source), split, left_out))
    return units


def _unit(path: Path, name: str, split: str, left_out: str) -> Unit:
    text, broken = "", ""
    if not left_out:
        try:
            with path.open("rb") as file:
                content = file.read(MOST_BYTES + 1)
        except OSError as error:
            content, broken = b"", f"it cannot be read ({error.strerror})"
        if len(content) > MOST_BYTES:
            content, broken = b"", f"it is longer than {MOST_BYTES >> 20} MB, which no report is"
        findings, impression = findings_and_impression(content.decode("utf-8", errors="replace"))
        text = report_text(findings, impression)
        if not broken and not (findings or impression):
            left_out = "report with neither findings nor impression"
        elif not broken and num_words(text) < LEAST_WORDS:
            left_out = f"report of fewer than {LEAST_WORDS} words"
    if broken or left_out:
        return Unit(name=name, reader="text", files=(path,), broken=broken, left_out=left_out)
    return Unit(name=name, reader="text", files=(path,), text=text, group=path.parent.name, split=split)


SOURCE = Source(
    name="mimic-cxr-reports",
    about="MIMIC-CXR, reports as published",
    kinds=("text",),
    find=find_reports,
    readers={"text": texts.read_unit},
)
