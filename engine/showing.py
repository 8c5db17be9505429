"""Pictures of what a stage learned: some validation samples as the finished model completes them."""

import numpy as np
import torch

from mnemos.engine.curriculum import Stage
from mnemos.engine.encoder import patch_edges
from mnemos.engine.objectives import Pretrainer, encode, visible_patches
from mnemos.engine.pictures import WINDOWS, TextExample, reconstruction_strip, text_strip
from mnemos.engine.preparing import TextRows
from mnemos.engine.validation import Validation

FOLDER = "reconstructions"
NUM_SAMPLES = 6


@torch.no_grad()
def show_predictions(stage: Stage, model: Pretrainer, validation: Validation, tokenizer_file: object) -> None:
    """Write `reconstructions/<modality>.png` of the stage.

    Args:
        stage: just trained.
        model: with its final fp32 weights on the CPU, in eval mode.
        validation: of the stage; the same samples and masks as its loss.
        tokenizer_file: of the texts; unused for images and volumes.
    """
    count = min(NUM_SAMPLES, len(validation.samples))
    numbers = np.linspace(0, len(validation.samples) - 1, count).astype(np.int64)
    raw, rows = validation.rows(numbers)
    raw, rows = raw.to(torch.device("cpu")), rows.to(torch.device("cpu"))
    path = stage.directory / FOLDER / f"{stage.name}.png"
    title = f"{stage.manifest.title}: held-out samples after stage {stage.number}"
    if isinstance(rows, TextRows):
        text_strip(path, _text_examples(model, raw.data, rows, tokenizer_file), title=title)
        return
    patches = visible_patches(model.encoder.shape, rows, torch.float32)
    features = encode(model.encoder, rows, patches)
    edges, channels = patch_edges(model.encoder.shape, rows.kind)
    reconstruction_strip(
        path,
        rows.images,
        model.predict(rows, features),
        visible_BK=rows.visible_BK,
        masked_BM=rows.masked_BM,
        scale_B=rows.scale_B,
        shift_B=rows.shift_B,
        patch=edges,
        channels=channels,
        window=WINDOWS[stage.manifest.values],
        title=title,
    )


def _text_examples(
    model: Pretrainer, original_BL: torch.Tensor, rows: TextRows, tokenizer_file: object
) -> list[TextExample]:
    from mnemos.sharding.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_file))
    features = encode(model.encoder, rows, None)
    best_T = model.word_head.logits(features)[0].argmax(-1)
    assert rows.scored_S is not None

    def words(ids: torch.Tensor) -> list[str]:
        return [tokenizer.decode([one], skip_special_tokens=False) for one in ids.tolist()]

    examples = []
    for number, original in enumerate(original_BL):
        begin, end = rows.bounds[number : number + 2]
        scored = rows.scored_S[slice(*rows.scored_bounds[number : number + 2])] - begin
        best = words(best_T[begin:end])
        examples.append(
            TextExample(
                original=words(original[: end - begin]),
                masked=words(rows.ids_T[begin:end]),
                predicted={position: best[position] for position in scored.tolist()},
            )
        )
    return examples
