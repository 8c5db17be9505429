"""Where a run's data lies: the shard sets below a folder or an URL, by modality."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mnemos.engine.settings import Settings
from mnemos.sharding.errors import UserError
from mnemos.sharding.manifest import MANIFEST_FILE, load_manifest
from mnemos.sharding.stores.storage import StoreOptions, list_sets, open_store


def store_options(settings: Settings) -> StoreOptions:
    """Return how object stores are read under some settings."""
    data = settings.data
    return StoreOptions(
        cache_dir=Path(data.cache).expanduser() if data.cache else None,
        cache_bytes=int(data.cache_gb * 1e9),
        pipe=data.pipe,
    )


def find_shard_sets(
    root: Path | str, names: Collection[str] = (), options: StoreOptions | None = None
) -> dict[str, Any]:
    """Return the shard sets below a folder or an URL, by modality.

    Args:
        root: the folder or URL.
        names: of the sub-folders that are tried below an URL, where nothing can be listed.
        options: of an object store.

    Raises:
        UserError: the folder is missing or empty, a set is damaged, or two sets are of one modality.
        StoreError: the object store cannot be reached.
    """
    hint = "make sets with `python -m mnemos.sharding.build MODALITY INPUT --out FOLDER/MODALITY`"
    if isinstance(root, str):
        places: dict[str, Path | str] = dict(list_sets(root, tuple(dict.fromkeys(names)), options))
        if not places:
            raise UserError(
                f"--data {root}: holds no shard set under {', '.join(dict.fromkeys(names))}; upload each set to a sub-folder "
                "named as its modality"
            )
    else:
        places = _sets_in_folder(root, hint)
    sets: dict[str, Path | str] = {}
    for folder, place in places.items():
        name = load_manifest(open_store(place, options)).name
        if name in sets:
            raise UserError(
                f"--data {root}: {str(sets[name]).rsplit('/', 1)[-1]} and {folder} both hold {name}; keep one of them there"
            )
        sets[name] = place
    if not sets:
        raise UserError(f"--data {root}: holds no shard set (a sub-folder with {MANIFEST_FILE}); {hint}")
    return sets


def _sets_in_folder(folder: Path, hint: str) -> dict[str, Path | str]:
    if not folder.is_dir():
        raise UserError(f"--data {folder}: there is no such folder; {hint}")
    if (folder / MANIFEST_FILE).exists():
        raise UserError(
            f"--data {folder}: is itself a shard set; name the folder that holds it, {folder.parent}"
        )
    # a hidden one is being written, or its writer was killed
    below = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return {path.name: path for path in below if (path / MANIFEST_FILE).exists()}
