"""Pascal VOC's layout: JPEGImages/NAME.jpg, Annotations/NAME.xml, ImageSets/Main/SPLIT.txt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from linerate.shards.errors import UserError
from linerate.train.evaluate.detect.annotations import (
    AnnotatedImage,
    AnnotatedSet,
    Findings,
    Instance,
    clip_box,
)

# name, box, difficult
_Object = tuple[str, tuple[float, float, float, float], bool]


def read_voc(roots: Sequence[Path], split: str, *, class_names: Sequence[str] | None = None) -> AnnotatedSet:
    """The split of one VOC folder or of several together, as trainval of 2007 and of 2012.

    class_names: other classes are counted and left out; None: all that occur, sorted. A name that the split
    lists twice, as in the files of one class, is read once. Raises UserError where a folder has no such split
    or nothing in it can be read.
    """
    findings = Findings()
    found = []
    for root in roots:
        for name in _split_names(root, split):
            if (image := _read_one(root, name, findings)) is not None:
                found.append(image)
    if not found:
        what = "; ".join(findings.lines()) or "the list is empty"
        raise UserError(
            f"no image of {split} in {', '.join(map(str, roots))} can be read: {what}; name another split"
        )
    names = list(class_names or sorted({name for _, objects in found for name, _, _ in objects}))
    if not names:
        raise UserError(
            f"no image of {split} in {', '.join(map(str, roots))} has an object; name another split"
        )
    places = {name: place for place, name in enumerate(names)}
    return AnnotatedSet(
        images=tuple(_finish(image, objects, places, findings) for image, objects in found),
        class_names=tuple(names),
        category_ids=tuple(range(1, len(names) + 1)),
        findings=findings,
    )


def split_file(root: Path, split: str, *, kind: str = "Main") -> Path:
    """The list of a split's images. Raises UserError, with the splits that are there, where it is missing."""
    path = root / "ImageSets" / kind / f"{split}.txt"
    if not path.is_file():
        present = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
        there = f"there are {', '.join(present)}" if present else f"{path.parent} has no list"
        raise UserError(f"{root} has no split {split} ({path.relative_to(root)}); {there}")
    return path


def _split_names(root: Path, split: str) -> list[str]:
    lines = split_file(root, split).read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


def _read_one(root: Path, name: str, findings: Findings) -> tuple[AnnotatedImage, list[_Object]] | None:
    path, notes = root / "JPEGImages" / f"{name}.jpg", root / "Annotations" / f"{name}.xml"
    if not path.is_file():
        findings.add("missing images, left out", name)
        return None
    if not notes.is_file():
        findings.add("images without an annotation file, left out", name)
        return None
    try:
        tree = parse_xml(notes)
        objects = [_object(element) for element in tree.iter("object")]
        height, width = _size(tree, path)
    except (ElementTree.ParseError, ValueError, OSError) as error:
        findings.add("annotation files that cannot be read, left out with their image", f"{name} ({error})")
        return None
    # Unlike the name, the path is of one folder alone: 2007 and 2012 may share a name.
    image = AnnotatedImage(image_id=str(path), path=path, height=height, width=width, instances=())
    return image, objects


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, by which entities could be made to grow")


def parse_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file. Raises ValueError for a DOCTYPE: without it no entity can be expanded."""
    parser = ElementTree.XMLParser(target=_NoDoctype())
    root: ElementTree.Element = ElementTree.fromstring(path.read_bytes(), parser=parser)
    return root


def _object(element: ElementTree.Element) -> _Object:
    name = (element.findtext("name") or "").strip()
    box = element.find("bndbox")
    if not name or box is None:
        raise ValueError("an object without name or bndbox")
    x0, y0, x1, y1 = (float(box.findtext(key) or "nan") for key in ("xmin", "ymin", "xmax", "ymax"))
    return name, (x0, y0, x1, y1), (element.findtext("difficult") or "0").strip() == "1"


def _size(tree: ElementTree.Element, path: Path) -> tuple[int, int]:
    """Height and width as the annotation says, or, where it does not, as the image's header does."""
    height, width = (int(float(tree.findtext(f"size/{key}") or 0)) for key in ("height", "width"))
    if height > 0 and width > 0:
        return height, width
    with Image.open(path) as image:
        return image.height, image.width


def _finish(
    image: AnnotatedImage, objects: Iterable[_Object], places: dict[str, int], findings: Findings
) -> AnnotatedImage:
    name = image.path.stem
    instances = []
    for class_name, (x0, y0, x1, y1), difficult in objects:
        if class_name not in places:
            findings.add("objects of an unknown class, left out", f"{name} ({class_name})")
            continue
        # Pixels count from 1 here and the far ones belong to the box: only the near edges move.
        edges = (x0 - 1, y0 - 1, x1, y1) if x1 > x0 and y1 > y0 else (math.nan,) * 4
        box = clip_box(edges, height=image.height, width=image.width, where=name, findings=findings)
        if box is not None:
            area = (box[2] - box[0]) * (box[3] - box[1])
            instances.append(Instance(box=box, label=places[class_name], difficult=difficult, area=area))
    if not instances:
        findings.add("images without a usable object (not trained on, judged)", name)
    return AnnotatedImage(
        image_id=image.image_id,
        path=image.path,
        height=image.height,
        width=image.width,
        instances=tuple(instances),
    )
