import torch
from tests.train.small import SMALL
from torch import nn

from linerate.train.evaluate.controls import calibrate_bn, untrained_encoder
from linerate.train.learner import build_moco


def test_bn_statistics_become_the_mean_over_the_batches() -> None:
    norm = nn.BatchNorm2d(2)
    batches = [torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(i)) * 3 + i for i in (1, 2)]
    calibrate_bn(norm, batches)
    means = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in batches])
    variances = torch.stack([batch.var(dim=(0, 2, 3)) for batch in batches])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, means.mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, variances.mean(0), atol=1e-5)
    assert norm.momentum == 0.1
    assert not norm.training


def test_the_untrained_encoder_is_the_one_that_the_run_began_with() -> None:
    state = torch.get_rng_state()
    untrained = untrained_encoder(SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    began = build_moco(SMALL).query_encoder.state_dict()
    for name, tensor in untrained.state_dict().items():
        assert torch.equal(tensor, began[name]), name
