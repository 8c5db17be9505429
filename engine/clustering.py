"""Group a stage's features and name the samples nearest to each centre: how a buffer is chosen.

k-means is scikit-learn's on a CPU and cuML's on a GPU, behind one function with one contract. Neither keeps
an N x C matrix.

Source: Ye et al., "Continual Self-supervised Learning: Towards Universal Multi-modal Medical Data
Representation Learning" (MedCoSS), CVPR 2024: C = 1 % of N clusters, the 5 samples nearest to each centre.

Shape suffixes: N = samples, D = feature width, C = clusters, S = chosen samples.
"""

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mnemos.sharding.errors import UserError

Backend = Literal["auto", "sklearn", "cuml"]
_ROWS = 65_536  # rows of features whose distances are computed at a time


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """What k-means found, on the host.

    Attributes:
        centres: fp32 [C, D].
        labels: int64 [N], each sample's cluster.
        distances: fp32 [N], Euclidean, to the centre of the sample's own cluster.
        inertia: sum of the squared distances.
        iterations: Lloyd steps taken.
        backend: "sklearn" or "cuml".
    """

    centres: NDArray[np.float32]
    labels: NDArray[np.int64]
    distances: NDArray[np.float32]
    inertia: float
    iterations: int
    backend: str


def num_clusters(num_samples: int, fraction: float) -> int:
    """Return C = max(1, round(fraction * N)), so that a small set has a cluster too."""
    return max(1, round(fraction * num_samples))


def choose_backend(backend: Backend) -> Literal["sklearn", "cuml"]:
    """Resolve "auto": cuML where a CUDA device and the package are present, else scikit-learn.

    Raises:
        UserError: cuML is asked for and cannot run here, or the name is unknown.
    """
    if backend not in ("auto", "sklearn", "cuml"):
        raise UserError(
            f"k-means backend '{backend}' is unknown; allowed are auto, sklearn and cuml; choose one of them"
        )
    if backend == "sklearn":
        return "sklearn"
    installed, device = importlib.util.find_spec("cuml") is not None, torch.cuda.is_available()
    if installed and device:
        return "cuml"
    if backend == "auto":
        return "sklearn"
    if not installed:
        raise UserError(
            "k-means backend 'cuml' was asked for, but the package cuml is not installed; allowed without it "
            "are auto and sklearn; to have it, type: pip install -e '.[gpu]'"
        )
    raise UserError(
        "k-means backend 'cuml' was asked for, but there is no CUDA device; allowed without one are auto and "
        "sklearn; choose one of them"
    )


def kmeans(
    x_ND: NDArray[np.float32] | Tensor,
    num_clusters: int,
    seed: int,
    *,
    backend: Backend = "auto",
    max_iter: int = 100,
) -> Clusters:
    """Cluster the rows of x: k-means++ (cuML: k-means||) once, then Lloyd steps until the centres rest.

    The same rows, seed and machine give the same result: on a CPU one thread does the arithmetic, because
    sums of several threads depend on the order in which they finish. Where fewer distinct rows than clusters
    exist, some clusters stay empty.

    Args:
        x_ND: fp32 [N, D], numpy or torch on any device.
        num_clusters: C, from 1 to N.
        seed: at least 0; its low 32 bits are used.
        backend: "auto", "sklearn" or "cuml", see `choose_backend`.
        max_iter: most Lloyd steps.

    Raises:
        ValueError: x is not fp32 [N, D] with finite values, or C is outside 1..N.
        UserError: the backend cannot run here.
    """
    chosen = choose_backend(backend)
    rows_ND = torch.as_tensor(x_ND).detach()
    if rows_ND.dim() != 2 or rows_ND.dtype != torch.float32:
        raise ValueError(
            f"kmeans: got {rows_ND.dtype} {tuple(rows_ND.shape)}; features are fp32 [N, D]; convert them"
        )
    if not 1 <= num_clusters <= len(rows_ND):
        raise ValueError(
            f"kmeans: {num_clusters} clusters of {len(rows_ND)} samples; allowed are 1 to {len(rows_ND)}; "
            "take fewer clusters or embed more samples"
        )
    if not bool(torch.isfinite(rows_ND).all()):
        bad = int((~torch.isfinite(rows_ND).all(dim=1)).nonzero()[0])
        raise ValueError(
            f"kmeans: row {bad} is not finite; features must be; look at that sample and the encoder"
        )
    fit = _fit_cuml if chosen == "cuml" else _fit_sklearn
    rows_ND, centres_CD, labels_N, iterations = fit(rows_ND, num_clusters, seed % 2**32, max_iter)

    distances_N = torch.cat(
        [
            torch.linalg.vector_norm(rows - centres_CD[labels], dim=1)
            for rows, labels in zip(torch.split(rows_ND, _ROWS), torch.split(labels_N, _ROWS), strict=True)
        ]
    )
    return Clusters(
        centres=centres_CD.cpu().numpy(),
        labels=labels_N.cpu().numpy(),
        distances=distances_N.cpu().numpy(),
        inertia=float(distances_N.double().square().sum()),
        iterations=iterations,
        backend=chosen,
    )


def _fit_sklearn(
    rows_ND: Tensor, num_clusters: int, seed: int, max_iter: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    rows_ND = rows_ND.cpu()
    model = KMeans(
        num_clusters, init="k-means++", n_init=1, max_iter=max_iter, random_state=seed, algorithm="lloyd"
    )
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # fewer distinct rows than clusters: documented above
        model.fit(rows_ND.numpy())
    labels_N = torch.from_numpy(model.labels_.astype(np.int64))
    return rows_ND, torch.from_numpy(model.cluster_centers_), labels_N, int(model.n_iter_)


def _fit_cuml(
    rows_ND: Tensor, num_clusters: int, seed: int, max_iter: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    import cupy
    from cuml.cluster import KMeans

    rows_ND = rows_ND.cuda().contiguous()
    model = KMeans(
        n_clusters=num_clusters,
        init="scalable-k-means++",
        n_init=1,  # said outright: cuML's own default is not one for every init
        max_iter=max_iter,
        random_state=seed,
        output_type="cupy",
    ).fit(cupy.from_dlpack(rows_ND))  # shared memory, no copy
    centres_CD = from_dlpack(model.cluster_centers_).contiguous()
    return rows_ND, centres_CD, from_dlpack(model.labels_).long(), int(model.n_iter_)


def nearest_of_each(
    labels_N: NDArray[np.int64],
    distances_N: NDArray[np.float32],
    keys_N: NDArray[np.bytes_],
    per_cluster: int = 5,
) -> NDArray[np.int64]:
    """Return the indices of the `per_cluster` samples nearest to each centre, by one sort.

    Ties in distance go to the smaller key, so the choice does not depend on the order of the samples. A key
    that comes twice (an epoch's last batch filled up, say) counts once. A cluster with fewer samples gives
    all it has.

    Args:
        labels_N: cluster of each sample.
        distances_N: distance of each sample to its centre.
        keys_N: the samples' keys, any sortable type.
        per_cluster: samples kept of a cluster.

    Returns:
        int64 [S], ordered by cluster, then distance, then key.
    """
    order_N = np.lexsort((keys_N, distances_N, labels_N))
    _, first = np.unique(keys_N[order_N], return_index=True)
    order_N = order_N[np.sort(first)]
    sorted_labels = labels_N[order_N]
    rank_N = np.arange(len(order_N)) - np.searchsorted(sorted_labels, sorted_labels, side="left")
    return order_N[rank_N < per_cluster]
