"""The encoder as a file: `encoder.safetensors` with the weights, `encoder.json` with all one needs to use them.

from mnemos.engine.weights import load_encoder
encoder = load_encoder("runs/sample/stages/05-pathology")
features = encoder.features("xray", "film.png")  # [1, D]
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemos.engine.encoder import Encoder, EncoderShape, ImageKind, patch_edges, pooled
from mnemos.engine.patches import all_patches, patch_grid
from mnemos.engine.run_directory import CARD, WEIGHTS
from mnemos.kernels.packing import Packing
from mnemos.sharding.errors import UserError
from mnemos.sharding.manifest import Manifest
from mnemos.sharding.modalities import STORED_SIZES, Modality
from mnemos.sharding.sample import Sample

FORMAT = "mnemos-encoder-1"
TOKENIZER = "tokenizer.json"


def modality_record(manifest: Manifest) -> dict[str, Any]:
    """Return what the card keeps of a modality: how its samples must be made and how values are scaled."""
    return {
        "modality": asdict(manifest.modality),
        "shape": manifest.shape,
        "spacing_mm": manifest.spacing_mm,
        "recipe": manifest.recipe,
        "preset": manifest.preset,
        "fingerprint": manifest.fingerprint,
    }


def save_encoder(
    directory: Path,
    weights: dict[str, Tensor],
    shape: EncoderShape,
    *,
    stage: str,
    modalities: dict[str, dict[str, Any]],
    tokenizer: Path | None,
) -> None:
    """Write weights, card and tokenizer; the card last, so that a folder with a card is whole.

    Args:
        directory: of the stage.
        weights: fp32 on the CPU, named as in `Encoder`.
        shape: of the encoder.
        stage: name of the stage it was trained up to.
        modalities: `modality_record` of every stage up to it, by name.
        tokenizer: file stored with the reports; None without texts.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / (WEIGHTS + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
    partial.replace(directory / WEIGHTS)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, directory / TOKENIZER)
    card = {"format": FORMAT, "stage": stage, "shape": asdict(shape), "modalities": modalities}
    partial = directory / (CARD + ".partial")
    partial.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    partial.replace(directory / CARD)


def read_card(directory: Path) -> dict[str, Any]:
    """Return `encoder.json`.

    Raises:
        UserError: there is none, or it is of another format.
    """
    try:
        card: dict[str, Any] = json.loads((directory / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{directory} holds no encoder; name a stage's folder with {WEIGHTS} and {CARD}"
        ) from None
    if card.get("format") != FORMAT:
        raise UserError(
            f"{directory / CARD} has format {card.get('format')!r}; this version reads {FORMAT!r}"
        )
    if not {"shape", "modalities"} <= card.keys():
        raise UserError(f"{directory / CARD} is damaged: shape or modalities are missing; restore it")
    return card


def read_shape(card: dict[str, Any]) -> EncoderShape:
    """Return the encoder's shape from its card."""
    fields = dict(card["shape"])
    for grid in ("image_grid", "volume_grid"):
        fields[grid] = tuple(fields[grid])
    return EncoderShape(**fields)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return the weights, fp32 on the CPU, by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{directory / WEIGHTS} cannot be read ({error}); restore it or train the stage again"
        ) from None


def read_encoder(directory: Path) -> Encoder:
    """Return the encoder of a stage's folder in eval mode, fp32 on the CPU."""
    encoder = Encoder(read_shape(read_card(directory)))
    try:
        encoder.load_state_dict(read_weights(directory))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"{directory}: {WEIGHTS} and {CARD} do not fit each other ({reason:.120}); restore the folder"
        ) from None
    return encoder.eval()


class PretrainedEncoder:
    """An encoder ready for use on files.

    Args:
        directory: of a stage.
        device: where to compute.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.card = read_card(directory)
        self.encoder = read_encoder(directory).to(device)
        self.device = device
        self._tokenizer_file = directory / TOKENIZER

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities it was trained on, in order."""
        return list(self.card["modalities"])

    @torch.no_grad()
    def features(self, modality: str, source: str | Path | np.ndarray) -> Tensor:
        """Return one feature vector for each sample found in the source: fp32 [N, D].

        Args:
            modality: one of `modalities`; decides the preprocessing.
            source: a text; an image or volume file (a volume gives one row for each of its sub-volumes); or an array
                as stored in shards: uint8 [C, Y, X] or int16 [Z, Y, X] with the modality's value scale.

        Raises:
            UserError: unknown modality, or a source that is not of its kind.
        """
        tokens, packing = self._tokens(modality, source)
        return pooled(tokens, packing)

    @torch.no_grad()
    def tokens(self, modality: str, source: str | Path | np.ndarray) -> Tensor:
        """Return the feature sequences [N, L, D], CLS first for images and volumes; arguments as `features`."""
        return self._tokens(modality, source)[0]

    def _tokens(self, modality: str, source: str | Path | np.ndarray) -> tuple[Tensor, Packing | None]:
        record = self.card["modalities"].get(modality)
        if record is None:
            raise UserError(f"modality {modality!r} is not among those trained: {', '.join(self.modalities)}")
        if record["modality"]["kind"] == "text":
            ids_T = self._token_ids(str(source), record["shape"][0])
            packing = Packing.from_lengths([len(ids_T)], self.device)
            place_T = torch.arange(len(ids_T), device=self.device)
            return self.encoder.forward_text(ids_T, place_T, packing), packing
        samples = _read_samples(source, record)
        data = torch.from_numpy(np.stack([sample.array for sample in samples])).to(self.device)
        if record["modality"]["kind"] == "volume":
            data = data[:, None]
        scale_N = torch.tensor([sample.scale for sample in samples], device=self.device)
        shift_N = torch.tensor([sample.shift for sample in samples], device=self.device)
        return encode_unmasked(self.encoder, record["modality"]["kind"], data, scale_N, shift_N), None

    def _token_ids(self, text: str, longest: int) -> Tensor:
        from mnemos.sharding.tokenizer import load_tokenizer

        if not text.strip():
            raise UserError(f"the text {text!r} is empty; give one with at least a word")
        ids = load_tokenizer(self._tokenizer_file).encode(text).ids[:longest]
        return torch.tensor(ids, device=self.device)


def _read_samples(source: str | Path | np.ndarray, record: dict[str, Any]) -> list[Sample]:
    """Return what shards would hold of a file or an array, by the modality's own preprocessing."""
    from mnemos.sharding.building.preprocess import recipe_centre
    from mnemos.sharding.sources.samples import find_units, read_unit
    from mnemos.sharding.sources.source import FindOptions

    modality, size = Modality(**record["modality"]), STORED_SIZES[record["preset"]]
    if isinstance(source, np.ndarray):
        wanted = (modality.channels, *size.image) if modality.kind == "image" else size.volume
        dtype = np.uint8 if modality.kind == "image" else np.int16
        if source.shape != wanted or source.dtype != dtype:
            raise UserError(
                f"an array {source.dtype} {source.shape} was given; {modality.name} takes {np.dtype(dtype)} {wanted}; "
                "bring it to that form, or give a file"
            )
        scale, shift = {"unit": (1 / 255, 0.0), "hounsfield": (1 / 1024, 0.0)}.get(
            modality.values, (0.0, 0.0)
        )
        if modality.values == "zscore":
            scale = 1 / max(float(source.std()), 1e-6)
            shift = -float(source.mean()) * scale
        return [Sample(array=source, source="array", scale=scale, shift=shift)]
    samples: list[Sample] = []
    for unit in find_units(Path(source), modality, FindOptions(centre=recipe_centre(record["recipe"]))):
        outcome = read_unit(unit, modality, size)
        if reason := outcome.broken or outcome.left_out:
            raise UserError(f"{unit.name}: {reason}; give a sound file of modality {modality.name}")
        samples += outcome.samples
    if not samples:
        raise UserError(
            f"{source}: nothing of it is left after preprocessing; give a file that shows the body"
        )
    return samples


def encode_unmasked(
    encoder: Encoder, kind: ImageKind, data: Tensor, scale_B: Tensor, shift_B: Tensor
) -> Tensor:
    """Return features [B, 1 + L, D] of stored images [B, C, Y, X] or volumes [B, 1, Z, Y, X], nothing masked."""
    edges, channels = patch_edges(encoder.shape, kind)
    patches_BLP = all_patches(data, patch=edges, channels=channels, scale_B=scale_B, shift_B=shift_B)
    ids_BL = torch.arange(patches_BLP.shape[1], device=data.device).expand(len(data), -1)
    tokens = patches_BLP.to(encoder.stem.cls.dtype)
    return encoder.forward_patches(kind, tokens, ids_BL, patch_grid(data.shape[2:], edges))


def load_encoder(directory: Path | str, device: str | torch.device = "cpu") -> PretrainedEncoder:
    """Return the encoder stored in a stage's folder, ready for texts, images and volumes.

    Raises:
        UserError: the folder holds none.
    """
    return PretrainedEncoder(Path(directory), torch.device(device))
