"""Weighted k-nearest-neighbour classification of features, as in InstDisc: no training, no parameters.

Legend: N train rows, M test rows, D dimensions, k neighbours, T temperature.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from linerate.shards.errors import UserError
from linerate.train.collectives import gather_rows, sum_over_ranks

# (1024, 65536) float32 similarities are 256 MiB: large enough to keep a device busy, small on any.
TEST_CHUNK = 1024
TRAIN_CHUNK = 65_536


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
) -> Tensor:
    """(M,) int64: the class for which the k nearest train rows vote with weight exp(cosine / T).

    train_features (N, D) and test_features (M, D) of any scale, train_labels (N,) int64 in
    0..num_classes-1. Works on the device of the train features in chunks; no N x M tensor exists.
    Raises UserError where the votes cannot be cast. Source: InstDisc 3.4, used by the paper's monitor.
    """
    _check(train_features, train_labels, test_features, k=k, num_classes=num_classes)
    device = train_features.device
    labels = train_labels.to(device)
    predictions = []
    for chunk in torch.split(test_features, TEST_CHUNK):
        query = functional.normalize(chunk.to(device).float(), dim=1)
        similarity, neighbour = nearest_rows(query, train_features, k=k)
        predictions.append(
            _vote(similarity, labels[neighbour], temperature=temperature, num_classes=num_classes)
        )
    return torch.cat(predictions)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
) -> float:
    """Share of the test rows, in [0, 1], whose class knn_predict finds; k is capped at N."""
    k = min(k, len(train_features))
    predicted = knn_predict(
        train_features, train_labels, test_features, k=k, temperature=temperature, num_classes=num_classes
    )
    return float((predicted == test_labels.to(predicted.device)).float().mean())


def knn_accuracy_over_ranks(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
    rank: int,
    world_size: int,
) -> float:
    """knn_accuracy of all ranks' rows, where each has a share of both sets; the same number on every rank.

    The train rows stay where they are: test rows travel in chunks, and each rank's k nearest come back.
    """
    if world_size == 1:
        return knn_accuracy(
            train_features,
            train_labels,
            test_features,
            test_labels,
            k=k,
            temperature=temperature,
            num_classes=num_classes,
        )
    _check(train_features, train_labels, test_features, k=1, num_classes=num_classes)
    device, dim = train_features.device, train_features.shape[1]
    num_train, num_test = (
        _of_all_ranks(len(rows), device, world_size) for rows in (train_features, test_features)
    )
    k = min(k, sum(num_train))
    labels, wanted = train_labels.to(device), test_labels.to(device)
    num_right = torch.zeros(1, dtype=torch.int64, device=device)
    for source in range(world_size):
        for start in range(0, num_test[source], TEST_CHUNK):
            own = slice(start, min(start + TEST_CHUNK, num_test[source]))
            query = torch.empty(own.stop - start, dim, device=device)
            if source == rank:
                query = functional.normalize(test_features[own].to(device).float(), dim=1)
            dist.broadcast(query, src=source)
            similarity, neighbour = nearest_rows(query, train_features, k=min(k, len(train_features)))
            missing = (0, k - similarity.shape[1])
            # Columns are gathered as rows. A rank with fewer than k rows fills up with votes of weight 0.
            similarity, label = (
                gather_rows(rows.T.contiguous(), world_size=world_size).T
                for rows in (
                    functional.pad(similarity, missing, value=-math.inf),
                    functional.pad(labels[neighbour], missing),
                )
            )
            if source == rank:
                best, kept = similarity.topk(k, dim=1)
                found = _vote(best, label.gather(1, kept), temperature=temperature, num_classes=num_classes)
                num_right += (found == wanted[own]).sum()
    return float(sum_over_ranks(num_right, world_size=world_size)) / sum(num_test)


def _of_all_ranks(num: int, device: torch.device, world_size: int) -> list[int]:
    gathered: list[int] = gather_rows(torch.tensor([num], device=device), world_size=world_size).tolist()
    return gathered


def _vote(similarity: Tensor, label: Tensor, *, temperature: float, num_classes: int) -> Tensor:
    """(M,) the class with the most votes of (M, k) neighbours."""
    # Less the nearest one's: the same vote, and no temperature is too small for exp.
    weight = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
    votes = similarity.new_zeros(len(similarity), num_classes)
    return votes.scatter_add_(1, label, weight).argmax(dim=1)


def nearest_rows(query: Tensor, bank: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """(M, k) largest cosines of unit query rows over the bank (N, D), and the rows they are of."""
    best = query.new_empty(len(query), 0)
    rows = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(bank), TRAIN_CHUNK):
        # Normalised chunk by chunk: a second copy of 1.28 M x 2048 features would cost 10 GB.
        part = query @ functional.normalize(bank[start : start + TRAIN_CHUNK].float(), dim=1).T
        value, index = part.topk(min(k, part.shape[1]), dim=1)
        best, rows = torch.cat([best, value], dim=1), torch.cat([rows, index + start], dim=1)
        if best.shape[1] > k:
            best, kept = best.topk(k, dim=1)
            rows = rows.gather(1, kept)
    return best, rows


def _check(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, *, k: int, num_classes: int
) -> None:
    if not len(train_features) or not len(test_features):
        raise UserError(
            f"kNN with {len(train_features)} train and {len(test_features)} test images has no answer; "
            "give both sets at least one labelled image"
        )
    if train_features.shape[1] != test_features.shape[1]:
        raise UserError(
            f"train features have {train_features.shape[1]} dimensions, test features "
            f"{test_features.shape[1]}; take both from one encoder"
        )
    if not 1 <= k <= len(train_features):
        raise UserError(f"k={k} neighbours of {len(train_features)} train images; give k between the two")
    low, high = int(train_labels.min()), int(train_labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"train labels span {low}..{high}, the classes are 0..{num_classes - 1}; "
            "pack images in class folders, or name labelled shards with --train and --test"
        )
