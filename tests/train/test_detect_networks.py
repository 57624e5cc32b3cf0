import copy
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torchvision
from tests.train.detect_data import write_run
from timm.models.resnet import ResNet
from torch import Tensor, nn

from linerate.shards.errors import UserError
from linerate.train.checkpoint import load_trained
from linerate.train.encoder import build_encoder
from linerate.train.evaluate.detect.backbones import Stages, dilate, initial_backbone
from linerate.train.evaluate.detect.loop import parameter_groups
from linerate.train.evaluate.detect.networks import DetectorOptions, Network, build_detector
from linerate.train.evaluate.detect.segmentation import Fcn16
from linerate.train.evaluate.detect.synced_bn import SyncedBatchNorm2d, sync_batch_norms

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def _backbone(name: str = "tiny-resnet-w4") -> ResNet:
    torch.manual_seed(0)
    backbone = build_encoder(name).backbone
    assert isinstance(backbone, ResNet)
    return backbone


def _detector(network: Network, **more: Any) -> Any:
    options = DetectorOptions(
        network=network, num_classes=2, train_sides=(64,), test_side=64, rois=8, proposals=8, **more
    )
    return build_detector(_backbone(), options)


def _targets() -> list[dict[str, Tensor]]:
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 10:40, 10:40] = 1
    boxes = torch.tensor([[10.0, 10, 40, 40]])
    return [{"boxes": boxes, "labels": torch.tensor([1]), "masks": masks} for _ in IMAGES]


@pytest.mark.parametrize("network", ["c4", "dilated-c5"])
def test_a_step_trains_every_parameter_and_moves_every_bn(network: Network) -> None:
    detector = _detector(network, masks=network == "c4").train()
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [copy.deepcopy(norm.running_mean) for norm in norms]
    losses = detector(list(IMAGES), _targets())
    assert ("loss_mask" in losses) == (network == "c4")
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, one in detector.named_parameters() if one.grad is None] == []
    assert not any(torch.equal(was, norm.running_mean) for was, norm in zip(before, norms, strict=True))


def test_c4_ends_at_conv4_and_has_one_more_bn_after_conv5() -> None:
    detector = _detector("c4")
    with torch.no_grad():
        (maps,) = detector.backbone(IMAGES).values()
    assert maps.shape == (2, 4 * 4, 4, 4)  # 64 / 16
    head = detector.roi_heads.box_head
    assert head(torch.zeros(3, 16, 14, 14)).shape == (3, 32)
    assert isinstance(head.norm, nn.BatchNorm2d)
    # The RPN's own layers have none, as detectron2's: stem 1, conv2 2, conv3 .. conv5 3 each, the extra 1.
    assert sum(isinstance(module, nn.BatchNorm2d) for module in detector.modules()) == 1 + 2 + 3 * 3 + 1


def test_c4_masks_are_made_of_the_maps_that_were_classified() -> None:
    detector = _detector("c4", masks=True).train()
    heads, seen = detector.roi_heads, []
    heads.mask_predictor.register_forward_pre_hook(lambda module, words: seen.append(words[0]))
    calls: list[int] = []
    heads.box_head.conv5.register_forward_hook(lambda module, words, maps: calls.append(len(maps)))
    detector(list(IMAGES), _targets())
    num_positive = sum(int((labels > 0).sum()) for labels in heads.labels)
    assert len(calls) == 1
    assert seen[0].shape == (num_positive, 32, 7, 7)
    assert heads.box_head.kept is None


def test_the_fpn_and_its_mask_head_have_bn_after_each_convolution() -> None:
    detector = _detector("fpn", masks=True)
    with torch.no_grad():
        maps = detector.backbone(IMAGES)
    assert {name: tuple(one.shape[1:]) for name, one in maps.items()} == {
        "0": (256, 16, 16),
        "1": (256, 8, 8),
        "2": (256, 4, 4),
        "3": (256, 2, 2),
        "pool": (256, 1, 1),
    }
    for part, count in ((detector.backbone[1], 8), (detector.roi_heads.mask_head, 4)):
        kinds = [type(module) for module in part.modules()]
        assert (kinds.count(nn.Conv2d), kinds.count(nn.BatchNorm2d)) == (count, count)


def test_judging_uses_the_test_side_and_training_the_training_sides() -> None:
    options = DetectorOptions(network="c4", num_classes=2, train_sides=(32,), test_side=96)
    transform = build_detector(_backbone(), options).transform
    assert transform.train()(list(IMAGES))[0].tensors.shape[-1] == 32
    assert transform.eval()(list(IMAGES))[0].tensors.shape[-1] == 96


@pytest.mark.parametrize("name", ["tiny-resnet-w4", "resnet26d"])
def test_a_dilated_stage_keeps_its_weights_and_gives_the_old_pixels_between_new_ones(name: str) -> None:
    """Without 3x3 convolutions in the way, the strided output is every second pixel of the dilated one."""
    backbone = _backbone(name).eval()
    strided = copy.deepcopy(backbone)
    for one in (backbone, strided):
        for conv in one.get_submodule("layer4").modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                nn.init.zeros_(conv.weight)
                nn.init.dirac_(conv.weight)
    dilate(backbone.get_submodule("layer4"))
    with torch.no_grad():
        fine = Stages(backbone, first=4, last=4)(IMAGES)["0"]
        coarse = Stages(strided, first=4, last=4)(IMAGES)["0"]
    assert fine.shape[2:] == (4, 4)
    if name == "tiny-resnet-w4":
        assert torch.allclose(fine[..., ::2, ::2], coarse, atol=1e-6)
    convs = [m for m in backbone.get_submodule("layer4").modules() if isinstance(m, nn.Conv2d)]
    assert {conv.dilation for conv in convs if conv.kernel_size == (3, 3)} == {(2, 2)}


def test_a_stage_that_shrinks_by_a_blur_is_refused() -> None:
    backbone = timm.create_model("resnetblur18", num_classes=0)
    with pytest.raises(UserError, match="shrinks its last stage by BlurPool2d"):
        dilate(backbone.layer4)


def test_fcn16_has_a_stride_of_16_and_a_head_dilated_by_6() -> None:
    network = Fcn16(_backbone(), num_classes=3).eval()
    assert network.body(IMAGES)["0"].shape[2:] == (4, 4)
    convs = [module for module in network.head if isinstance(module, nn.Conv2d)]
    assert [(c.out_channels, c.dilation) for c in convs] == [(256, (6, 6)), (256, (6, 6)), (3, (1, 1))]
    with torch.no_grad():
        assert [tuple(one.shape) for one in network(list(IMAGES))] == [(64, 64), (64, 64)]


def test_a_crop_of_no_class_gives_a_loss_of_0_not_nan() -> None:
    network = Fcn16(_backbone(), num_classes=3).train()
    targets = [{"classes": torch.full((64, 64), 255, dtype=torch.uint8)} for _ in IMAGES]
    assert network(list(IMAGES), targets)["loss_pixels"] == 0


def test_bn_has_a_weight_decay_of_its_own() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    others, norms = parameter_groups(network, norm_decay=0.0)
    assert (others["weight_decay"], norms["weight_decay"]) == (1e-4, 0)
    assert [tuple(one.shape) for one in norms["params"]] == [(4,), (4,)]
    assert len(others["params"]) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def _same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def _supervised(name: str = "tiny-resnet-w4") -> dict[str, Tensor]:
    """Weights of the layout that torchvision's have: the backbone's names and a classifier."""
    return {
        **build_encoder(name).backbone.state_dict(),
        "fc.weight": torch.zeros(5, 32),
        "fc.bias": torch.zeros(5),
    }


def test_torchvisions_names_are_those_of_our_resnets_and_a_classifier() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(weights=None).state_dict()
        ours = build_encoder("resnet50").backbone.state_dict()
    assert {name: tensor.shape for name, tensor in theirs.items() if not name.startswith("fc.")} == {
        name: tensor.shape for name, tensor in ours.items()
    }


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_init_is_the_run_or_random_by_the_seed_or_a_file(run: Path, tmp_path: Path, suffix: str) -> None:
    trained = load_trained(run)
    assert _same(initial_backbone(trained, "run", seed=0), trained.encoder.backbone)
    first, again, other = (initial_backbone(trained, "random", seed=seed) for seed in (1, 1, 2))
    assert _same(first, again)
    assert not _same(first, other)
    assert not _same(first, trained.encoder.backbone)
    state, path = _supervised(), tmp_path / f"supervised.{suffix}"
    (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(state, path)
    supervised = initial_backbone(trained, str(path), seed=0).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in supervised.items())
    assert len(supervised) == len(state) - 2


def test_a_run_is_not_changed_by_what_is_built_on_it(run: Path) -> None:
    trained = load_trained(run)
    dilate(initial_backbone(trained, "run", seed=0).get_submodule("layer4"))
    assert _same(initial_backbone(trained, "run", seed=0), load_trained(run).encoder.backbone)
    assert trained.encoder.backbone.get_submodule("layer4.0.conv1").stride == (2, 2)


def test_files_that_are_no_weights_of_the_network_are_told(run: Path, tmp_path: Path) -> None:
    trained = load_trained(run)
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="is neither `run`, `random` nor a file"):
        initial_backbone(trained, str(path), seed=0)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"cannot be read \(UnpicklingError\)"):
        initial_backbone(trained, str(path), seed=0)
    path.rename(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="is no file of safetensors"):
        initial_backbone(trained, str(tmp_path / "weights.safetensors"), seed=0)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="is no state dict"):
        initial_backbone(trained, str(path), seed=0)
    torch.save(_supervised("tiny-resnet-w8"), path)
    with pytest.raises(UserError, match="is not of a tiny-resnet-w4: "):
        initial_backbone(trained, str(path), seed=0)


def test_an_encoder_without_conv_stages_is_told(tmp_path: Path) -> None:
    trained = load_trained(write_run(tmp_path, encoder="test_vit"))
    with pytest.raises(UserError, match="encoder=test_vit is no ResNet"):
        initial_backbone(trained, "run", seed=0)


def test_synced_bn_of_one_rank_is_bn_with_running_variances_of_all_pixels(tmp_path: Path) -> None:
    """As detectron2's: the running variance is over n, torch's over n - 1."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(3))
    nn.init.uniform_(plain[0].weight)
    nn.init.uniform_(plain[0].bias)
    synced = copy.deepcopy(plain)
    sync_batch_norms(synced)
    assert type(synced[0]) is SyncedBatchNorm2d
    batch = torch.randn(4, 3, 5, 5) * 2 + 1
    ours, theirs = (batch.clone().requires_grad_() for _ in range(2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mine = synced(ours)
        (mine**3).sum().backward()
    finally:
        dist.destroy_process_group()
    reference = plain(theirs)
    (reference**3).sum().backward()
    assert torch.allclose(mine, reference, atol=1e-5)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)
    assert torch.allclose(synced[0].running_mean, plain[0].running_mean, atol=1e-6)
    n = batch.numel() / 3
    momentum = 0.1
    unbiased = (plain[0].running_var - (1 - momentum)) / momentum
    assert torch.allclose(
        synced[0].running_var, (1 - momentum) + momentum * unbiased * (n - 1) / n, atol=1e-5
    )
    assert torch.equal(synced.eval()(batch).isfinite().all(), torch.tensor(True))
    assert math.isclose(float(synced[0].num_batches_tracked), 1)
