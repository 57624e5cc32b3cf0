import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from linerate.shards.errors import UserError
from linerate.train.key_queue import KeyQueue

KERNELS = ["arange", "add_", "remainder_", "index_copy_", "add_"]


def numbered(first: int, num: int) -> Tensor:
    return torch.arange(first, first + num, dtype=torch.float32)[:, None]


def test_enqueue_drops_exactly_the_oldest_keys() -> None:
    queue = KeyQueue(6, 1)
    for first in (0, 2, 4, 6):
        queue.enqueue(numbered(first, 2))
    assert sorted(queue.keys.flatten().tolist()) == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("num_keys", "num_new"), [(7, 3), (5, 5), (4, 6), (3, 11), (1, 2), (8, 1)])
def test_any_number_of_keys_wraps_as_a_deque_does(num_keys: int, num_new: int) -> None:
    queue = KeyQueue(num_keys, 1)
    for turn in range(9):
        queue.enqueue(numbered(turn * num_new, num_new))
    last = 9 * num_new
    rows = [0.0] * num_keys
    for number in range(last):
        rows[number % num_keys] = float(number)
    assert queue.keys.flatten().tolist() == rows
    assert int(queue.pointer) == last % num_keys


def test_rows_start_as_random_unit_vectors_that_the_generator_fixes() -> None:
    one, two = (KeyQueue(50, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(one.keys.norm(dim=1), torch.ones(50))
    assert torch.equal(one.keys, two.keys)
    assert not torch.equal(one.keys[0], one.keys[1])


def test_state_restores_keys_and_pointer() -> None:
    queue, other = KeyQueue(5, 2), KeyQueue(5, 2)
    queue.enqueue(torch.ones(3, 2))
    other.load_state_dict({name: value.clone() for name, value in queue.state_dict().items()})
    for each in (queue, other):
        each.enqueue(torch.zeros(3, 2))
    assert torch.equal(queue.keys, other.keys)
    assert int(other.pointer) == 1


def test_fill_and_age_tell_keys_from_random_rows() -> None:
    queue = KeyQueue(5, 1)
    queue.enqueue(numbered(0, 3))
    assert int(queue.num_filled()) == 3
    assert queue.ages().tolist() == [2, 1, 0, -1, -1]
    queue.enqueue(numbered(3, 4))
    assert int(queue.num_filled()) == 5
    assert queue.ages().tolist() == [1, 0, 4, 3, 2]


@pytest.mark.parametrize(
    ("num_keys", "num_new", "steps", "fill", "age"),
    [(10, 3, 0, 0.0, 0), (10, 3, 1, 0.3, 0), (10, 3, 3, 0.9, 2), (10, 3, 4, 1.0, 3), (4, 9, 2, 1.0, 0)],
)
def test_stats_are_the_share_of_real_keys_and_the_steps_since_the_oldest_came(
    num_keys: int, num_new: int, steps: int, fill: float, age: int
) -> None:
    queue = KeyQueue(num_keys, 1)
    written: dict[int, int] = {}
    for step in range(steps):
        queue.enqueue(numbered(step * num_new, num_new))
        written |= {number: step for number in range(step * num_new, (step + 1) * num_new)}
    stats = queue.stats()
    assert stats["queue_fill"].item() == pytest.approx(fill)
    assert stats["queue_age_steps"].item() == age
    if steps:
        real = queue.keys.flatten().tolist()[: min(num_keys, steps * num_new)]
        assert steps - 1 - min(written[int(number)] for number in real) == age


def test_bfloat16_queue_rounds_keys_and_nothing_else() -> None:
    queue = KeyQueue(4, 2, dtype=torch.bfloat16)
    queue.enqueue(torch.full((2, 2), 1 / 3))
    assert queue.keys.dtype == torch.bfloat16
    assert queue.keys[0, 0].item() == torch.tensor(1 / 3).bfloat16().item()


def test_enqueue_never_copies_the_queue_nor_reads_the_device() -> None:
    num_keys = 10_000

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(func.name())
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and func.name() != "aten::index_copy_":
                sizes.append(result.numel())
            return result

    names: list[str] = []
    sizes: list[int] = []
    queue = KeyQueue(num_keys, 4)
    with FakeTensorMode(allow_non_fake_inputs=True), Watch():
        # Fake tensors have no values: reading one would raise.
        queue.enqueue(torch.empty(32, 4))
    assert max(sizes) <= 32 * 4
    assert "aten::_local_scalar_dense" not in names
    short = [name.removeprefix("aten::").partition(".")[0] for name in names]
    assert [name for name in short if name in KERNELS] == KERNELS


def test_a_queue_without_rows_is_refused() -> None:
    with pytest.raises(UserError, match="num_keys=0 and dim=4 must both be at least 1"):
        KeyQueue(0, 4)
