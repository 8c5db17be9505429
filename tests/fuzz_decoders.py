"""Decode thousands of damaged payloads in a process of its own: a crash in C would end it. Prints what came of it.

Called as `python fuzz_decoders.py COUNT FILE`: FILE gets every payload before it is decoded, so that the last one is
known when the process dies. The payloads have no checksum in front: whoever made them computed the right one.
"""

import json
import random
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from small_sets import SIZE, array, own_payload, text, write_tokenizer

from mnemos.sharding.codecs import BROKEN, DECODERS, decode_ids, decode_text, encode_ids, encode_volume
from mnemos.sharding.tokenizer import load_tokenizer

ADDRESS_SPACE = 4 << 30
HEADERS = {"jpg": 640, "png": 64, "vol": 64, "npy": 128, "ids": 8, "txt": 8}  # most damage goes there


def sound_payloads(payload: str) -> list[bytes]:
    """Return payloads that decode: of volumes also those that compress to nothing, or not at all."""
    if payload == "vol":
        noise = np.random.default_rng(0).integers(-32768, 32767, SIZE.volume).astype(np.int16)
        flat, half = np.zeros(SIZE.volume, np.int16), array("vol", 3)
        half[2:] = -1024
        return [encode_volume(values) for values in (array("vol", 1), noise, flat, half)]
    if payload == "ids":
        return [encode_ids(np.arange(3, 40))]
    return [text(1).encode() if payload == "txt" else own_payload(payload, 1)]


def damaged(content: bytes, header: int, draw: random.Random) -> bytes:
    """Flip, set, overwrite, cut out or cut off bytes, mostly near the beginning."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
        at = draw.randrange(min(header, len(data)) if draw.random() < 0.7 else len(data))
        way = draw.random()
        if way < 0.5:
            data[at] ^= 1 << draw.randrange(8)
        elif way < 0.75:
            data[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF])
        elif way < 0.9:
            number = draw.choice([0, -1, 0x7FFFFFFF, -0x80000000, len(data), len(data) - 1])
            data[at : at + 4] = struct.pack("<i", number)[: len(data) - at]
        elif way < 0.95:
            del data[at : at + draw.randrange(1, 9)]
        else:
            del data[draw.randrange(1, len(data) + 1) :]
        if not data:
            return b"\0"
    return bytes(data)


def damaged_png(content: bytes, draw: random.Random) -> bytes:
    """Change the chunks of a PNG and make their checksums right, or as `damaged` does."""
    if draw.random() < 0.3:
        return damaged(content, HEADERS["png"], draw)
    chunks, at = [], 8
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append([content[at + 4 : at + 8], bytearray(content[at + 8 : at + 8 + size])])
        at += 12 + size
    strange = [
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"PLTE",
        b"tRNS",
        b"iCCP",
        b"acTL",
        b"fcTL",
        b"eXIf",
        b"cHRM",
        b"IHDR",
    ]
    for _ in range(draw.choice([1, 1, 2])):
        data = draw.choice(chunks)[1]
        way = draw.random()
        if way < 0.4 and data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif way < 0.5:
            chunks[0][1][:8] = struct.pack(
                ">II", draw.choice([0, 24, 65_535, 0x7FFFFFFF]), draw.choice([16, 65_535])
            )
        elif way < 0.9:
            extra = bytearray(draw.randbytes(draw.choice([0, 1, 4, 13, 26])))
            chunks.insert(draw.randrange(len(chunks) + 1), [draw.choice(strange), extra])
        else:
            del data[draw.randrange(len(data) + 1) :]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return content[:8] + b"".join(packed)


def decoder(payload: str, folder: Path) -> Callable[[bytes], object]:
    """Return what the reader does with a payload of this kind."""
    if payload == "ids":
        return lambda data: decode_ids(data, SIZE.text)
    if payload == "txt":
        tokenizer = load_tokenizer(write_tokenizer(folder / "fuzz-tokenizer.json"))
        return lambda data: decode_text(data, SIZE.text, tokenizer)
    values = array(payload, 1)
    image = payload in ("jpg", "png")
    out = np.empty(
        values.transpose(1, 2, 0).shape if image else values.shape, np.uint8 if image else np.int16
    )
    return lambda data: DECODERS[payload](data, out)


def main(count: int, file: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    results, slowest = {}, 0.0
    with file.open("wb") as last:
        for payload, header in HEADERS.items():
            draw, came, decode = random.Random(payload), Counter[str](), decoder(payload, file.parent)
            sound = sound_payloads(payload)
            for _ in range(count):
                content = draw.choice(sound)
                data = damaged_png(content, draw) if payload == "png" else damaged(content, header, draw)
                last.seek(0)
                last.truncate()
                last.write(f"{payload}:".encode() + data)
                last.flush()
                start = time.perf_counter()
                try:
                    decode(data)
                    came["decoded"] += 1
                except BROKEN:
                    came["refused"] += 1
                except Exception as error:  # noqa: BLE001  what the reader would not expect is what is looked for
                    came[f"{type(error).__module__}.{type(error).__name__}: {error}"[:200]] += 1
                slowest = max(slowest, time.perf_counter() - start)
            results[payload] = dict(came)
    # Not getrusage: that starts from what the parent process had.
    (peak,) = [
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    ]
    print(json.dumps({"results": results, "slowest_s": slowest, "peak_bytes": int(peak) << 10}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
