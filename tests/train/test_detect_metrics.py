from pathlib import Path

import numpy as np
import pytest

from linerate.train.evaluate.detect.annotations import AnnotatedImage, AnnotatedSet, Findings, Instance
from linerate.train.evaluate.detect.coco_metric import CocoDetections, coco_metric
from linerate.train.evaluate.detect.voc_metric import Detections, average_precision, voc_metric


def _image(*instances: Instance, side: int = 200) -> AnnotatedImage:
    return AnnotatedImage(image_id="a", path=Path("a.jpg"), height=side, width=side, instances=instances)


def _box(x: float, y: float, side: float = 40.0, **more: object) -> Instance:
    return Instance(box=(x, y, x + side, y + side), label=0, area=side * side, **more)  # type: ignore[arg-type]


def _found(rows: list[tuple[float, float, float, float]], scores: list[float]) -> CocoDetections:
    boxes = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return CocoDetections(boxes=boxes, labels=np.zeros(len(rows), dtype=np.int64), scores=np.array(scores))


def test_the_two_average_precisions_of_a_curve_by_hand() -> None:
    recall, precision = np.array([0.25, 0.5, 0.5, 0.75]), np.array([1.0, 1.0, 2 / 3, 0.75])
    # Recalls 0, .1 .. .5 have the best precision 1, .6 and .7 have 0.75, the others none.
    assert average_precision(recall, precision, kind="11-point") == pytest.approx((6 + 2 * 0.75) / 11)
    assert average_precision(recall, precision, kind="area") == pytest.approx(0.5 + 0.25 * 0.75)


def test_a_recall_of_three_tenths_counts_for_its_point() -> None:
    recall = np.arange(1, 4) / 10
    assert average_precision(recall, np.ones(3), kind="11-point") == pytest.approx(4 / 11)


def test_all_found_is_100_at_every_threshold() -> None:
    images = [_image(_box(10, 10), _box(100, 100)), _image(_box(50, 50))]
    found = {
        place: _found([o.box for o in one.instances], [0.9] * len(one.instances))
        for place, one in enumerate(images)
    }
    numbers = voc_metric(images, found, num_classes=2, kind="area")
    assert numbers == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100, "classes_without_objects": 1})


def test_a_second_detection_of_an_object_is_wrong_and_one_of_a_difficult_object_is_neither() -> None:
    images = [_image(_box(10, 10), _box(100, 100), _box(10, 100, difficult=True))]
    first, second, hard = (one.box for one in images[0].instances)
    scores = [0.9, 0.8, 0.7, 0.6]
    numbers = voc_metric(
        images, {0: _found([first, hard, first, second], scores)}, num_classes=1, kind="area"
    )
    # Right, skipped, wrong, right: precision 1 at half of the recall, 2/3 at all of it.
    assert numbers["AP50"] == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))


def test_the_overlap_decides_at_which_thresholds_a_box_is_right() -> None:
    images = [_image(_box(0, 0, 100))]
    # Of the object's 100 rows 70: an overlap of 0.7.
    numbers = voc_metric(images, {0: _found([(0, 0, 100, 70)], [0.9])}, num_classes=1, kind="area")
    assert (numbers["AP50"], numbers["AP75"]) == (100, 0)
    assert numbers["AP"] == pytest.approx(100 * 4 / 10)  # 0.5, 0.55, 0.6 and 0.65


def test_nothing_found_is_0_and_nothing_to_find_is_no_number() -> None:
    assert voc_metric([_image(_box(1, 1))], {}, num_classes=1, kind="area")["AP"] == 0
    assert np.isnan(voc_metric([_image()], {}, num_classes=1, kind="area")["AP"])


def test_the_area_is_near_to_cocos_figure_on_random_detections() -> None:
    pytest.importorskip("pycocotools", reason="the VOC metric against COCO's stays untested")
    generator = np.random.default_rng(2)
    images, found = [], {}
    for place in range(12):
        objects = [_box(x, y) for x in (5, 75, 145) for y in (5, 75, 145) if generator.random() < 0.6]
        images.append(_image(*objects))
        rows, scores = [], []
        for one in objects:
            shift = generator.normal(0, 6, 4)
            rows.append(tuple(np.array(one.box) + shift))
            scores.append(float(generator.uniform(0.3, 1)))
        rows += [(150.0, 20.0, 190.0, 190.0)]
        scores += [float(generator.uniform(0, 0.9))]
        found[place] = _found(rows, scores)
    ours = voc_metric(images, found, num_classes=1, kind="area")
    theirs = coco_metric(_set(images), found, masks=False)
    # Theirs samples the curve at 101 recalls.
    for name in ("AP", "AP50", "AP75"):
        assert ours[name] == pytest.approx(theirs[name], abs=1.5)
    assert 10 < ours["AP"] < ours["AP50"] < 99


def _set(images: list[AnnotatedImage], *, points: tuple[str, ...] = ()) -> AnnotatedSet:
    return AnnotatedSet(
        images=tuple(images),
        class_names=("a",),
        category_ids=(18,),
        findings=Findings(),
        keypoint_names=points,
    )


def test_cocos_metric_of_boxes_masks_and_points_is_100_where_all_is_right_but_for_crowds() -> None:
    coco_mask = pytest.importorskip("pycocotools.mask", reason="COCO's metric stays untested")
    points = (20.0, 20.0, 2.0, 40.0, 40.0, 2.0)
    square = [[10, 10, 50, 10, 50, 50, 10, 50]]
    crowd = {"size": [200, 200], "counts": [0, 4000, 36000]}
    images = [
        _image(
            _box(10, 10, segment=square, keypoints=points),
            _box(100, 100, 80, crowd=True, segment=crowd, keypoints=(0.0,) * 6),
        )
    ]
    drawn = np.zeros((200, 200), dtype=np.uint8)
    drawn[10:50, 10:50] = 1
    in_crowd = np.zeros((200, 200), dtype=np.uint8)
    in_crowd[:, :15] = 1
    masks = [coco_mask.encode(np.asfortranarray(one)) for one in (in_crowd, drawn)]
    found = CocoDetections(
        # The better one lies in the crowd region and counts for nothing.
        boxes=np.array([[110.0, 110, 150, 150], [10, 10, 50, 50]]),
        labels=np.zeros(2, dtype=np.int64),
        scores=np.array([0.95, 0.9]),
        masks=masks,
        keypoints=np.array([np.full((2, 3), 120.0), np.array(points).reshape(2, 3)]),
    )
    numbers = coco_metric(_set(images, points=("p", "q")), {0: found}, masks=True)
    for name in ("AP", "AP50", "mask_AP", "mask_AP75", "keypoint_AP50"):
        assert numbers[name] == pytest.approx(100)
    assert numbers["AP_medium"] == pytest.approx(100)
    assert np.isnan(numbers["AP_small"])


def test_cocos_metric_of_nothing_found_is_0() -> None:
    pytest.importorskip("pycocotools", reason="COCO's metric stays untested")
    assert coco_metric(_set([_image(_box(1, 1))]), {}, masks=False)["AP"] == 0


def test_detections_of_other_classes_do_not_count() -> None:
    boxes = np.array([[10.0, 10, 50, 50]])
    found = {0: Detections(boxes=boxes, labels=np.array([1]), scores=np.array([0.9]))}
    assert voc_metric([_image(_box(10, 10))], found, num_classes=2, kind="area")["AP50"] == 0
