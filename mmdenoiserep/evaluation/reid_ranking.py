"""Ranks a gallery for queries: cumulative matching (CMC), average precision and inverse negative penalty."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**22
"""Number of distances to sort at a time; sorting needs about 25 bytes for each."""


@dataclass(frozen=True)
class Ranking:
    """Ranking of a gallery for the V queries that have a match in it.

    Attributes:
        queries: Indices of the queries with a match, (V,), int64, ascending.
        average_precision: Average precision, (V,), float64.
        first_rank: Rank of the nearest match, (V,), int64, counted from 1.
        inverse_penalty: Number of matches over the rank of the farthest match, (V,), float64.
        nearest: Indices of the nearest gallery images, (V, N), int64, nearest first.
        distances: Squared distances of the nearest gallery images, (V, N); infinite beyond the images that remain for
            the query.
    """

    queries: Tensor
    average_precision: Tensor
    first_rank: Tensor
    inverse_penalty: Tensor
    nearest: Tensor
    distances: Tensor

    def metrics(self, topk: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """Returns ``mAP``, ``rank<k>`` for every k, and ``mINP``: means over the V queries, between 0 and 1."""
        cmc = {f'rank{k}': (self.first_rank <= k).double().mean().item() for k in topk}
        return dict(mAP=self.average_precision.mean().item(), **cmc, mINP=self.inverse_penalty.mean().item())


@torch.no_grad()
def rank_matches(
    query: Tensor,
    gallery: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor,
    gallery_camids: Tensor,
    num_nearest: int = 0,
    chunk_size: int | None = None,
) -> Ranking:
    """Ranks the gallery for each query by squared Euclidean distance, with the protocol of Market-1501.

    Gallery images with both the identity and the camera of the query are removed (Zheng et al., ICCV 2015). The matches
    are the remaining images with its identity; queries without a match are left out. With the ranks
    ``r_1 < ... < r_P`` of the P matches,

        ``AP = 1/P sum_n n / r_n``,   ``CMC(k) = 1 if r_1 <= k else 0``,   ``INP = P / r_P``

    where INP is the inverse negative penalty (Ye et al., arXiv 2001.04193). Equal distances rank in the order of the
    gallery. The computation runs in chunks, on the device and in the dtype of the features, but at least in float32.

    Args:
        query: Features of the queries, (Q, C), finite.
        gallery: Features of the gallery, (G, C), finite.
        query_pids: Identities of the queries, (Q,), integers.
        gallery_pids: Identities of the gallery, (G,), integers.
        query_camids: Cameras of the queries, (Q,), integers.
        gallery_camids: Cameras of the gallery, (G,), integers.
        num_nearest: N, the number of nearest images to return, at most G.
        chunk_size: Number of queries in a chunk; None takes as many as give :data:`CHUNK` distances.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, gallery = query.to(dtype), gallery.to(dtype)
    norms = gallery.square().sum(1)
    indices = torch.arange(len(query), device=query.device)
    # allocated first: small results between the large temporary ones would keep the heap from shrinking
    scores = torch.zeros((3, len(query)), dtype=torch.float64, device=query.device)
    nearest = indices.new_empty((len(query), min(num_nearest, len(gallery))))
    smallest = query.new_empty(nearest.shape)
    for chunk in indices.split(chunk_size or max(1, CHUNK // max(1, len(gallery)))):
        features = query[chunk]
        with torch.autocast(query.device.type, enabled=False):
            distances = torch.addmm(norms, features, gallery.T, alpha=-2)
        distances += features.square().sum(1, keepdim=True)
        matches = query_pids[chunk, None] == gallery_pids
        removed = matches & (query_camids[chunk, None] == gallery_camids)
        distances, order = distances.masked_fill_(removed, torch.inf).sort(dim=1, stable=True)
        hits = (matches & ~removed).gather(1, order)
        valid = hits.any(1)
        scores[:, chunk[valid]] = _scores(hits[valid])
        nearest[chunk], smallest[chunk] = order[:, : nearest.shape[1]], distances[:, : nearest.shape[1]]
    queries = scores[0].nonzero().squeeze(1)
    precision, first, inverse = scores[:, queries]
    return Ranking(queries, precision, first.long(), inverse, nearest[queries], smallest[queries].clamp_min(0))


def _scores(hits: Tensor) -> Tensor:
    """Returns AP, first rank and INP, (3, V), float64, of ranked matches, (V, G), bool, at least one in each row."""
    rows, columns = hits.nonzero(as_tuple=True)  # row by row, so the ranks of a query are adjacent
    ranks, count = columns + 1, hits.sum(1)
    end = count.cumsum(0)
    start = end - count
    number = torch.arange(len(ranks), device=hits.device) - start[rows] + 1
    precision = torch.zeros(len(count), dtype=torch.float64, device=hits.device)
    precision.index_add_(0, rows, number.double() / ranks)
    return torch.stack([precision / count, ranks[start].double(), count.double() / ranks[end - 1]])
