"""Random identifiers, planted wherever medical files hide them.

A canary is a word or number that occurs nowhere else. `plant_*` write small sound inputs of every format with canaries
in names, headers, tags, extensions and texts; `canary_search` says which of them are found in what was made of it.
"""

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import tifffile
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from sample_files import grey_film, head, write_csv, write_dicom, write_series

SCREENSHOT = "1.2.840.10008.5.1.4.1.1.7"
EXIF, USER_COMMENT, UNICODE = 0x8769, 0x9286, b"UNICODE\0"


class Canaries:
    """Canaries by the place they are planted in, from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.planted: dict[str, str] = {}

    def word(self, place: str) -> str:
        """Return a name of eleven letters that no language has."""
        return self.plant(self.letters(11).capitalize(), place)

    def number(self, place: str) -> str:
        """Return twelve digits."""
        return self.plant(self._digits(12), place)

    def uid(self, place: str) -> str:
        """Return a unique identifier as DICOM writes them."""
        return self.plant(f"1.2.826.0.1.3680043.{self._digits(9)}.{self._digits(9)}", place)

    def date(self, place: str, form: str = "{year}{month:02}{day:02}") -> str:
        """Return a day of long ago."""
        year, month, day = (int(self._random.integers(*ends)) for ends in ((1901, 1949), (1, 13), (1, 29)))
        return self.plant(form.format(year=year, month=month, day=day), place)

    def letters(self, count: int) -> str:
        """Return random consonants."""
        return "".join(self._random.choice(list("bcdfghjklmnpqrstvwxz"), count))

    def plant(self, canary: str, place: str) -> str:
        """Remember a canary and where it goes."""
        assert canary not in self.planted
        self.planted[canary] = place
        return canary

    def _digits(self, count: int) -> str:
        return "".join(self._random.choice(list("123456789"), count))


def plant_reports(folder: Path, canaries: Canaries) -> Path:
    """Write forty reports of twenty patients: canaries behind cues, and bare, many times in one patient's reports."""
    word, number = canaries.word, canaries.number
    told = [
        f"Patient: {word('patient in a report')}, {word('given name in a report')}. MRN: {number('MRN in a report')}.",
        f"DOB: {canaries.date('date in a report', '{month:02}/{day:02}/{year}')}. Accession number {number('accession in a report')}.",
        f"Dr. {word('physician in a report')} of {word('institution in a report')} Hospital was notified.",
        f"Study {canaries.uid('UID in a report')}, file {word('file in a report')}.dcm, call 555-{number('telephone')}.",
        f"Mail {word('mailbox in a report')}@{word('host in a report')}.example. {word('lower case').lower()} was seen.",
        f"Electronically signed by {word('signature in a report')} of {word('town in a report')}.",
        f"Compared with the study of Frau {word('bare name in a report')} {word('second bare name')} again.",
        f"Known [**Last name {word('MIMIC mark in a report')}**] of {word('NAME IN CAPITALS').upper()}.",
    ]
    parts = [
        "The heart is normal in size.",
        "There is no effusion.",
        "The lungs are clear.",
        "No pneumothorax.",
    ]
    rows = []
    for row in range(40):
        chosen = [parts[place] for place in range(4) if row % 16 >> place & 1] or parts
        # Ten times over in the two reports of a patient: enough for a tokenizer to learn it by heart.
        extra = [
            *told[row // 2 : row // 2 + 1] * 5,
            f"View {row} of the chest. Study of the heart, again seen.",
        ]
        extra += ["Compared with the known file was notified. Call of mail."]
        rows.append((" ".join([*chosen, *extra]), ("healthy", "ill")[row % 2], f"{row // 2}", "", ""))
    groups = [word(f"patient {number} of a table") for number in range(20)]
    other = [
        (word(f"physician's column, row {row}"), number(f"column of numbers, row {row}")) for row in range(2)
    ]
    rows = [(*row[:2], groups[int(row[2])], *other[place % 2]) for place, row in enumerate(rows)]
    folder = folder / word("folder of reports")
    folder.mkdir(parents=True)
    columns = ["text", "label", "group", "physician", "mrn"]
    write_csv(folder / f"{word('table of reports')}.csv", columns, rows)
    return folder


def plant_films(folder: Path, canaries: Canaries) -> Path:
    """Write JPEG, PNG, TIFF and DICOM films with every kind of comment, two of them screenshots."""
    word = canaries.word
    folder = folder / word("folder of films") / word("deeper folder of films")
    folder.mkdir(parents=True)
    files = []
    for number in range(9):
        files.append(folder / f"{word(f'film {number}')}.jpg")
        Image.fromarray(grey_film(number)).save(
            files[-1], exif=exif(canaries, number), comment=word(f"JPEG comment {number}").encode(),
            xmp=f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{word(f'JPEG XMP {number}')}</x:xmpmeta>".encode(),
        )  # fmt: skip
    files.append(folder / f"{word('PNG film')}.png")
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", word("PNG tEXt"))
    text.add_text("Physician", word("PNG zTXt"), zip=True)
    text.add_itxt("Title", word("PNG iTXt"))
    text.add(b"pvTe", word("PNG private chunk").encode())
    Image.fromarray(grey_film(20)).save(files[-1], pnginfo=text, exif=exif(canaries, 9))
    files.append(folder / f"{word('TIFF film')}.tif")
    names = {tag: word(f"TIFF tag {tag}") for tag in (269, 270, 305, 315, 316, 33432, 65000)}
    Image.fromarray(grey_film(21)).save(files[-1], tiffinfo=names)
    for number, more in enumerate(({}, {"SOPClassUID": SCREENSHOT}, {"BurnedInAnnotation": "YES"})):
        path = folder / f"{word(f'DICOM film {number}')}.dcm"
        write_dicom(
            path,
            grey_film(30 + number),
            dicom_type="DX",
            PatientID=word(f"PatientID of film {number}"),
            **more,
        )
        tag_dicom(path, canaries, f"film {number}")
        if number == 0:
            files.append(path)
    rows = [
        (
            path.name,
            ("healthy", "ill")[place % 2],
            word(f"group of {path.name}"),
            word(f"column beside {path.name}"),
        )
        for place, path in enumerate(files)
    ]
    write_csv(folder / "labels.csv", ["file", "label", "group", "physician"], rows)
    return folder


def exif(canaries: Canaries, number: int) -> Image.Exif:
    """Return EXIF with canaries as text, as UTF-16 and in a block of its own."""
    tags = Image.Exif()
    for tag in (0x010E, 0x010F, 0x013B, 0x8298):
        tags[tag] = canaries.word(f"EXIF {tag:x} of {number}")
    for tag in (0x9C9C, 0x9C9D):
        tags[tag] = canaries.word(f"EXIF {tag:x} of {number}").encode("utf-16-le")
    tags.get_ifd(EXIF)[USER_COMMENT] = UNICODE + canaries.word(f"EXIF comment of {number}").encode(
        "utf-16-le"
    )
    return tags


def plant_series(folder: Path, canaries: Canaries, dicom_type: str) -> None:
    """Write two DICOM series whose headers are full of canaries."""
    for number in range(2):
        series = folder / canaries.word(f"folder of {dicom_type} series {number}")
        paths = write_series(
            series, head(number), spacing_mm=(4.0, 3.0, 3.0), dicom_type=dicom_type, RescaleSlope=1,
            RescaleIntercept=0, PatientID=canaries.word(f"PatientID of {dicom_type} {number}"),
            StudyInstanceUID=canaries.uid(f"StudyInstanceUID of {dicom_type} {number}"),
            SeriesInstanceUID=canaries.uid(f"SeriesInstanceUID of {dicom_type} {number}"),
            FrameOfReferenceUID=canaries.uid(f"FrameOfReferenceUID of {dicom_type} {number}"),
        )  # fmt: skip
        tag_dicom(paths[3], canaries, f"{dicom_type} {number}")


def tag_dicom(path: Path, canaries: Canaries, name: str) -> None:
    """Fill a DICOM file's preamble, file meta, header, sequences, private tags, overlay and curve."""
    word = canaries.word
    dataset = pydicom.dcmread(path)
    dataset.preamble = word(f"preamble of {name}").encode("utf-16-le").ljust(128, b"\0")
    dataset.file_meta.SourceApplicationEntityTitle = word(f"application of {name}")
    dataset.file_meta.PrivateInformationCreatorUID = canaries.uid(f"private creator of {name}")
    dataset.file_meta.PrivateInformation = word(f"private information of {name}").encode() + b" "
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName = f"{word(f'PatientName of {name}')}^{word(f'given name of {name}')}"
    dataset.PatientBirthDate = canaries.date(f"PatientBirthDate of {name}")
    dataset.AccessionNumber = canaries.number(f"AccessionNumber of {name}")
    dataset.OtherPatientIDs = canaries.number(f"OtherPatientIDs of {name}")
    for keyword in (
        "InstitutionName", "InstitutionAddress", "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName",
        "StationName", "StudyDescription", "SeriesDescription", "ProtocolName", "DeviceSerialNumber", "ImageComments",
        "PatientComments", "StudyID", "PatientAddress", "RequestingPhysician", "AdditionalPatientHistory",
    ):  # fmt: skip
        setattr(dataset, keyword, word(f"{keyword} of {name}"))
    inner, outer = Dataset(), Dataset()
    inner.CodeMeaning = word(f"nested sequence of {name}")
    outer.ScheduledProcedureStepDescription = word(f"sequence of {name}")
    outer.ScheduledProtocolCodeSequence = Sequence([inner])
    dataset.RequestAttributesSequence = Sequence([outer])
    private = dataset.private_block(0x0099, word(f"private creator's name of {name}"), create=True)
    private.add_new(1, "LO", word(f"private tag of {name}"))
    private.add_new(2, "OB", word(f"private bytes of {name}").encode("utf-16-be"))
    bits = word(f"overlay's bits of {name}").encode().ljust(dataset.Rows * dataset.Columns // 8, b"\0")
    for element, kind, value in (
        (0x10, "US", dataset.Rows), (0x11, "US", dataset.Columns), (0x22, "LO", word(f"overlay of {name}")),
        (0x40, "CS", "G"), (0x50, "SS", [1, 1]), (0x100, "US", 1), (0x102, "US", 0),
        (0x1500, "LO", word(f"overlay's label of {name}")), (0x3000, "OW", bits),
    ):  # fmt: skip
        dataset.add_new(0x60000000 + element, kind, value)
    dataset.add_new(0x50000022, "LO", word(f"curve of {name}"))
    dataset.add_new(0x50003000, "OB", word(f"curve's data of {name}").encode() + b" ")
    dataset.add_new(0xFFFCFFFC, "OB", word(f"trailing padding of {name}").encode() + b" ")
    dataset.save_as(path, enforce_file_format=True)


def plant_nifti(folder: Path, canaries: Canaries, name: str, seed: int) -> Path:
    """Write a NIfTI volume with canaries in every free field of its header and in extensions."""
    word = canaries.word
    path = folder / f"{word(f'file of {name}')}.nii.gz"
    affine = np.diag([-3.0, -3.0, 4.0, 1.0])
    affine[:3, 3] = 60, 60, -40
    image = nibabel.Nifti1Image(head(seed).transpose(2, 1, 0), affine)
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[field] = word(f"{field} of {name}")
    for code, encoding in ((6, "utf-8"), (4, "utf-8"), (44, "utf-16-le")):
        content = word(f"extension {code} of {name}").encode(encoding)
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, content))
    image.to_filename(path)
    return path


def plant_scans(folder: Path, canaries: Canaries, dicom_type: str) -> Path:
    """Write DICOM series and NIfTI files of several patients, beside a table with groups."""
    folder = folder / canaries.word(f"folder of {dicom_type} scans")
    folder.mkdir(parents=True)
    plant_series(folder, canaries, dicom_type)
    paths = [
        plant_nifti(folder, canaries, f"{dicom_type} volume {number}", 10 + number) for number in range(4)
    ]
    groups = [(path.name, "ill", canaries.word(f"group of {path.name}")) for path in paths[1:]]
    write_csv(folder / "labels.csv", ["file", "label", "group"], groups)
    return folder


def plant_slides(folder: Path, canaries: Canaries) -> Path:
    """Write Aperio slides of three patients as the TCGA portal names them: canaries in tags, label and macro."""
    word = canaries.word
    folder = folder / word("folder of slides")
    for number in range(3):
        barcode = f"TCGA-{canaries.letters(2)}-{canaries.letters(4)}".upper()
        canaries.plant(barcode, f"patient of slide {number}")
        place = folder / word(f"folder of slide {number}")
        (place / "logs").mkdir(parents=True)
        (place / "logs" / f"{word(f'log of slide {number}')}.log").write_text(word(f"inside a log {number}"))
        path = place / f"{barcode}-01Z-00-DX1.{word(f'file of slide {number}')}.svs"
        write_slide(path, canaries, number)
    return folder


def write_slide(path: Path, canaries: Canaries, number: int) -> None:
    """Write tissue on white glass as a tiled TIFF, a thumbnail, a label and a macro picture behind it."""
    word = canaries.word
    y, x = np.mgrid[:640, :640]
    tissue = (y - 320) ** 2 + (x - 320) ** 2 < 280**2
    noise = np.random.default_rng(number).integers(-30, 30, (640, 640, 1))
    pixels_YXC = np.where(tissue[..., None], np.clip(noise + np.array([190, 90, 170]), 0, 255), 245).astype(
        np.uint8
    )
    said = "|".join(
        f"{name} = {word(f'{name} of slide {number}')}"
        for name in ("Filename", "Title", "User", "ScanScope ID")
    )
    described = f"Aperio Image Library v12.0.15\r\n640x640 (256x256)|AppMag = 20|MPP = 0.5|{said}"
    label = np.full((80, 120, 3), (0, 255, 0), np.uint8)
    label.reshape(-1)[: 3 * 11] = np.frombuffer(word(f"pixels of label {number}").encode() * 3, np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        common = {"photometric": "rgb", "compression": "zlib", "metadata": None}
        tags = [
            (315, 2, 0, word(f"Artist of slide {number}"), True),
            (306, 2, 20, "1931:02:03 04:05:06", True),
        ]
        tiff.write(
            pixels_YXC, tile=(256, 256), description=described, extratags=tags[:1], software=False, **common
        )
        tiff.write(pixels_YXC[::4, ::4].copy(), description=described, **common)
        for name in ("label", "macro"):
            text = f"Aperio Image Library v12.0.15\r\n{name} 120x80|{word(f'{name} of slide {number}')}"
            tiff.write(label, subfiletype=1 if name == "label" else 9, description=text, **common)
