from linerate.bench.suites.views_memory import MAX_GROWTH, Rounds, run_epochs


def test_three_epochs_of_the_worst_size_order_do_not_grow_and_stay_below_what_was_foreseen() -> None:
    """Tiny images, then huge ones among odd sizes: what an epoch leaves behind is what the first one left."""
    found = run_epochs(Rounds(side=900, rank_batch=8, epochs=4, repeat=2, num_threads=2, size=64))
    assert found.growth < MAX_GROWTH
    # This process has imported more than a rank does: the loader's own part is compared.
    own = found.predicted["total"] - found.predicted["libraries"]
    assert max(found.peak) - found.before < own
