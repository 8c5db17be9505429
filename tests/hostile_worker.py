"""Read every hostile folder in a process of its own and tell what came of it, how long it took and what it held.

Run as a program: ``python hostile_worker.py FOLDER``; FOLDER holds ``cases.json``, a list of [folder, modality]. Prints one
JSON line a case: name, verdict, says, seconds, peak_bytes (of memory, above an empty process like it).
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

ADDRESS_BYTES = 2 << 30  # of address space beyond what the process starts with
ALARM_S = 20


def read(folder: Path, modality_name: str) -> tuple[str, str]:
    """Find and read a folder's units; return the verdict and what was said."""
    from mnemos.sharding.errors import UserError
    from mnemos.sharding.modalities import MODALITIES, STORED_SIZES
    from mnemos.sharding.sources.samples import find_units, read_unit
    from mnemos.sharding.sources.source import FindOptions

    modality = MODALITIES[modality_name]
    try:
        units = find_units(folder, modality, FindOptions())
    except UserError as error:
        return "refused", str(error)
    outcomes = [read_unit(unit, modality, STORED_SIZES["sample"]) for unit in units]
    for verdict in ("broken", "left_out"):
        said = [getattr(outcome, verdict) for outcome in outcomes if getattr(outcome, verdict)]
        if said:
            return verdict.replace("_", " "), " | ".join(said)
    if not all(unit.name.isprintable() for unit in units):
        return "read", "a name that breaks its line, steers the terminal or cannot be encoded"
    for text in (
        sample.array for outcome in outcomes for sample in outcome.samples if isinstance(sample.array, str)
    ):
        text.encode()  # what cannot be stored is as bad as a crash
    return "read", f"{sum(len(outcome.samples) for outcome in outcomes)} samples"


def in_child(work: Any) -> dict[str, Any]:
    """Run work in a forked process: neither a crash, nor a hang, nor its memory reaches the next one."""
    reading, writing = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(ALARM_S)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESS_BYTES,) * 2)
        try:
            verdict, says = work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer
            verdict, says = "raised", f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps([verdict, says[:2000]]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        written = answer.read()
    _, status, usage = os.wait4(child, 0)
    verdict, says = json.loads(written) if written else ("died", f"signal {os.WTERMSIG(status)}")
    seconds = time.perf_counter() - start
    return {"verdict": verdict, "says": says, "seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}


def main(root: Path) -> None:
    """Answer for every case."""
    import pydicom.pixels.decoders  # noqa: F401
    from PIL import Image

    from mnemos.sharding.sources.registry import sources

    sources()

    Image.init()
    empty = in_child(lambda: ("read", ""))["peak_bytes"]
    for name, modality in json.loads((root / "cases.json").read_text()):
        answer = in_child(lambda name=name, modality=modality: read(root / name, modality))
        answer["peak_bytes"] -= empty
        print(json.dumps({"name": name, **answer}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
