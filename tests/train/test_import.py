"""Files in the layout of the official MoCo code become runs; the tests write such files themselves."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from linerate.shards.errors import UserError
from linerate.train.checkpoint import load_checkpoint, load_trained, require_same_run
from linerate.train.import_moco import import_checkpoint

DIM, NUM_KEYS = 16, 24


def official_network(*, mlp: bool) -> nn.Module:
    """The encoder as the official code builds it: torchvision's, its fc replaced."""
    torch.manual_seed(3 + mlp)
    net: nn.Module = torchvision.models.resnet18(num_classes=DIM)
    if mlp:
        net.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), net.fc)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_(0, 0.1)
    return net.eval()


def official_file(path: Path, *, mlp: bool = False, zipped: bool = True, **more: Any) -> nn.Module:
    """Write a file as main_moco.py does and return the query encoder in it.

    zipped: False writes as torch did before 1.6, which is younger than the official code.
    """
    query, key = official_network(mlp=mlp), official_network(mlp=mlp)
    state = {f"module.encoder_q.{k}": v for k, v in query.state_dict().items()}
    state |= {f"module.encoder_k.{k}": v + 1 for k, v in key.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state["module.queue"] = nn.functional.normalize(torch.randn(DIM, NUM_KEYS, generator=generator), dim=0)
    state["module.queue_ptr"] = torch.tensor([8])
    state |= more.pop("state", {})
    state = {k: v for k, v in state.items() if v is not None}
    saved = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}} | more
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    return query


@pytest.mark.parametrize(("mlp", "recipe", "head"), [(False, "in1m-v1", "linear"), (True, "in1m-v2", "mlp")])
def test_an_imported_encoder_gives_the_official_ones_queries(
    mlp: bool, recipe: str, head: str, tmp_path: Path
) -> None:
    official = official_file(tmp_path / "moco.pth.tar", mlp=mlp, zipped=mlp)
    report = import_checkpoint(tmp_path / "moco.pth.tar", run=tmp_path / "run")
    assert (report.recipe, report.head, report.dim, report.num_keys) == (recipe, head, DIM, NUM_KEYS)
    trained = load_trained(tmp_path / "run")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(trained.encoder(images), official(images), atol=1e-5)
    assert trained.step == 200 * 5004
    assert trained.config.model.encoder == "resnet18"


def test_the_key_encoder_and_the_queue_come_along(tmp_path: Path) -> None:
    official_file(tmp_path / "moco.pth.tar")
    report = import_checkpoint(tmp_path / "moco.pth.tar", run=tmp_path / "run")
    state = torch.load(tmp_path / "moco.pth.tar", weights_only=True)["state_dict"]
    moco = load_checkpoint(report.checkpoint).moco
    assert torch.equal(moco["dictionary.keys"], state["module.queue"].T)
    assert int(moco["dictionary.num_enqueued"]) % NUM_KEYS == 8
    assert torch.equal(
        moco["key_encoder.backbone.layer1.0.conv1.weight"], state["module.encoder_k.layer1.0.conv1.weight"]
    )


def test_weights_published_without_key_encoder_and_queue_are_taken(tmp_path: Path) -> None:
    official = official_file(tmp_path / "moco.pth.tar")
    state = {f"module.encoder_q.{k}": v for k, v in official.state_dict().items()}
    torch.save({"state_dict": state, "epoch": "none"}, tmp_path / "bare.pth.tar")
    report = import_checkpoint(tmp_path / "bare.pth.tar", run=tmp_path / "run", encoder="resnet18")
    assert (report.num_keys, report.epoch) == (None, 0)
    moco = load_checkpoint(report.checkpoint).moco
    assert torch.equal(moco["key_encoder.head.bias"], moco["query_encoder.head.bias"])
    assert int(moco["dictionary.num_enqueued"]) == 0


def test_an_imported_run_is_not_continued(tmp_path: Path, shards: Any) -> None:
    official_file(tmp_path / "moco.pth.tar")
    report = import_checkpoint(tmp_path / "moco.pth.tar", run=tmp_path / "run")
    checkpoint = load_checkpoint(report.checkpoint)
    with pytest.raises(UserError, match="was imported: it can be judged and exported, not continued"):
        require_same_run(checkpoint, checkpoint.config, shards, run_dir=tmp_path / "run")


def test_a_file_that_is_no_checkpoint_of_moco_is_refused(tmp_path: Path) -> None:
    cases: dict[str, tuple[object, str]] = {
        "none": ({"state_dict": {"fc.weight": torch.zeros(1)}}, "has no module.encoder_q"),
        "list": ([1], "has no module.encoder_q"),
        "odd": ({"state_dict": {"module.encoder_q.fc.weight": 3}}, "something else than a tensor"),
        "nameless": ({"state_dict": {"module.encoder_q.fc.weight": torch.zeros(4, 512)}}, "give --encoder"),
    }
    for name, (saved, said) in cases.items():
        torch.save(saved, tmp_path / name)
        with pytest.raises(UserError, match=said):
            import_checkpoint(tmp_path / name, run=tmp_path / "run")
    (tmp_path / "short").write_bytes(b"PK")
    with pytest.raises(UserError, match="cut short or no checkpoint"):
        import_checkpoint(tmp_path / "short", run=tmp_path / "run")
    with pytest.raises(UserError, match="is a folder; name the checkpoint file in it"):
        import_checkpoint(tmp_path, run=tmp_path / "run")
    with pytest.raises(UserError, match="is not there"):
        import_checkpoint(tmp_path / "absent", run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class _Evil:
    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.made),))


def test_no_code_of_the_file_runs(tmp_path: Path) -> None:
    torch.save({"state_dict": _Evil(tmp_path / "made")}, tmp_path / "evil")
    with pytest.raises(UserError, match="no checkpoint"):
        import_checkpoint(tmp_path / "evil", run=tmp_path / "run")
    assert not (tmp_path / "made").exists()


def test_another_encoders_weights_are_refused_by_the_first_tensor_that_differs(tmp_path: Path) -> None:
    official_file(tmp_path / "moco.pth.tar")
    with pytest.raises(UserError, match=r"does not hold a resnet50: backbone\.layer1\.0\.conv1\.weight"):
        import_checkpoint(tmp_path / "moco.pth.tar", run=tmp_path / "run", encoder="resnet50")
    with pytest.raises(UserError, match="encoder=vgg is none of torchvision's"):
        import_checkpoint(tmp_path / "moco.pth.tar", run=tmp_path / "run", encoder="vgg")
    for extra, said in (({"module.encoder_q.bn1.bias": None}, "absent there"), (_HEADLESS, "fc: the head")):
        official_file(tmp_path / "cut.pth.tar", state=dict(extra))
        with pytest.raises(UserError, match=said):
            import_checkpoint(tmp_path / "cut.pth.tar", run=tmp_path / "run")


_HEADLESS = {"module.encoder_q.fc.weight": None, "module.encoder_q.fc.bias": None}


def test_a_run_that_is_there_is_left_alone(tmp_path: Path) -> None:
    official_file(tmp_path / "moco.pth.tar")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(UserError, match="holds something already"):
        import_checkpoint(tmp_path / "moco.pth.tar", run=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]
