"""Real files of every modality build, keep patients apart and look as their formats promise.

Reads the folder named by MNEMOS_REAL_DATA: report/, xray/, ct/, mri/ (NIfTI and a DICOM series), pathology/.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from sample_files import key_file

from mnemos.sharding import build, show
from mnemos.sharding.modalities import STORED_SIZES
from mnemos.sharding.reader import ShardSet

REAL = os.environ.get("MNEMOS_REAL_DATA", "")
pytestmark = pytest.mark.skipif(not REAL, reason="set MNEMOS_REAL_DATA to a folder of real files to run this")


@pytest.mark.parametrize("folder", ["report", "xray", "ct", "mri", "mri/dicom_series", "pathology"])
def test_real_files_build(tmp_path, capsys, folder):
    source = Path(REAL) / folder
    if not source.is_dir():
        pytest.skip(f"MNEMOS_REAL_DATA has no folder {folder}; put real files there to run this")
    modality = folder.split("/")[0]
    flags = ["--out", str(tmp_path / "set"), "--key-file", key_file(tmp_path)]
    assert build.main([modality, str(source), *flags]) == 0, capsys.readouterr().err
    assert "broken" not in capsys.readouterr().out
    size = STORED_SIZES["sample"]
    train, val = ShardSet(tmp_path / "set", "train"), ShardSet(tmp_path / "set", "val")
    assert len(train) and len(val)
    if folder != "mri/dicom_series":  # a single patient
        assert not set(train.index["group"].tolist()) & set(val.index["group"].tolist())
    for shards in (train, val):
        for place in range(0, len(shards), max(1, len(shards) // 12)):
            stored = shards.read(place)
            model = stored * shards.index["scale"][place] + shards.index["shift"][place]
            if shards.manifest.kind == "text":
                assert 1 <= len(stored) <= size.text
            elif shards.manifest.kind == "image":
                assert stored.shape[1:] == size.image and stored.std() > 5
                assert model.min() >= 0 and model.max() <= 1
            else:
                assert stored.shape == size.volume
                if shards.manifest.values == "hounsfield":
                    assert model.min() >= -1 and model.max() <= 1
                    assert (stored > -300).mean() >= 0.1
                else:
                    assert abs(np.median(model)) < 3 and model.max() < 20
    assert show.main([str(tmp_path / "set")]) == 0
