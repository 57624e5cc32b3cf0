from linerate.bench.suites.views_memory import Rounds, run_epochs


def test_epochs_of_the_worst_size_order_do_not_pile_up_and_stay_below_what_was_foreseen() -> None:
    """Tiny images, then huge ones among odd sizes.

    The allocator's holes move what is resident at the end of an epoch by up to 8 % either way, without a
    trend: four epochs that kept a third of their images each would lie above. The benchmark's bar is 2 %.
    """
    rounds = Rounds(side=900, rank_batch=8, epochs=5, repeat=2, num_threads=2, size=64)
    decoded_bytes = rounds.repeat * sum(3 * height * width for one in rounds.kinds for height, width in one)
    found = run_epochs(rounds)
    assert min(found.rss[-2:]) - found.rss[0] < decoded_bytes
    # This process has imported more than a rank does: the loader's own part is compared.
    own = found.predicted["total"] - found.predicted["libraries"]
    assert max(found.peak) - found.before < own
