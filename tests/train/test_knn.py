import math

import pytest
import torch
from torch import Tensor

from linerate.shards.errors import UserError
from linerate.train.evaluate import knn
from linerate.train.evaluate.knn import knn_accuracy, knn_predict

RANKS_CASES = ((1, 0.1), (20, 0.07), (41, 1.0), (200, 0.1))
"""k and T of what tests.train.classifier_ranks does on two ranks."""


def blobs(n: int, *, seed: int, num_classes: int = 5, dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (n,), generator=generator)
    return centres[labels] + torch.randn(n, dim, generator=generator), labels


def _naive(
    train: Tensor, labels: Tensor, test: Tensor, *, k: int, temperature: float, classes: int
) -> list[int]:
    predictions = []
    for row in test:
        cosines = [float(row @ other / row.norm() / other.norm()) for other in train]
        votes = [0.0] * classes
        for i in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
            votes[int(labels[i])] += math.exp(cosines[i] / temperature)
        predictions.append(max(range(classes), key=votes.__getitem__))
    return predictions


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.07), (61, 1.0)])
def test_predictions_equal_the_naive_reference(
    k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, labels = blobs(61, seed=1)
    test, _ = blobs(23, seed=2)
    expected = _naive(train, labels, test, k=k, temperature=temperature, classes=5)
    for train_chunk in (65_536, 10, 3):
        monkeypatch.setattr(knn, "TRAIN_CHUNK", train_chunk)
        monkeypatch.setattr(knn, "TEST_CHUNK", 9)
        found = knn_predict(train, labels, test, k=k, temperature=temperature, num_classes=5)
        assert found.tolist() == expected


def test_accuracy_is_the_share_of_right_predictions_and_k_is_capped() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    test = torch.tensor([[2.0, 0.1], [0.1, 3.0], [1.0, 0.2], [0.9, 0.1]])
    accuracy = knn_accuracy(
        train, torch.tensor([0, 1]), test, torch.tensor([0, 1, 1, 0]), k=200, temperature=0.1, num_classes=2
    )
    assert accuracy == 0.75


def test_scale_of_the_features_does_not_matter() -> None:
    train, labels = blobs(40, seed=3)
    test, _ = blobs(11, seed=4)
    plain = knn_predict(train, labels, test, k=5, num_classes=5)
    scaled = knn_predict(train * torch.rand(40, 1).add(0.1), labels, test * 7, k=5, num_classes=5)
    assert torch.equal(plain, scaled)


def test_no_temperature_is_too_small_for_the_votes() -> None:
    """exp(1 / 0.001) is infinite: two classes would both have infinitely many votes."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    for row, label in ((torch.tensor([[0.9, 0.1]]), 2), (torch.tensor([[0.1, 0.9]]), 0)):
        found = knn_predict(train, torch.tensor([2, 1, 0]), row, k=3, temperature=1e-3, num_classes=3)
        assert found.tolist() == [label]


@pytest.mark.parametrize(
    ("num_train", "num_test", "label", "k", "dim", "message"),
    [
        (0, 1, 0, 1, 3, "0 train and 1 test images"),
        (2, 0, 0, 1, 3, "2 train and 0 test images"),
        (2, 2, 0, 3, 3, "k=3 neighbours of 2"),
        (2, 2, -1, 1, 3, r"span -1\.\.-1"),
        (2, 2, 7, 1, 3, r"the classes are 0\.\.1"),
        (2, 2, 0, 1, 4, "3 dimensions, test features 4"),
    ],
)
def test_what_has_no_answer_is_refused(
    num_train: int, num_test: int, label: int, k: int, dim: int, message: str
) -> None:
    labels = torch.full((num_train,), label)
    with pytest.raises(UserError, match=message):
        knn_predict(torch.ones(num_train, 3), labels, torch.ones(num_test, dim), k=k, num_classes=2)
