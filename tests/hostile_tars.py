"""Tars that nobody should train on: name -> how to write one, and what must be said of it."""

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_sets import add_member, own_payload


def write_tar(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            add_member(tar, name, data)
    return path


def volumes(num: int, start: int = 0) -> dict[str, bytes]:
    return {f"scan{number}.npy": own_payload("npy", number) for number in range(start, start + num)}


def raw(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    """Write a sound tar of three samples of 1,536 bytes, and change its bytes."""

    def write(path: Path) -> None:
        content = bytearray(write_tar(path, volumes(3), format=tarfile.USTAR_FORMAT).read_bytes())
        change(content)
        path.write_bytes(content)

    return write


def with_member(name: str, **fields: Any) -> Callable[[Path], None]:
    """Write a tar with a strange member between two samples."""

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        dialect = tarfile.PAX_FORMAT if "pax_headers" in fields else tarfile.GNU_FORMAT
        with tarfile.open(path, "w", format=dialect) as tar:
            add_member(tar, "scan0.npy", own_payload("npy", 0))
            if fields.get("type", tarfile.REGTYPE) == tarfile.REGTYPE:
                add_member(tar, name, b"strange", **fields)
            else:
                member = tarfile.TarInfo(name)
                for field, value in fields.items():
                    setattr(member, field, value)
                tar.addfile(member)
            add_member(tar, "scan1.npy", own_payload("npy", 1))

    return write


def members(*pairs: tuple[str, bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in pairs:
                add_member(tar, name, data)

    return write


def huge_long_name(path: Path) -> None:
    """Write a GNU long name of a size that a reader without limits would believe."""
    write_tar(path, {"scan0.npy": own_payload("npy", 0)})
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    content = path.read_bytes()
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + content)


ONE, TWO = own_payload("npy", 1), own_payload("npy", 2)
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped name": (raw(lambda tar: tar.__setitem__(3, tar[3] ^ 1)), "bad checksum"),
    "flipped size in the middle": (raw(lambda tar: tar.__setitem__(1536 + 130, 0x37)), "bad checksum"),
    "cut off in a member": (raw(lambda tar: tar.__delitem__(slice(2100, None))), "cut off inside"),
    "cut off at a member": (raw(lambda tar: tar.__delitem__(slice(3072, None))), "closing blocks"),
    "half of the end": (raw(lambda tar: tar.__delitem__(slice(4608 + 512, None))), "closing blocks"),
    "zeros in the middle": (raw(lambda tar: tar.__setitem__(slice(1536, 2048), bytes(512))), "bytes behind"),
    "behind the end": (raw(lambda tar: tar.extend(b"more")), "bytes behind"),
    "symbolic link": (with_member("x.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a symbolic link"),
    "hard link": (with_member("x.npy", type=tarfile.LNKTYPE, linkname="scan0.npy"), "a hard link"),
    "device": (with_member("x.npy", type=tarfile.CHRTYPE), "a device"),
    "pipe": (with_member("x.npy", type=tarfile.FIFOTYPE), "a pipe"),
    "sparse": (with_member("x.npy", type=tarfile.GNUTYPE_SPARSE), "a sparse file"),
    "unknown type": (with_member("x.npy", type=b"Z"), "a member of type"),
    "header for all": (with_member("x.npy", type=tarfile.XGLTYPE), "a header for all"),
    "upwards": (with_member("../x.npy"), "leads upwards"),
    "absolute": (with_member("/x.npy"), "absolute"),
    "upwards in a PAX name": (with_member("x.npy", pax_headers={"path": "a/../../x.npy"}), "leads upwards"),
    "PAX size": (with_member("x.npy", pax_headers={"size": "99999999"}), "b'size'"),
    "PAX sparse": (with_member("x.npy", pax_headers={"GNU.sparse.major": "1"}), "b'GNU.sparse.major'"),
    "long name of a terabyte": (huge_long_name, "bytes, where"),
    "no UTF-8": (with_member("sc\udcff.npy"), "not UTF-8"),
    "members apart": (members(("a.npy", ONE), ("b.npy", TWO), ("a.json", b"{}")), "do not lie together"),
    "a key twice": (members(("a.npy", ONE), ("b.npy", TWO), ("a.npy", ONE)), "do not lie together"),
    "a member twice": (members(("a.npy", ONE), ("a.npy", TWO)), "a second member"),
    "two payloads": (members(("a.npy", ONE), ("a.vol", TWO)), "of 1 samples do not fit"),
    "JSON too large": (members(("a.npy", ONE), ("a.json", b" " * 70_000)), "70000 bytes"),
    "JSON too deep": (members(("a.npy", ONE), ("a.json", b"[" * 60_000)), "nested too deeply"),
    "JSON no object": (members(("a.npy", ONE), ("a.json", b"[]")), "is no object"),
    "scale is NaN": (members(("a.npy", ONE), ("a.json", b'{"scale": NaN, "shift": 0}')), "a finite number"),
    "scale alone": (members(("a.npy", ONE), ("a.json", b'{"scale": 2}')), "one of scale and shift"),
    "label is a list": (members(("a.npy", ONE), ("a.json", b'{"label": []}')), "not a name"),
    "label is half a sign": (members(("a.npy", ONE), ("a.json", b'{"label": "\\ud800"}')), "not a name"),
    "a pickle as array": (members(("a.npy", pickle.dumps(list(range(99))))), "do not fit"),
}
