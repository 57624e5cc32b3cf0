"""`linerate eval detect` from the command line, on images that are drawn here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.train.detect_data import write_coco, write_run, write_voc

from linerate.__main__ import main
from linerate.shards.errors import UserError
from linerate.shards.terminal import parse_args
from linerate.train.evaluate.detect import cli
from linerate.train.evaluate.detect.annotations import AnnotatedImage, Instance
from linerate.train.evaluate.detect.batches import DetectionSource, draw_mask, load_image
from linerate.train.evaluate.detect.cli import run_detect
from linerate.train.evaluate.detect.coco_layout import read_coco
from linerate.train.evaluate.detect.segmentation import (
    SegmentationSource,
    confusion,
    mean_iou,
    read_masks,
)
from linerate.train.evaluate.detect.settings import DetectCommand

FAST = ["--batch", "2", "--short-side", "64", "--rois", "8", "--proposals", "8", "--precise-bn", "2"]
FAST += ["--log-iterations", "1", "--iterations", "4", "--lr", "0.02"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"trainval": [0, 1, 2], "train": [0, 1, 2], "test": [3, 4], "val": [3, 4]}
    return write_voc(tmp_path_factory.mktemp("voc") / "VOC2007", splits)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), {"train2017": [0, 1, 2], "val2017": [3, 4]})


def _words(run: Path, data: Path, layout: str, out: Path, *more: str) -> list[str]:
    return [
        "eval",
        "detect",
        str(run),
        "--data",
        str(data),
        "--format",
        layout,
        "--out",
        str(out),
        *FAST,
        *more,
    ]


def _result(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def _losses(out: Path, number: int = 0) -> list[float]:
    lines = map(json.loads, (out / f"run-{number}/log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "train"]


def test_voc_is_transferred_in_several_runs_and_told_with_mean_and_deviation(
    run: Path, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _words(run, voc, "voc", tmp_path / "out", "--runs", "2", "--iterations", "10")
    result = _result(words, capsys)
    assert (result["network"], result["metric"]) == ("c4", "VOC, 11-point")
    assert (result["num_train"], result["num_test"], result["class_names"]) == (3, 2, ["blue", "red"])
    assert (result["iterations"], result["steps"], result["lr"]) == (10, [8, 9], 0.02)
    aps = [one["AP50"] for one in result["runs"]]
    assert result["mean"]["AP50"] == pytest.approx(np.mean(aps), abs=1e-3)
    assert result["std"]["AP50"] == pytest.approx(np.std(aps, ddof=1), abs=1e-3)
    losses = [_losses(tmp_path / "out", number) for number in range(2)]
    assert losses[0] != losses[1]
    assert all(np.mean(one[-3:]) < np.mean(one[:3]) for one in losses)
    assert json.loads((tmp_path / "out/result.json").read_text()) == result
    # Nothing is left to do: the same command tells the same, as a table.
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "AP50" in shown.out
    assert "std of 2 runs" in shown.out
    assert "10 iterations of 2 images, lr 0.02 after 1 of warm-up, x0.1 at 8 and 9" in shown.err
    assert main([*words, "--seed", "4"]) == 2
    assert "holds another transfer: seed 0 (now 4)" in capsys.readouterr().err


def test_coco_is_transferred_with_masks(
    run: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocotools", reason="COCO's layout from end to end stays untested")
    words = _words(run, coco, "coco", tmp_path / "out", "--init", "random")
    result = _result(words, capsys)
    assert result["metric"] == "COCO"
    assert {"AP", "AP50", "AP75", "AP_medium", "mask_AP", "mask_AP50"} <= result["mean"].keys()
    line = json.loads((tmp_path / "out/run-0/log.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(sum(v for k, v in line.items() if k.startswith("loss_")), abs=1e-4)
    assert line["loss_mask"] > 0


def test_keypoints_are_transferred(
    run: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocotools", reason="keypoints from end to end stay untested")
    words = _words(run, coco, "coco", tmp_path / "out", "--task", "keypoints", "--proposals", "2")
    words += ["--iterations", "1", "--rois", "4", "--precise-bn", "0", "--test-set", "train2017"]
    result = _result(words, capsys)
    assert result["network"] == "fpn"
    (double,) = result["findings"]["test"].items()
    assert double == ("images also among those of training (same bytes): the figure is too high", 3)
    assert "keypoint_AP50" in result["mean"]
    line = json.loads((tmp_path / "out/run-0/log.jsonl").read_text().splitlines()[0])
    assert line["loss_keypoint"] > 0


def test_segmentation_is_transferred_and_learns(
    run: Path, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _words(run, voc, "voc", tmp_path / "out", "--task", "segmentation", "--num-classes", "3")
    result = _result([*words, "--crop", "64", "--iterations", "20", "--lr", "0.02"], capsys)
    assert (result["network"], result["steps"]) == ("fcn-16s", [14, 18])
    losses = _losses(tmp_path / "out")
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    assert 0 < result["mean"]["mIoU"] <= 100
    assert result["mean"]["images_judged"] == 2


def test_a_flip_mirrors_boxes_masks_and_swaps_left_and_right_points(coco: Path) -> None:
    pytest.importorskip("pycocotools", reason="flipped masks stay untested")

    class Always:
        def random(self) -> float:
            return 0.0

    source = DetectionSource(read_coco(coco, "train2017", keypoints=True), masks=True)
    image, target = source.load(0, None)
    assert target == {}
    target = source._target(source.annotated.images[0])
    flipped_image, flipped = source.load(0, Always())  # type: ignore[arg-type]
    assert torch.equal(flipped_image, image.flip(-1))
    x0, y0, x1, y1 = target["boxes"][0].tolist()
    assert flipped["boxes"][0].tolist() == [64 - x1, y0, 64 - x0, y1]
    ys, xs = flipped["masks"][0].nonzero(as_tuple=True)
    assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == flipped["boxes"][0].tolist()
    points, mirrored = target["keypoints"][0], flipped["keypoints"][0]
    assert mirrored[0].tolist() == [64 - points[0, 0], points[0, 1], 2]
    # left_top is the mirror image of right_top, with its visibility.
    assert mirrored[1].tolist() == [64 - points[2, 0], points[2, 1], 1]


def test_masks_come_from_polygons_run_lengths_or_the_box() -> None:
    coco_mask = pytest.importorskip("pycocotools.mask", reason="masks from run lengths stay untested")
    box = (1.0, 0.0, 3.0, 2.0)
    plain = draw_mask(Instance(box=box, label=0), height=3, width=4)
    assert plain.tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    polygon = Instance(box=box, label=0, segment=[[1, 0, 3, 0, 3, 2, 1, 2]])
    assert np.array_equal(draw_mask(polygon, height=3, width=4), plain)
    counts = Instance(box=box, label=0, segment={"size": [3, 4], "counts": [3, 2, 1, 2, 4]})
    assert np.array_equal(draw_mask(counts, height=3, width=4), plain)
    packed = Instance(box=box, label=0, segment=coco_mask.encode(np.asfortranarray(plain)))
    assert np.array_equal(draw_mask(packed, height=3, width=4), plain)


def test_an_image_of_another_size_than_its_annotation_is_no_image(tmp_path: Path) -> None:
    Image.new("L", (5, 4)).save(tmp_path / "a.png")
    entry = AnnotatedImage(image_id=1, path=tmp_path / "a.png", height=4, width=5, instances=())
    assert load_image(entry).shape == (3, 4, 5)
    odd = AnnotatedImage(image_id=1, path=tmp_path / "a.png", height=5, width=4, instances=())
    with pytest.raises(ValueError, match="is 5x4, its annotation says 4x5"):
        load_image(odd)


def test_mean_iou_by_hand_leaves_out_what_has_no_class() -> None:
    truth = torch.tensor([[0, 0, 1, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1, 1]])
    counts = confusion(predicted, truth, num_classes=3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    numbers = mean_iou(counts)
    assert numbers["mIoU"] == pytest.approx(50)
    assert numbers["pixel_accuracy"] == pytest.approx(200 / 3)
    assert numbers["classes_without_pixels"] == 1
    assert np.isnan(mean_iou(np.zeros((3, 3), dtype=np.int64))["mIoU"])


def test_a_crop_larger_than_the_image_is_filled_with_no_class(voc: Path) -> None:
    source = SegmentationSource(read_masks([voc], "train", num_classes=3), num_classes=3, crop=150)
    image, target = source.load(0, np.random.default_rng(0))
    assert image.shape == (3, 150, 150)
    classes = target["classes"]
    assert classes.shape == (150, 150)
    outside = classes == 255
    assert 0 < outside.sum() < 150 * 150
    assert torch.allclose(image[:, outside], torch.tensor([[0.485], [0.456], [0.406]]))


def test_masks_that_do_not_fit_are_told_or_counted(voc: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has class 2, which is not below 2; give --num-classes"):
        read_masks([voc], "train", num_classes=2)
    root = write_voc(tmp_path / "own", {"train": [0, 1]})
    (root / "SegmentationClass/000.png").unlink()
    found = read_masks([root], "train", num_classes=3)
    assert found.findings.lines() == ["1 missing masks, left out: 000"]
    Image.new("L", (9, 9)).save(root / "SegmentationClass/001.png")
    source = SegmentationSource(read_masks([root], "train", num_classes=3), num_classes=3, crop=8)
    with pytest.raises(ValueError, match=r"is of \(9, 9\) pixels, its image of \(64, 64\)"):
        source.load(0, None)
    Image.new("RGB", (64, 64)).save(root / "SegmentationClass/001.png")
    with pytest.raises(UserError, match=r"holds colours \(RGB\)"):
        read_masks([root], "train", num_classes=3)
    (root / "SegmentationClass/001.png").unlink()
    with pytest.raises(UserError, match="has a mask: 2 missing masks"):
        read_masks([root], "train", num_classes=3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--format voc --task keypoints", "--task keypoints has --format coco and --network fpn alone"),
        ("--format coco --task segmentation", "--task segmentation has --format voc and FCN-16s alone"),
        ("--format voc --predict box+mask", "needs the masks of --format coco"),
        ("--format voc --schedule 30k", "--schedule 30k is not for --task detection"),
        ("--format voc --short-side 800-480", "--short-side 800-480 is no range of pixels"),
        ("--format voc --short-side wide", "--short-side wide is no range of pixels"),
        ("--format voc --runs 0", "--runs 0 must be at least 1"),
        ("--format voc --log-iterations 0", "--log-iterations 0 must be at least 1"),
        ("--format voc --precise-bn -1", "must not be negative"),
        ("--format voc --num-classes 1", "--num-classes 1 must be 2 .. 255"),
        ("--format coco --data a b", "--data has 2 folders; COCO's layout has one"),
        ("--format voc --data", "--data is missing"),
    ],
)
def test_flags_that_do_not_go_together_are_told(words: str, told: str) -> None:
    given = ["r", "--out", "o", *([] if "--data" in words else ["--data", "d"]), *words.split()]
    with pytest.raises(UserError) as caught:
        parse_args(DetectCommand, given, prog="linerate eval detect")
    assert told in str(caught.value)


def test_the_papers_sides_and_splits_are_the_defaults() -> None:
    voc, coco = (
        DetectCommand(run=Path("r"), data=(Path("d"),), out=Path("o"), format=layout)  # type: ignore[arg-type]
        for layout in ("voc", "coco")
    )
    assert voc.train_sides() == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert coco.train_sides() == (640, 672, 704, 736, 768, 800)
    assert (voc.splits(), coco.splits()) == (("trainval", "test"), ("train2017", "val2017"))
    assert (voc.masks(), coco.masks()) == (False, True)


def test_the_rules_of_2007_are_for_a_folder_of_that_year_unless_they_are_named() -> None:
    def rules(*, voc_ap: Any = "auto", **folders: Any) -> str:
        folders = {"data": (Path("VOC2012"),), **folders}
        return cli._voc_ap(
            DetectCommand(run=Path("r"), out=Path("o"), format="voc", voc_ap=voc_ap, **folders)
        )

    assert rules() == "area"
    assert rules(test_data=Path("VOC2007")) == "11-point"
    assert rules(test_data=Path("VOC2007"), voc_ap="area") == "area"


def test_sets_that_cannot_be_trained_on_are_told(run: Path, coco: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="COCO sets that do not fit stay untested")
    root = write_coco(tmp_path / "coco", {"train2017": [0], "val2017": [1]})
    path = root / "annotations/instances_train2017.json"
    notes = json.loads(path.read_text())
    command = DetectCommand(run=run, data=(root,), out=tmp_path / "out", format="coco", iterations=1)
    path.write_text(json.dumps(notes | {"annotations": []}))
    with pytest.raises(UserError, match="no image of train2017 has an object to train on: 1 images without"):
        run_detect(command)
    path.write_text(json.dumps(notes | {"categories": notes["categories"][:1]}))
    with pytest.raises(UserError, match="train2017 and val2017 have different categories"):
        run_detect(command)
    assert not (tmp_path / "out").exists()
