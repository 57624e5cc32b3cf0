import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from linerate.bench.counting import OpCounter
from linerate.bench.suites import shuffle_bn
from linerate.train.collectives import exchange_rows, gather_rows


def test_views_and_detach_are_not_operations():
    x = torch.ones(4, 4)
    with OpCounter() as counter:
        y = x.t().t()[1:].detach() + 1
        y.view(3, 4).mul_(2)
    assert dict(counter.ops) == {"add": 1, "mul_": 1}


def test_reads_back_to_the_host_are_syncs():
    x = torch.ones(3)
    with OpCounter() as counter:
        int(x.sum())
        bool((x > 0).all())
    assert counter.num_syncs == 2


def test_only_new_tensors_of_the_size_count_as_copies():
    queue = torch.zeros(10, 2)
    with OpCounter(large_numel=20) as counter:
        queue[2:4] = 1.0
        queue.add_(1)
        queue.clone()
        queue.t().contiguous()
    assert counter.num_large == 2


def test_peak_bytes_follow_what_is_alive():
    x = torch.ones(1000)
    with OpCounter() as counter:
        for _ in range(5):
            y = x + 1
            del y
    assert counter.peak_bytes == 4000


def test_the_backward_pass_is_counted():
    x = torch.ones(3, 3, requires_grad=True)
    loss = (x @ x).sum()
    with OpCounter() as counter:
        loss.backward()
    assert counter.ops["mm"] == 2


def test_an_operator_of_ours_is_one_or_what_it_does_inside():
    name = "linerate_tests::twice_and_one"
    operator = torch.library.custom_op(name, mutates_args=())(_twice_and_one)
    operator.register_fake(torch.empty_like)
    for trace in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with trace:
            x = torch.ones(10)
            with OpCounter() as closed:
                operator(x)
            with OpCounter(open_operators=True) as opened:
                operator(x)
        assert dict(closed.ops) == {"twice_and_one": 1}
        assert dict(opened.ops) == {"mul": 1, "add": 1}


def _twice_and_one(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def test_a_read_back_in_a_trace_is_counted_and_gives_zero():
    with FakeTensorMode(), OpCounter() as counter:
        assert int(torch.ones(3).sum()) == 0
    assert counter.num_syncs == 1


def test_collectives_are_counted_with_what_they_fill():
    with shuffle_bn.fake_ranks(4), OpCounter() as counter:
        gather_rows(torch.zeros(2, 3), world_size=4)
        exchange_rows(torch.zeros(8, 3), send=[2] * 4, receive=[2] * 4)
    assert (counter.num_collectives, counter.collective_bytes) == (2, 4 * (4 * 2 * 3 + 8 * 3))
