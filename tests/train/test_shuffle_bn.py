import copy
from pathlib import Path

import pytest
import torch
from tests.train.rank_server import RankServer
from torch import Tensor, nn

from linerate.shards.errors import UserError
from linerate.train.encoder import build_encoder
from linerate.train.shuffle_bn import (
    KeyShuffle,
    bn_modules,
    encode_by_group,
    running_shares,
    set_bn_group,
)


def pixels(num: int, *, seed: int = 0, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (num, size, size, 3), dtype=torch.uint8, generator=generator)
    return image.permute(0, 3, 1, 2)


def tiny(bn_group: int | None) -> nn.Module:
    torch.manual_seed(0)
    encoder = build_encoder("tiny-resnet-w4", dim=8, stem="cifar").double()
    set_bn_group(encoder, bn_group)
    return encoder


def buffers(encoder: nn.Module) -> list[Tensor]:
    return [b for m in bn_modules(encoder) for b in (m.running_mean, m.running_var) if b is not None]


@pytest.mark.parametrize("bn_group", [2, 4, 12])
def test_one_forward_equals_one_forward_per_group(bn_group: int) -> None:
    images = pixels(12)
    one, each = tiny(bn_group), tiny(None)
    outputs = one(images), encode_by_group(each, images, bn_group=bn_group)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for mine, other in zip(one.parameters(), each.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(buffers(one), buffers(each))


def test_a_group_s_output_depends_on_its_own_images_only() -> None:
    encoder, images = tiny(4), pixels(8)
    changed = torch.cat([images[:4], pixels(4, seed=9)])
    one, two = encoder(images), encoder(changed)
    torch.testing.assert_close(one[:4], two[:4])
    assert not torch.allclose(one[4:], two[4:])


def test_running_statistics_are_the_mean_over_groups_of_torch_s_own() -> None:
    images, alone = pixels(12), []
    for group in images.split(4):
        encoder = tiny(None)
        encoder(group)
        alone.append(buffers(encoder))
    grouped = tiny(4)
    grouped(images)
    # The first BN alone sees the same input in both; deeper ones too, since groups never mix.
    expected = [torch.stack(same).mean(0) for same in zip(*alone, strict=True)]
    torch.testing.assert_close(buffers(grouped), expected)


def test_every_group_weighs_the_same_in_the_running_statistics() -> None:
    shares = [s for part in range(3) for s in running_shares(0.1, part=part, parts=3, groups=2)]
    kept = 1.0
    weights = []
    for share in reversed(shares):
        weights.append(kept * share)
        kept *= 1 - share
    assert kept == pytest.approx(0.9)
    assert weights == pytest.approx([0.1 / 6] * 6)
    assert running_shares(0.1, part=0, parts=1, groups=1) == [0.1]


def test_names_and_parameters_stay_and_evaluation_is_torch_s() -> None:
    torch.manual_seed(0)
    plain = build_encoder("tiny-resnet-w4", stem="cifar").eval()
    grouped = copy.deepcopy(plain)
    set_bn_group(grouped, 2)
    assert list(grouped.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(grouped(pixels(3)), plain(pixels(3)))


def test_timm_s_bn_with_activation_is_grouped_too() -> None:
    torch.manual_seed(0)
    one = build_encoder("mobilenetv3_small_050", dim=4).train()
    one.backbone.apply(lambda m: setattr(m, "drop_rate", 0.0) if hasattr(m, "drop_rate") else None)
    each = copy.deepcopy(one)
    set_bn_group(one, 4)
    set_bn_group(each, None)
    assert len(list(bn_modules(one))) > 10
    images = pixels(8, size=32)
    torch.testing.assert_close(one(images), encode_by_group(each, images, bn_group=4), rtol=1e-3, atol=1e-4)


def test_batches_that_do_not_fit_and_unknown_bn_are_refused() -> None:
    with pytest.raises(UserError, match="10 images on a rank do not divide into BN groups of 4"):
        tiny(4)(pixels(10))
    with pytest.raises(UserError, match="is a SyncBatchNorm, for which there are no BN groups"):
        set_bn_group(nn.Sequential(nn.SyncBatchNorm(4)), 4)
    with pytest.raises(UserError, match="shuffle_block=5 does not divide the global batch 12"):
        KeyShuffle(block=5).permutation(0, global_batch=12)
    set_bn_group(norm := nn.Sequential(nn.BatchNorm2d(3)), 2)
    with pytest.raises(ValueError, match="expected"):
        norm(torch.zeros(2, 3, 4, 4, 4))


def test_permutation_is_a_function_of_seed_and_step_within_blocks() -> None:
    shuffle = KeyShuffle(seed=1, block=4)
    one = shuffle.permutation(7, global_batch=12)
    assert torch.equal(one, shuffle.permutation(7, global_batch=12))
    assert not torch.equal(one, shuffle.permutation(8, global_batch=12))
    assert not torch.equal(one, KeyShuffle(seed=2, block=4).permutation(7, global_batch=12))
    assert [sorted(block.tolist()) for block in one.view(3, 4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    # torch's own generator is left alone: a resumed run draws the same from it.
    state = torch.get_rng_state()
    shuffle.permutation(9, global_batch=12)
    assert torch.equal(state, torch.get_rng_state())


def test_features_come_back_in_the_order_of_the_images() -> None:
    images = pixels(8)
    seen: list[Tensor] = []

    def encode(shuffled: Tensor) -> Tensor:
        seen.append(shuffled)
        return shuffled.double().flatten(1)[:, :3]

    shuffle = KeyShuffle(seed=0, block=4)
    features = shuffle.encode(encode, images, step=3)
    torch.testing.assert_close(features, images.double().flatten(1)[:, :3])
    assert torch.equal(seen[0], images[shuffle.permutation(3, global_batch=8)])
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    KeyShuffle(enabled=False).encode(encode, images, step=3)
    assert torch.equal(seen[1], images)


def test_keys_change_their_group() -> None:
    images = pixels(8)
    encoder = tiny(4)
    with torch.no_grad():
        still = KeyShuffle(enabled=False).encode(encoder, images, step=0)
        moved = KeyShuffle().encode(encoder, images, step=0)
        truth = torch.empty_like(still)
        permutation = KeyShuffle().permutation(0, global_batch=8)
        truth[permutation] = encode_by_group(encoder, images[permutation], bn_group=4)
    torch.testing.assert_close(moved, truth)
    assert not torch.allclose(moved, still)


def test_groups_and_statistics_over_all_ranks_exclude_each_other() -> None:
    with pytest.raises(UserError, match="bn_group=4 and BN statistics over 2 ranks"):
        set_bn_group(tiny(4), 4, sync_ranks=2)


@pytest.mark.parametrize("world_size", [2])
def test_ranks_agree_with_groups_on_one_device(world_size: int, ranks: RankServer, tmp_path: Path) -> None:
    """All-to-all = all-gather = groups on one device; the worker asserts it and the world size."""
    worker = "tests.train.ranks_worker"
    ranks.run(worker, world_size, tmp_path, world_size=world_size, out=tmp_path).require_success()
    reports = sorted(path.read_text() for path in tmp_path.glob("rank-*.txt"))
    assert reports == [f"rank {rank} of {world_size} agrees" for rank in range(world_size)]
