import json
from pathlib import Path
from typing import Any

import pytest
from tests.train.detect_data import SIDE, coco_notes, draw, write_coco, write_voc, write_xml

from linerate.shards.errors import UserError
from linerate.train.evaluate.detect import coco_layout
from linerate.train.evaluate.detect.annotations import Findings, count_doubles
from linerate.train.evaluate.detect.coco_layout import read_coco, require_pycocotools
from linerate.train.evaluate.detect.voc_layout import read_voc

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write_voc(tmp_path / "voc", {"trainval": [0, 1], "test": [2]})


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco", {"train2017": [0, 1]})


def _edit(coco: Path, split: str = "train2017", *, kind: str = "instances", **parts: Any) -> None:
    path = coco / "annotations" / f"{kind}_{split}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def test_voc_boxes_become_edges_that_count_from_0(voc: Path) -> None:
    found = read_voc([voc], "trainval")
    assert found.class_names == ("blue", "red")
    for seed, image in enumerate(found.images):
        assert (image.height, image.width) == (SIDE, SIDE)
        names = [(found.class_names[one.label], one.box) for one in image.instances]
        assert names == draw(seed)[1]
    assert found.findings.counts == {}


def test_coco_boxes_become_edges_and_numbers_become_places(coco: Path) -> None:
    found = read_coco(coco, "train2017")
    assert (found.class_names, found.category_ids) == (("blue", "red"), (3, 7))
    assert [(found.class_names[i.label], i.box) for i in found.images[1].instances] == draw(1)[1]
    assert found.findings.counts == {}


def test_test_images_that_are_also_trained_on_are_counted_by_content(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c", "same_as_a", "as_long_as_b")]
    for path, content in zip(paths, (b"one", b"two2", b"three", b"one", b"four"), strict=True):
        path.write_bytes(content)
    findings = Findings()
    count_doubles(paths[:3], paths[3:], findings)
    assert findings.lines() == [
        "1 images also among those of training (same bytes): the figure is too high: same_as_a"
    ]


def test_two_voc_folders_are_read_together_though_names_are_the_same(voc: Path, tmp_path: Path) -> None:
    other = write_voc(tmp_path / "other", {"trainval": [0, 5]})
    images = read_voc([voc, other], "trainval").images
    assert len({image.image_id for image in images}) == 4


def test_what_is_bad_in_voc_is_counted_with_its_place_and_the_rest_is_kept(voc: Path) -> None:
    notes = voc / "Annotations"
    write_xml(
        notes / "000.xml",
        [
            ("red", (9, 9, 9, 20)),
            ("red", (70, 70, 90, 90)),
            ("red", (-4, 1, 30, 30)),
        ],
    )
    write_xml(notes / "010.xml", [("green", (1, 1, 9, 9))], size=0)
    (notes / "011.xml").write_text("<annotation><object>")
    (notes / "012.xml").write_text("<annotation><object><name>red</name></object></annotation>")
    (notes / "013.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>')
    for name in ("010", "011", "012", "013", "014"):
        draw(0)[0].save(voc / "JPEGImages" / f"{name}.jpg")
    names = ("000", "010", "011", "012", "013", "014", "015", "001", "001")
    (voc / "ImageSets/Main/odd.txt").write_text("".join(f"{name}  1\n" for name in names))
    found = read_voc([voc], "odd", class_names=["red", "blue"])
    assert [image.path.stem for image in found.images] == ["000", "010", "001"]
    assert [one.box for one in found.images[0].instances] == [(0.0, 0.0, 30.0, 30.0)]
    assert dict(found.findings.counts) == {
        "boxes of zero area, left out": 1,
        "boxes outside the image, left out": 1,
        "boxes cut at the image's edge": 1,
        "objects of an unknown class, left out": 1,
        "images without a usable object (not trained on, judged)": 1,
        "annotation files that cannot be read, left out with their image": 3,
        "images without an annotation file, left out": 1,
        "missing images, left out": 1,
    }
    assert "1 objects of an unknown class, left out: 010 (green)" in found.findings.lines()
    assert any("DOCTYPE" in line for line in found.findings.lines())
    assert [image.path.stem for image in found.for_training().images] == ["000", "001"]


def test_more_findings_than_examples_are_told_as_such() -> None:
    findings = Findings()
    for name in "abcd":
        findings.add("odd ones", name)
    assert findings.lines() == ["4 odd ones: a, b, c, ..."]


def test_a_difficult_object_is_marked(voc: Path) -> None:
    write_xml(voc / "Annotations/002.xml", [("red", (1, 1, 9, 9))], more="<difficult>1</difficult>")
    (image,) = read_voc([voc], "test").images
    assert image.instances[0].difficult


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ("train", "has no split train .*; there are nothing, test, trainval"),
        ("nothing", "no image of nothing .* can be read: the list is empty"),
    ],
)
def test_a_voc_split_that_is_not_there_or_empty_is_told(voc: Path, split: str, told: str) -> None:
    (voc / "ImageSets/Main/nothing.txt").write_text("\n")
    with pytest.raises(UserError, match=told):
        read_voc([voc], split)


def test_a_voc_folder_without_lists_or_without_objects_is_told(voc: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ImageSets/Main has no list"):
        read_voc([tmp_path / "void"], "test")
    write_xml(voc / "Annotations/002.xml", [])
    with pytest.raises(UserError, match="has an object"):
        read_voc([voc], "test")


def test_what_is_bad_in_coco_is_counted_and_crowds_are_kept_for_judging(coco: Path) -> None:
    notes = coco_notes([0, 1])
    images = [*notes["images"], {"id": 9, "file_name": "gone.jpg", "height": 5, "width": 5}]
    first = notes["annotations"][0]
    odd = [
        first | {"bbox": [5, 5, 0, 9]},
        first | {"bbox": [500, 5, 9, 9]},
        first | {"category_id": 55},
        first | {"image_id": 77},
        *(note | {"iscrowd": 1} for note in notes["annotations"] if note["image_id"] == 1),
    ]
    kept = [note for note in notes["annotations"] if note["image_id"] == 0]
    _edit(coco, images=images, annotations=kept + odd)
    found = read_coco(coco, "train2017")
    assert dict(found.findings.counts) == {
        "boxes of zero area, left out": 1,
        "boxes outside the image, left out": 1,
        "objects of an unknown class, left out": 1,
        "annotations of an image that is not listed, left out": 1,
        "crowd regions (not trained on, ignored when judged)": 2,
        "missing images, left out": 1,
    }
    assert [len(image.instances) for image in found.images] == [2, 2]
    assert [image.image_id for image in found.for_training().images] == [0]


def test_a_person_without_points_is_kept_for_judging_alone(coco: Path) -> None:
    notes = coco_notes([0, 1], keypoints=True)
    notes["annotations"][0]["keypoints"] = [0] * 9
    _edit(coco, kind="person_keypoints", annotations=notes["annotations"])
    found = read_coco(coco, "train2017", keypoints=True)
    assert found.findings.counts == {"persons without keypoints (not trained on, ignored when judged)": 1}
    assert (len(found.images), len(found.for_training().images)) == (2, 1)
    assert found.keypoint_names == ("middle", "left_top", "right_top")


def test_coco_files_that_do_not_fit_are_told(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are instances_train2017\.json, person_keypoints"):
        read_coco(coco, "val2017")
    with pytest.raises(UserError, match=r"annotations holds no \.json"):
        read_coco(tmp_path / "void", "val2017")
    _edit(coco, kind="person_keypoints", categories=coco_notes([0])["categories"])
    with pytest.raises(UserError, match="has 0 categories with keypoints"):
        read_coco(coco, "train2017", keypoints=True)
    for image in (coco / "train2017").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"has no image of instances_train2017\.json: 2 missing images"):
        read_coco(coco, "train2017")
    _edit(coco, images="none")
    with pytest.raises(UserError, match="is no annotation file of COCO"):
        read_coco(coco, "train2017")


def test_where_pycocotools_is_missing_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_layout.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"linerate\[detection\]"):
        require_pycocotools()


@pytest.mark.data
def test_the_real_sets_hold_what_is_known_of_them() -> None:
    if not DATA.is_dir():
        pytest.skip("../shared/data is absent: reading real VOC and COCO folders stays untested")
    bccd = [read_voc([DATA / "voc/bccd"], split) for split in ("trainval", "test")]
    assert bccd[0].class_names == ("Platelets", "RBC", "WBC")
    assert [found.findings.lines() for found in bccd] == [
        ["1 boxes of zero area, left out: BloodImage_00338"],
        ["1 boxes of zero area, left out: BloodImage_00343"],
    ]
    assert sum(len(image.instances) for found in bccd for image in found.images) == 1019
    coco = [read_coco(DATA / "coco", split) for split in ("train2017", "val2017")]
    crowds = [f.findings.counts["crowd regions (not trained on, ignored when judged)"] for f in coco]
    assert (crowds, [len(found.images) for found in coco]) == ([4, 3], [26, 31])
