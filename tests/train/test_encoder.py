import os
import subprocess
import sys

import pytest
import torch

from linerate.shards.errors import UserError
from linerate.train.encoder import build_encoder


@pytest.mark.parametrize(
    ("name", "millions", "num_features"),
    [
        ("resnet50", 23.51, 2048),
        ("resnext50-32x8d", 45.97, 2048),
        ("resnet50-w2x", 93.91, 4096),
        ("resnet50-w4x", 375.38, 8192),
    ],
)
def test_feature_extractors_of_table_1_have_its_parameters(
    name: str, millions: float, num_features: int
) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name)
    assert sum(p.numel() for p in encoder.backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert encoder.num_features == num_features


def test_resnet50_with_the_linear_head_has_the_reference_s_161_tensors() -> None:
    with torch.device("meta"):
        parameters = list(build_encoder("resnet50", dim=128).parameters())
    assert len(parameters) == 161
    assert sum(p.numel() for p in parameters) == 23_770_304


def test_every_bn_starts_as_in_the_paper_not_with_zeros_in_the_last_one() -> None:
    encoder = build_encoder("resnet18")
    weights = [m.weight for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all((weight == 1).all() for weight in weights)
    assert len(weights) == 20


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_heads_are_v1_s_and_v2_s(head: str) -> None:
    encoder = build_encoder("tiny-resnet-w4", dim=16, head=head)  # type: ignore[arg-type]
    shapes = [tuple(p.shape) for p in encoder.head.parameters()]
    last = [(16, 32), (16,)]
    assert shapes == (last if head == "linear" else [(32, 32), (32,), *last])


def test_images_are_normalised_at_the_entry_in_one_operation() -> None:
    encoder = build_encoder("tiny-resnet-w4")
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder.features(pixels)
    torch.testing.assert_close(seen[0], (pixels.float() / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    # What is normalised already passes as it is.
    encoder.features(seen[0])
    assert seen[1] is seen[0]


def test_cifar_stem_keeps_the_resolution_up_to_the_first_stage() -> None:
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for stem, side in (("cifar", 32), ("imagenet", 8)):
        encoder = build_encoder("tiny-resnet-w4", stem=stem)  # type: ignore[arg-type]
        sides: list[int] = []
        encoder.backbone.layer1.register_forward_hook(  # type: ignore[union-attr]
            lambda _module, _inputs, output, sides=sides: sides.append(output.shape[-1])
        )
        assert encoder(pixels).shape == (2, 128)
        assert sides == [side]


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_any_timm_name_is_an_encoder(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, dim=7)
        images = torch.empty(2, 3, 224, 224, dtype=torch.uint8)
        assert encoder(images).shape == (2, 7)
        assert encoder.features(images).shape == (2, encoder.num_features)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "resnet5O"}, r"encoder=resnet5O is not known; did you mean resnet50 or"),
        ({"name": "tiny-resnet-w0"}, r"tiny-resnet-w0 has no channels"),
        ({"name": "vit_tiny_patch16_224", "stem": "cifar"}, r"no plain ResNet stem to replace"),
        ({"name": "resnet50", "dim": 0}, r"dim=0 must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_one_clear_line(wrong: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message) as error:
        build_encoder(**wrong)  # type: ignore[arg-type]
    assert len(str(error.value)) < 300


def test_an_encoder_of_one_image_size_refuses_others_in_one_line() -> None:
    with torch.device("meta"):
        vit, resnet, tiny = (build_encoder(name) for name in ("test_vit", "resnet18", "tiny-resnet-w4"))
    vit.require_size(160)
    resnet.require_size(97)
    tiny.require_size(97)
    with pytest.raises(UserError, match=r"160x160 pixels alone, not of size=97; give --size 160"):
        vit.require_size(97)


def test_gradients_of_narrow_strided_1x1_convolutions_are_right_and_kill_no_process() -> None:
    # As oneDNN computes them, 6 steps at this width and size end by SIGSEGV: so a process of its own.
    code = """
import copy, torch
from linerate.train.encoder import build_encoder
torch.manual_seed(0)
encoder = build_encoder("tiny-resnet-w4", dim=8, stem="cifar").to(memory_format=torch.channels_last)
exact = copy.deepcopy(encoder).double()
shortcuts = [block.downsample[0] for block in (encoder.backbone.layer2[0], exact.backbone.layer2[0])]
pixels = torch.randn(64, 64, 64, 4).permute(0, 3, 1, 2)
for _ in range(20):
    for shortcut in shortcuts:
        shortcut.weight.grad = None
    outputs = shortcuts[0](pixels), shortcuts[1](pixels.double())
    for output in outputs:
        output.square().sum().backward()
    found, exact_grad = shortcuts[0].weight.grad.double(), shortcuts[1].weight.grad
    torch.testing.assert_close(found, exact_grad, rtol=1e-4, atol=1e-2)
    encoder(torch.randint(0, 256, (64, 64, 64, 3), dtype=torch.uint8).permute(0, 3, 1, 2)).sum().backward()
print(tuple(outputs[0].shape))
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "(64, 8, 32, 32)"


def test_wide_strided_convolutions_stay_as_they_are() -> None:
    kinds = {type(m) for m in build_encoder("resnet18").modules() if isinstance(m, torch.nn.Conv2d)}
    assert kinds == {torch.nn.Conv2d}
