"""Documents to clusters, each of which an expert can learn.

k-means on the mean embeddings of the documents, as c-BTM clusters its corpus (https://huggingface.co/papers/2303.14177),
with the base's input embeddings in place of tf-idf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..data.documents import Document
from ..errors import UsageError
from ..mixture.model import Mixture
from ..mixture.router import normalised

MOST_TOKENS = 4096  # of a document, for its mean
ROUNDS = 50


@dataclass(frozen=True)
class Clusters:
    """Divides data sets so that there are as many parts as experts (`data.blocks.load_blocks`).

    Args:
        model: the mixture, for the input embeddings of its base.
        count: the number of parts; larger data sets, in tokens, are divided into more.
        seed: of the first centres.
    """

    model: Mixture
    count: int
    seed: int

    def __call__(self, sources: list[str], data: list[list[Document]]) -> list[list[int]]:
        """Return the label of each document.

        Raises:
            UsageError: if a data set has too few different documents.
        """
        parts = shares([sum(map(len, documents)) for documents in data], self.count)
        labels = []
        for source, documents, k in zip(sources, data, parts, strict=True):
            means = torch.stack([self._mean(document.ids) for document in documents])  # (documents, D)
            if k > len(means.unique(dim=0)):
                raise UsageError(
                    f"{source}: has {len(means.unique(dim=0))} different documents, which cannot be divided among {k} "
                    "experts; leave --experts out, or give a smaller number"
                )
            labels.append(k_means(means, k, self.seed))
        return labels

    @torch.no_grad()
    def _mean(self, ids: np.ndarray) -> torch.Tensor:
        table = self.model.get_input_embeddings()
        device = next(table.parameters()).device
        return normalised(table(torch.as_tensor(ids[:MOST_TOKENS], dtype=torch.int64, device=device))).mean(0).cpu()


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """Divide `count` parts among data sets: one each, and each further one where the parts are largest."""
    parts = [1] * len(sizes)
    for _ in range(count - len(sizes)):
        largest = max(range(len(sizes)), key=lambda i: (sizes[i] / parts[i], -i))
        parts[largest] += 1
    return parts


def k_means(points: torch.Tensor, k: int, seed: int) -> list[int]:
    """Cluster points (n, D) by their directions from the mean of all; the label of each, 0 to k - 1.

    The first centres are drawn by k-means++ (https://dl.acm.org/doi/10.5555/1283383.1283494).
    """
    if k == 1:
        return [0] * len(points)
    points = F.normalize(points.double() - points.double().mean(0), dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < k:
        distances = torch.cdist(points, centres).min(1).values.square() + 1e-12
        centres = torch.cat([centres, points[torch.multinomial(distances, 1, generator=generator)]])
    labels = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(ROUNDS):
        distances = torch.cdist(points, centres)  # (n, k)
        found = distances.argmin(1)
        for label in set(range(k)) - set(found.tolist()):  # an empty cluster begins again at the farthest point
            farthest = distances.gather(1, found.unsqueeze(1)).squeeze(1).argmax()
            found[farthest] = label
            distances[farthest, label] = 0
        if found.equal(labels):
            break
        labels = found
        centres = torch.stack([points[labels == label].mean(0) for label in range(k)])
    return labels.tolist()
