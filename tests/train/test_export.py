import dataclasses
import math
import pickle
import resource
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from tests.train.small import SMALL

from linerate.shards.errors import UserError
from linerate.train import export as export_module
from linerate.train.checkpoint import TrainedEncoder, TrainedOn
from linerate.train.config import Model
from linerate.train.detectron2_names import expected_shapes, load_detectron2, write_detectron2
from linerate.train.encoder import build_encoder
from linerate.train.export import Target, export_encoder


def _trained(name: str, *, stem: str = "imagenet", head: str = "linear", size: int = 32) -> TrainedEncoder:
    """An encoder whose BN statistics are not those it was born with, as after training."""
    model = Model(encoder=name, stem=stem, head=head, dim=16)  # type: ignore[arg-type]
    torch.manual_seed(5)
    encoder = build_encoder(name, dim=16, head=model.head, stem=model.stem)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    views = dataclasses.replace(SMALL.views, size=size)
    config = dataclasses.replace(SMALL, model=model, views=views)
    path = Path("run/checkpoints/step-000000007.pt")
    return TrainedEncoder(encoder=encoder.eval(), config=config, step=7, images=112, path=path)


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torchvision_gives_the_same_features(suffix: str, tmp_path: Path) -> None:
    trained = _trained("resnet18")
    report = export_encoder(trained, target="torchvision", out=tmp_path / f"r18.{suffix}")
    assert report.max_difference <= 1e-5
    load = safetensors.torch.load_file if suffix == "safetensors" else torch.load
    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(load(report.out), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(model.eval()(IMAGES), trained.encoder.backbone(IMAGES), atol=1e-5)


def test_timm_gives_the_same_features(tmp_path: Path) -> None:
    trained = _trained("resnet18")
    report = export_encoder(trained, target="timm", out=tmp_path / "new" / "r18.pth")
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(report.out)).eval()
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), trained.encoder.backbone(IMAGES), atol=1e-5)


def test_a_network_of_one_image_size_is_checked_at_that_size(tmp_path: Path) -> None:
    trained = _trained("test_vit", size=160)
    assert export_encoder(trained, target="timm", out=tmp_path / "vit.pth").max_difference <= 1e-5
    other = tmp_path / "vit.safetensors"
    assert export_encoder(trained, target="safetensors", out=other).max_difference <= 1e-5


def test_safetensors_hold_the_head_too(tmp_path: Path) -> None:
    trained = _trained("tiny-resnet-w4", stem="cifar", head="mlp")
    report = export_encoder(trained, target="safetensors", out=tmp_path / "tiny.safetensors")
    encoder = build_encoder("tiny-resnet-w4", dim=16, head="mlp", stem="cifar")
    encoder.load_state_dict(safetensors.torch.load_file(report.out))
    with torch.no_grad():
        assert torch.equal(encoder.eval()(IMAGES), trained.encoder(IMAGES))


def test_the_card_says_what_the_weights_are_and_its_code_runs(tmp_path: Path) -> None:
    shards = TrainedOn(plan_id="00ff", num_samples=1234, folder="/somewhere/birds")
    trained = dataclasses.replace(_trained("resnet18"), trained_on=shards)
    report = export_encoder(trained, target="torchvision", out=tmp_path / "r18.pth")
    card = report.card.read_text()
    assert "| data | 1,234 images, shards birds (plan 00ff) |" in card
    assert "/somewhere" not in card
    for name in ("linerate", "torch", "timm"):
        assert f"{name} {version(name)}" in card
    assert report.card == tmp_path / "r18.pth.md"
    for words in ("resnet18", "| recipe | small, seed 0 |", "K = 40", "7 steps, 112 images", "torchvision"):
        assert words in card
    code = card.split("```python\n")[1].split("```")[0].replace('"r18.pth"', f'"{report.out}"')
    exec(code, {"torch": torch, "torchvision": torchvision})


@pytest.mark.parametrize(
    ("name", "stem", "target", "out", "message"),
    [
        (
            "resnet18",
            "cifar",
            "torchvision",
            "x.pth",
            "no resnet18 with stem=cifar; export it with --to safet",
        ),
        ("tiny-resnet-w4", "imagenet", "timm", "x.pth", "timm has no tiny-resnet-w4"),
        ("tiny-resnet-w4", "imagenet", "torchvision", "x.pth", "torchvision has no tiny-resnet-w4.*safetens"),
        ("resnet10t", "imagenet", "torchvision", "x.pth", "use --to timm"),
        ("resnet18", "imagenet", "safetensors", "x.pth", r"name it x\.safetensors"),
        ("resnet18", "imagenet", "detectron2", "x.pth", r"name it x\.pkl"),
        ("resnext50_32x4d", "imagenet", "detectron2", "x.pkl", "detectron2 has no resnext50_32x4d"),
        ("resnet18", "imagenet", "timm", "", "is a folder"),
        ("resnet18", "imagenet", "timm", "/dev/null/x/r18.pth", "its folder /dev/null/x cannot be made"),
        (
            "resnet18",
            "imagenet",
            "timm",
            "/proc/r18.pth",
            r"--out /proc/r18\.pth cannot be written \(No such",
        ),
        ("resnet18", "imagenet", "timm", "/proc/r.safetensors", r"--out /proc/r\.safetensors cannot be"),
        ("resnet18", "imagenet", "detectron2", "/proc/r18.pkl", r"--out /proc/r18\.pkl cannot be written"),
    ],
)
def test_what_a_library_does_not_have_is_refused(
    name: str, stem: str, target: str, out: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export_encoder(_trained(name, stem=stem), target=target, out=tmp_path / out)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def file_limit() -> Iterator[None]:
    """No file of this process grows beyond 100 kB, as on a disk that fills up."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


TARGETS = pytest.mark.parametrize(
    ("target", "name"),
    [("timm", "r.pth"), ("timm", "r.safetensors"), ("safetensors", "r.safetensors"), ("detectron2", "r.pkl")],
)


@TARGETS
@pytest.mark.usefixtures("file_limit")
def test_a_disk_that_fills_up_is_an_error_of_out_with_its_cause(
    target: Target, name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"{name} cannot be written \(File too large\); name another"):
        export_encoder(_trained("resnet18"), target=target, out=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@TARGETS
def test_what_goes_wrong_before_the_writing_is_not_taken_for_a_disk_s_fault(
    target: Target, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("a tensor of another kind")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(safetensors.torch, "save", refuse)
    monkeypatch.setattr(pickle, "dump", refuse)
    with pytest.raises(RuntimeError, match="a tensor of another kind"):
        export_encoder(_trained("resnet18"), target=target, out=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("difference", "said"), [(1e-3, r"1\.00e-03"), (math.nan, "nan")])
def test_features_that_differ_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: float, said: str
) -> None:
    monkeypatch.setattr(export_module, "_difference", lambda *_: difference)
    with pytest.raises(RuntimeError, match=f"differ by {said}"):
        export_encoder(_trained("resnet18"), target="timm", out=tmp_path / "r18.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_detectron2s_file_holds_its_backbone_and_the_same_features(name: str, tmp_path: Path) -> None:
    trained = _trained(name)
    report = export_encoder(trained, target="detectron2", out=tmp_path / "r.pkl")
    assert report.max_difference <= 1e-5
    with report.out.open("rb") as file:
        loaded = pickle.load(file)
    assert loaded["matching_heuristics"] is False
    arrays = loaded["model"]
    assert {key: array.shape for key, array in arrays.items()} == expected_shapes(name)
    assert len(arrays) == report.num_tensors
    own = trained.encoder.backbone.state_dict()
    for theirs, ours in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.conv1.weight": "layer1.0.conv1.weight",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res3.0.shortcut.norm.bias": "layer2.0.downsample.1.bias",
        "res5.1.conv2.norm.running_mean": "layer4.1.bn2.running_mean",
    }.items():
        assert (arrays[theirs] == own[ours].numpy()).all()


def test_detectron2s_backbone_of_depth_50_has_its_known_size() -> None:
    shapes = expected_shapes("resnet50")
    assert len(shapes) == 53 * 5
    parameters = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if not name.endswith(("running_mean", "running_var"))
    )
    assert parameters == 23_508_032


@pytest.mark.parametrize(("name", "depth", "width"), [("resnet18", 18, 64), ("resnet50", 50, 256)])
def test_detectron2s_card_is_the_config_that_the_weights_need(
    tmp_path: Path, name: str, depth: int, width: int
) -> None:
    report = export_encoder(_trained(name), target="detectron2", out=tmp_path / "r.pkl")
    card = report.card.read_text()
    for line in (
        f"RES2_OUT_CHANNELS: {width}\n",
        'WEIGHTS: "r.pkl"',
        "STRIDE_IN_1X1: False",
        'FORMAT: "RGB"',
        f"DEPTH: {depth}",
        "FREEZE_AT: 0",
        "PIXEL_MEAN: [123.675, 116.280, 103.530]",
        "PIXEL_STD: [58.395, 57.120, 57.375]",
    ):
        assert line in card


def test_a_tensor_that_detectron2_does_not_have_is_a_defect(tmp_path: Path) -> None:
    write_detectron2({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "r.pkl")
    with pytest.raises(RuntimeError, match="not the tensors of detectron2's resnet18"):
        load_detectron2("resnet18", tmp_path / "r.pkl")
