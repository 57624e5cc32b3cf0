import pytest
import torch
from torch import Tensor

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.config import Watch
from linerate.train.monitor import Stopwatch, open_monitor


class Clock:
    """Advances by what the test says."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_lap_tells_rate_and_share_of_waiting_without_pauses() -> None:
    clock = Clock()
    watch = Stopwatch(clock)

    for _ in range(2):
        with watch.waiting():
            clock.now_s += 1.0
        clock.now_s += 3.0
    with watch.paused():
        clock.now_s += 100.0
    assert watch.lap(images=64) == {"images_per_s": 8.0, "data_wait_share": 0.25}
    clock.now_s += 2.0
    assert watch.lap(images=64) == {"images_per_s": 32.0, "data_wait_share": 0.0}


def _texture(images: Tensor) -> Tensor:
    """Steps across and down, and their spread: enough to tell flat, lines and noise."""
    pixels = images.float()
    across = (pixels[..., 1:] - pixels[..., :-1]).abs().mean(dim=(1, 2, 3))
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return torch.stack([across, down], dim=1) + 1


def test_the_monitor_judges_an_encoder_on_its_split(shards: Catalog, test_shards: Catalog) -> None:
    watch = Watch(knn_epochs=1, knn_test=str(test_shards.root), knn_k=5)
    monitor, reason = open_monitor(watch, shards, size=24, device="cpu", num_threads=1)
    assert reason is None
    assert monitor is not None
    found = monitor.judge(_texture)
    assert (found["num_train"], found["num_test"]) == (72, 30)
    assert found["knn_top1"] > 0.9


def test_no_epochs_no_monitor(shards: Catalog) -> None:
    assert open_monitor(Watch(), shards, size=24, device="cpu", num_threads=1) == (None, None)


def test_unlabelled_training_shards_only_switch_it_off(unlabelled_shards: Catalog) -> None:
    monitor, reason = open_monitor(
        Watch(knn_epochs=1), unlabelled_shards, size=24, device="cpu", num_threads=1
    )
    assert monitor is None
    assert reason is not None
    assert reason.startswith("no kNN monitor: ")


def test_shards_named_for_the_monitor_must_have_labels(shards: Catalog, unlabelled_shards: Catalog) -> None:
    watch = Watch(knn_epochs=1, knn_train=str(unlabelled_shards.root))
    with pytest.raises(UserError, match="has no labels"):
        open_monitor(watch, shards, size=24, device="cpu", num_threads=1)
