"""The order of an epoch: a pure function of the shards' sizes and a key, without a look at any file.

An epoch is cut into a fixed number of canonical streams. Each runs through a few shards from front to back, one
shard at a time and shuffled within it; a global batch takes as many samples from every stream. So a reader holds one
shard a stream and an object store is read shard by shard, while a batch mixes samples of many shards. The order
depends on neither ranks nor workers, and the place in it is one number: the samples taken so far. The idea is that of
canonical nodes in MosaicML's Streaming; the rule here is our own.

Shape suffixes: S streams, T samples of a stream.
"""

from collections.abc import Sequence

import numpy as np


def num_streams(*, batch: int, samples: int, shards: int, most: int) -> int:
    """Return the number of canonical streams: the largest divisor of the batch that is sensible.

    Args:
        batch: samples of a global batch.
        samples: of the set; a stream has at least four, and a set smaller than a batch is one stream.
        shards: of the set; more streams than shards would only read each of them several times.
        most: what the user allows.
    """
    limit = 1 if samples < batch else min(most, shards, samples // 4)
    return max(number for number in range(1, max(1, limit) + 1) if batch % number == 0)


def epoch_order(shard_sizes: Sequence[int], *, key: int, streams: int = 1) -> np.ndarray:
    """Return the order of an epoch, int64 [S, T]: sample numbers of each stream, front to back.

    Args:
        shard_sizes: samples of each shard, in the order of their numbers.
        key: of the shuffle; another one for every epoch.
        streams: S; T is the samples divided by it, and the remainder (fewer than S samples) is left out of this
            epoch, others every time.

    Returns:
        Every sample at most once.
    """
    generator = np.random.Generator(np.random.PCG64(key % (1 << 64)))
    first = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    shards = generator.permutation(len(shard_sizes))
    shuffled = [first[shard] + generator.permutation(shard_sizes[shard]) for shard in shards]
    order = np.concatenate([np.zeros(0, dtype=np.int64), *shuffled])
    length = len(order) // streams
    return order[: streams * length].reshape(streams, length)


def batch_samples(order_ST: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return the samples of a global batch, stream by stream, so that a rank's slice touches few streams.

    Args:
        order_ST: of the epoch.
        start, stop: places in the epoch, counted in samples; the streams divide both.
    """
    streams = len(order_ST)
    return order_ST[:, start // streams : stop // streams].reshape(-1)
