import copy

import pytest
import torch
from torch import Tensor, nn

from linerate.train.ema import FlatEma, ema_update, parameter_list


def test_each_parameter_moves_by_the_momentum_rule() -> None:
    key, query = [torch.tensor([1.0, 2.0]), torch.zeros(2, 2)], [torch.tensor([3.0, 0.0]), torch.ones(2, 2)]
    expected = [0.9 * k + 0.1 * q for k, q in zip(key, query, strict=True)]
    ema_update(key, query, ema_momentum=0.9)
    torch.testing.assert_close(key, expected)


def test_queries_stay_and_storage_is_kept() -> None:
    key, query = [torch.zeros(3)], [torch.ones(3)]
    place = key[0].data_ptr()
    ema_update(key, query, ema_momentum=0.0)
    assert key[0].tolist() == query[0].tolist() == [1.0, 1.0, 1.0]
    assert key[0].data_ptr() == place


def test_a_thousandth_of_the_difference_is_not_lost() -> None:
    key, query = [torch.ones(1)], [torch.full((1,), 1.0 + 1e-3)]
    ema_update(key, query, ema_momentum=0.999)
    assert key[0].item() == pytest.approx(1.0 + 1e-6, abs=1e-7)
    with pytest.raises(ValueError, match=r"torch.bfloat16 would lose steps"):
        parameter_list([torch.ones(1, dtype=torch.bfloat16)])


def two_encoders() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    query = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3))
    query.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    key = copy.deepcopy(query).requires_grad_(False)
    with torch.no_grad():
        for param in key.parameters():
            param.normal_()
    return query, key


def num_operations(run: object) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()  # type: ignore[operator]
    return sum(event.key in ("aten::lerp_", "aten::_foreach_lerp_") for event in profile.events())


def test_flat_parameters_keep_objects_values_and_strides_and_move_in_one_lerp() -> None:
    query, key = two_encoders()
    lists = [list(module.parameters()) for module in (key, query)]
    before = copy.deepcopy(lists)
    ema = FlatEma(*lists)
    for params, earlier, module in zip(lists, before, (key, query), strict=True):
        for param, old, now in zip(params, earlier, module.parameters(), strict=True):
            assert param is now
            assert torch.equal(param, old)
            assert param.stride() == old.stride()
            assert param.data_ptr() % 16 == 0
        assert len({param.untyped_storage().data_ptr() for param in params}) == 1
    ema_update(before[0], before[1], ema_momentum=0.9)
    assert num_operations(lambda: ema.update(ema_momentum=0.9)) == 1
    torch.testing.assert_close(lists[0], before[0])
    torch.testing.assert_close(lists[1], before[1])


def moved(query: nn.Module, key: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    return list(key.parameters()), list(query.parameters())


def test_parameters_that_left_their_run_or_never_lay_flat_still_move() -> None:
    query, key = two_encoders()
    ema = FlatEma(*moved(query, key))
    # As module.to() does: the same objects on a new storage.
    for param in query.parameters():
        param.data = param.detach().clone() + 1.0
    unlike_query, unlike_key = two_encoders()
    unlike_key.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    mixed_query, mixed_key = (module.append(nn.Linear(2, 2).double()) for module in two_encoders())
    for pair, update in (
        ((query, key), ema),
        ((unlike_query, unlike_key), FlatEma(*moved(unlike_query, unlike_key))),
        ((mixed_query, mixed_key), FlatEma(*moved(mixed_query, mixed_key))),
    ):
        keys, queries = moved(*pair)
        expected = [k.detach().clone() for k in keys]
        ema_update(expected, [q.detach() for q in queries], ema_momentum=0.9)
        update.update(ema_momentum=0.9)
        torch.testing.assert_close([k.detach() for k in keys], expected)
