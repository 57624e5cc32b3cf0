import pytest
import torch

from linerate.train.ema import ema_update, parameter_list


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
