import mmap

import pytest

from linerate.bench.suites import views_memory
from linerate.bench.suites.views_memory import MAX_GROWTH, Rounds, run_epochs, run_in_child, status_bytes


def test_peaks_of_later_epochs_rise_by_less_than_2_percent_and_stay_below_what_was_foreseen() -> None:
    """Tiny images, then huge ones among odd sizes; from the second epoch on in any order.

    Peaks are the kernel's own: of every moment, not of the ends of batches. An epoch has each kind of batch
    twice in a row, so that the first one meets the worst pair of neighbours too. In a process of its own,
    because what other tests left free in this one's heaps could hide a growth.
    """
    rounds = Rounds(side=900, rank_batch=8, epochs=5, repeat=2, num_threads=2, size=64)
    found = run_in_child(rounds)
    assert len(found.peak) == rounds.epochs
    assert found.growth < MAX_GROWTH
    # This process has imported more than a rank does: the loader's own part is compared.
    own = found.predicted["total"] - found.predicted["libraries"]
    assert max(found.peak) - found.before < own


def test_a_loader_that_keeps_2_percent_of_the_memory_an_epoch_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = []
    for_epoch = views_memory._SizeOrder.for_epoch

    def leak(order: views_memory._SizeOrder, epoch: int) -> views_memory._SizeOrder:
        num_bytes = int(MAX_GROWTH * status_bytes("VmRSS"))
        kept.append(mmap.mmap(-1, num_bytes))
        kept[-1].write(b"x" * num_bytes)
        return for_epoch(order, epoch)

    monkeypatch.setattr(views_memory._SizeOrder, "for_epoch", leak)
    rounds = Rounds(side=48, rank_batch=2, epochs=4, repeat=1, num_threads=1, size=32)
    assert run_epochs(rounds).growth > MAX_GROWTH
    assert len(kept) == rounds.epochs
