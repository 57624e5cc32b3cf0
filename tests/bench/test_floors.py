"""A step counted on shapes alone, against formulas by hand."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from linerate.bench import ceilings, cli, floors
from linerate.bench.floors import PassCounter, StepWork, count_config, count_step, forward_flops
from linerate.bench.suites.step import our_step
from linerate.bench.suites.step_start import start
from linerate.shards.errors import UserError
from linerate.train.config import TrainConfig
from linerate.train.encoder import build_encoder
from linerate.train.recipes import find_recipe

WORK = StepWork(
    pairs=2,
    flops=6 * 10**9,
    eager_bytes=5 * 10**8,
    bn_relu_bytes=4 * 10**8,
    bn_relu_add_bytes=3 * 10**8,
    conv_bn_bytes=2 * 10**8,
)
# Pairs/s of one H200 at 4,300 GB/s and 790 TFLOP/s, as they were reckoned by hand: arithmetic; every
# operation a kernel of its own; BN + ReLU fused, and with the residual sum; convolution and BN fused.
BY_HAND = (24_300, 5_930, 7_200, 7_700, 9_750)


def test_the_flops_of_a_small_network_are_those_of_the_formula() -> None:
    side = 16
    with torch.device("meta"):
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )
    multiply_adds = 9 * 3 * 8 * side**2 + 9 * 8 * 16 * (side // 2) ** 2 + 16 * 4
    assert forward_flops(network, size=side) == 2 * multiply_adds


def test_resnet50_is_4_09_billion_multiply_adds_at_224_pixels() -> None:
    with torch.device("meta"):
        encoder = build_encoder("resnet50", dim=128)
    assert round(forward_flops(encoder, size=224) / 2e9, 2) == 4.09


def test_a_step_is_four_forward_passes_less_the_gradient_of_the_pixels_and_the_loss() -> None:
    name, size, batch, num_keys, dim = "tiny-resnet-w4", 16, 8, 64, 128
    ours = our_step(*start(name, num_keys=num_keys))
    work = count_step(ours.moco, ours.optimizer, batch=batch, size=size, narrow=None)
    with torch.device("meta"):
        encoder = build_encoder(name, dim=dim, stem="cifar")
    stem = 2 * 9 * 3 * 4 * size**2
    logits_and_their_gradient = 2 * 2 * num_keys * dim
    a_pair = 4 * forward_flops(encoder, size=size) - stem + logits_and_their_gradient
    assert work.flops == batch * a_pair


def test_bytes_are_those_that_the_kernels_of_a_block_read_and_write() -> None:
    values, channels = 4 * 2 * 3 * 3, 2
    block = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    images = torch.randn(4, channels, 3, 3, requires_grad=True)
    shortcut = torch.randn(4, channels, 3, 3)
    with PassCounter() as forward:
        out = block(images) + shortcut
    # BatchNorm reads twice and writes; scale, shift, running mean and variance in, mean and deviation out.
    # ReLU reads and writes, the sum reads two and writes one. One counter for the batches seen.
    parameters = 6 * channels * 4
    assert forward.eager == 4 * values * (3 + 2 + 3) + parameters + 2 * 8
    assert forward.eager - forward.bn_relu == 4 * values * 2
    assert forward.bn_relu - forward.bn_relu_add == 4 * values * 2
    assert forward.bn_relu - forward.conv_bn == 4 * values * 3 + parameters
    with PassCounter() as backward:
        backward.backward(out.mean())
    # ReLU's backward reads gradient and output and writes; fused, BN's two passes each read the output.
    assert backward.eager - backward.bn_relu == 4 * values * (3 - 2)
    # BN's backward reads gradient and input once more than its operands say.
    assert backward.eager - backward.num_bytes == 4 * values * 2


def test_a_convolutions_backward_reads_its_gradient_twice() -> None:
    conv = nn.Conv2d(2, 3, 1, bias=False)
    images = torch.randn(4, 2, 5, 5, requires_grad=True)
    loss = conv(images).sum()
    with PassCounter() as counter:
        counter.backward(loss)
    gradient, pixels, weight = 4 * 4 * 3 * 25, 4 * 4 * 2 * 25, 4 * 3 * 2
    # In: gradient, images, weight; out: gradients of both.
    once = gradient + 2 * pixels + 2 * weight
    assert counter.ops["convolution_backward"] == 1
    assert counter.eager - counter.num_bytes == gradient
    assert counter.num_bytes >= once


@pytest.fixture(scope="module")
def resnet50() -> StepWork:
    """The step of the bars: 224 pixels, batch 256, K 65536, bf16."""
    ours = our_step(*start("resnet50", num_keys=65536))
    return count_step(ours.moco, ours.optimizer, batch=256, size=224, narrow=torch.bfloat16)


def test_the_bytes_and_flops_of_resnet50s_step_do_not_rise(resnet50: StepWork) -> None:
    """Where they fall, or must rise for a good reason, change the numbers here and say why in the commit."""
    assert resnet50.flops == 8_319_158_714_368
    assert resnet50.eager_bytes == 173_242_781_936


def test_the_floors_of_an_h200_lie_near_those_reckoned_by_hand(resnet50: StepWork) -> None:
    rates = {one.name: one.pairs_per_s for one in resnet50.floors(gb_per_s=4300, tflops=790)}
    found = [
        rates["arithmetic"],
        rates["eager bytes"],
        rates["bytes, BN + ReLU fused"],
        rates["bytes, BN + ReLU + add fused"],
        rates["bytes, conv + BN fused"],
    ]
    assert found[0] == pytest.approx(BY_HAND[0], rel=1e-3)
    assert found[1:] == pytest.approx(BY_HAND[1:], rel=0.08)


def test_ranks_share_the_batch_of_a_recipe() -> None:
    demo = find_recipe("demo").build()
    tiny = dataclasses.replace(demo, model=dataclasses.replace(demo.model, encoder="tiny-resnet-w4"))
    # A micro-batch computes what the batch does.
    in_parts = dataclasses.replace(tiny, speed=dataclasses.replace(tiny.speed, micro_batch=32))
    whole, half = count_config(in_parts), count_config(tiny, world_size=2)
    assert (whole.pairs, half.pairs) == (64, 32)
    assert half.flops * 2 == whole.flops
    assert whole.conv_bn_bytes is not None


def test_a_network_without_bn_has_no_floor_of_it() -> None:
    work = dataclasses.replace(WORK, conv_bn_bytes=None)
    names = [one.name for one in work.floors(gb_per_s=1, tflops=1)]
    assert names == [
        "eager bytes",
        "bytes, activations fused",
        "bytes, activations + add fused",
        "arithmetic",
    ]


def test_the_command_prints_the_floors_at_the_ceilings_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def count(config: TrainConfig, *, world_size: int) -> StepWork:
        counted.append((config.model.encoder, world_size))
        return WORK

    monkeypatch.setattr(floors, "count_config", count)
    words = ["floors", "demo", "--encoder", "resnet18", "--gb-per-s", "10", "--tflops", "0.1", "--ranks", "2"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["work"]["flops"] == WORK.flops
    assert found["ceilings"] == {"gb_per_s": 10, "tflops": 0.1}
    assert found["floors"]["arithmetic"] == pytest.approx({"seconds": 6e9 / 1e11, "pairs_per_s": 2 / 0.06})
    assert found["floors"]["eager bytes"] == pytest.approx({"seconds": 0.05, "pairs_per_s": 40})
    assert cli.main(words) == 0
    assert "BN + ReLU + add" in capsys.readouterr().out
    assert counted == [("resnet18", 2)] * 2


def test_without_ceilings_the_machines_own_are_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "count_config", lambda config, *, world_size: WORK)
    monkeypatch.setattr(ceilings, "measure_machine", lambda device, dtype: (7.0, 0.5))
    assert cli.main(["floors", "demo", "--tflops", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ceilings"] == {"gb_per_s": 7.0, "tflops": 2.0}


@pytest.mark.parametrize("words", [["--gb-per-s", "0"], ["--tflops", "-1"], ["--gb-per-s", "inf"]])
def test_a_ceiling_of_nothing_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="must be above 0 and finite; an H200's are 4300"):
        cli.main(["floors", "demo", *words])
