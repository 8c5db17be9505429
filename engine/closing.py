"""Close a trained stage: embed its data, choose the buffer, measure what earlier modalities lost.

Works from the stage's `encoder.safetensors` alone, so that a stage whose closing was interrupted is closed by the
next call. Source of the buffer: Ye et al., CVPR 2024 (MedCoSS): k-means on the features, the samples nearest to each
centre.

Shape suffixes: N samples, D width.
"""

import math
import shutil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemos.engine import dist
from mnemos.engine.clustering import kmeans, nearest_of_each, num_clusters
from mnemos.engine.curriculum import Plan, Stage
from mnemos.engine.encoder import Encoder, pooled
from mnemos.engine.preparing import pack_texts
from mnemos.engine.progress import Progress
from mnemos.engine.weights import encode_unmasked, read_encoder
from mnemos.kernels.counter_rng import stream_key
from mnemos.sharding.bad_samples import BadSamples
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stream import OnSkip, RawBatch, Request, read_batch
from mnemos.sharding.tokenizer import PAD
from mnemos.sharding.writer import ShardSetWriter

BATCH = 64  # samples embedded at a time on a CPU; a GPU takes more
GPU_BATCH = 512


def close_stage(plan: Plan, stage: Stage) -> dict[str, Any]:
    """Embed, choose and write the buffer, measure drift; return what goes into the ledger; collective."""
    assert stage.data is not None
    device = dist.device()
    encoder = read_encoder(stage.directory).to(device)
    train = ShardSet(stage.data, "train", plan.store)
    bad = BadSamples(plan.settings.data.max_bad)
    embedding_ND = embed(encoder, train, device, title=f"embedding {stage.name}", on_skip=bad.note)
    broken = sorted(number for _, _, number in dist.join(bad.reasons))
    facts = dist.on_main(lambda: _write_buffer(plan, stage, train, embedding_ND, broken))
    return {**facts, "drift": drift(plan, stage, encoder, device)}


@torch.no_grad()
def embed(
    encoder: Encoder,
    shards: ShardSet,
    device: torch.device,
    *,
    title: str = "",
    on_skip: OnSkip | None = None,
) -> Tensor:
    """Return the pooled features fp32 [N, D] of a shard set on the CPU, nothing masked; data-parallel, collective.

    Args:
        encoder: in eval mode on `device`.
        shards: what to embed.
        title: of the progress bar; silent without one.
        on_skip: told of broken samples, which get the features of their follower; None refuses them.
    """
    size = GPU_BATCH if device.type == "cuda" else BATCH
    world, rank = dist.world_size(), dist.rank()
    share = math.ceil(len(shards) / world)  # rank r embeds rows r * share ... of the set, the last one padded
    rows_RD = torch.zeros(share, encoder.shape.width, device=device)
    with Progress(title, share, shown=bool(title) and dist.is_main()) as progress:
        for start in range(0, share, size):
            numbers = np.arange(start, min(start + size, share)) + rank * share
            numbers = numbers[numbers < len(shards)]
            if len(numbers):
                request = Request(step=0, member=0, samples=numbers, places=numbers)
                raw = read_batch([shards], request, on_skip)
                features = _features(encoder, shards, raw, device)
                rows_RD[start : start + len(numbers)] = features
            progress.advance(len(numbers))
    return dist.gather_rows(rows_RD)[: len(shards)].cpu()


def _features(encoder: Encoder, shards: ShardSet, raw: RawBatch, device: torch.device) -> Tensor:
    kind = shards.manifest.kind
    if kind == "text":
        rows = pack_texts(raw.data, raw.data != PAD).to(device)
        return pooled(encoder.forward_text(rows.ids_T, rows.position_T, rows.packing), rows.packing)
    raw = raw.to(device)
    return pooled(encode_unmasked(encoder, kind, raw.data, raw.scale_B, raw.shift_B), None)


def _write_buffer(
    plan: Plan, stage: Stage, train: ShardSet, embedding_ND: Tensor, broken: list[int]
) -> dict[str, Any]:
    """Choose the samples, none of the broken ones, and write them as a shard set of their own."""
    settings = plan.settings
    count = num_clusters(len(train), settings.buffer.clusters_percent / 100)
    seed = stream_key(settings.training.seed, stage.name, "kmeans")
    clusters = kmeans(embedding_ND, count, seed % (1 << 32))
    keys_N = train.index["key"]
    distances = clusters.distances.copy()
    distances[broken] = np.inf
    chosen = nearest_of_each(clusters.labels, distances, keys_N, settings.buffer.per_cluster)
    chosen = chosen[np.isfinite(distances[chosen])]
    shutil.rmtree(stage.buffer, ignore_errors=True)  # of an interrupted closing
    manifest = train.manifest
    tokenizer = None if manifest.tokenizer is None else train.tokenizer_file()
    with ShardSetWriter(
        stage.buffer,
        modality=manifest.modality,
        source="buffer",
        shape=manifest.shape,
        spacing_mm=manifest.spacing_mm,
        preset=manifest.preset,
        classes=manifest.classes,
        recipe={
            **manifest.recipe,
            "buffer": f"k-means of {len(train)} features into {count} clusters ({clusters.backend}, seed "
            f"{settings.training.seed}); the {settings.buffer.per_cluster} samples nearest to each centre",
        },
        tokenizer_file=tokenizer,
        key=b"",
        lossless=manifest.payload == "png",
    ) as writer:
        for number in np.sort(chosen):
            writer.add_encoded(
                "train",
                train.payload(int(number)),
                train.text(int(number)),
                train.row(int(number)),
                cluster=np.int32(clusters.labels[number]),
                distance=np.float32(clusters.distances[number]),
                embedding=embedding_ND[number].numpy(),
            )
    return {"buffer": len(chosen), "clusters": count}


def drift(plan: Plan, stage: Stage, encoder: Encoder, device: torch.device) -> dict[str, float]:
    """Return, by earlier modality, how far its held-out features moved since its own stage; collective.

    Mean squared difference of the pooled features, divided by the variance of the features of the modality's own
    stage over the set: 0 nothing moved, 1 as far as two random samples are from their mean.
    """
    found: dict[str, float] = {}
    for earlier in plan.earlier(stage):
        if earlier.data is None:
            continue
        held_out = ShardSet(earlier.data, "val", plan.store)
        if len(held_out) < 2:  # no variance to measure against
            continue
        bad = BadSamples(plan.settings.data.max_bad)
        then_ND = embed(read_encoder(earlier.directory).to(device), held_out, device, on_skip=bad.note)
        now_ND = embed(encoder, held_out, device, on_skip=bad.note)
        moved = (now_ND - then_ND).double().square().mean()
        found[earlier.name] = float(moved / then_ND.double().var(dim=0).mean())
    return found
