"""Classes of images that no folder tells: ImageNet's validation set with its ground truth."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from linerate.shards.errors import UserError
from linerate.shards.matlab_file import read_struct_array
from linerate.shards.sources import Source, SourceReject, SourceRow

MAX_BYTES = 64 << 20  # of a list, or of an unpacked devkit; ILSVRC2012's has 11 MB
_IDS_NAME = "ILSVRC2012_validation_ground_truth.txt"
_META_NAME = "meta.mat"
_WNID = re.compile(r"n\d{8}")
_WAYS = (
    "give ILSVRC2012_devkit_t12.tar.gz as it was downloaded, LOC_val_solution.csv of Kaggle, a text of one "
    "`wnid` per image in the order of their names, or one of `name wnid` lines"
)


@dataclass(frozen=True)
class GroundTruth:
    """The class of every image: by the stem of its name, or in the order of all names."""

    path: Path
    by_stem: dict[str, str] | None
    in_order: list[str] | None


@dataclass(frozen=True)
class LabelledSource:
    """A source whose classes are those of a ground truth; an image that it does not name is a reject."""

    source: Source
    truth: GroundTruth

    @property
    def containers(self) -> Sequence[Path | str]:
        return self.source.containers

    def rows(self) -> Iterator[SourceRow | SourceReject]:
        classes = self._classes()
        for row in self.source.rows():
            if isinstance(row, SourceReject):
                yield row
            elif (name := classes.get(_stem(row.key))) is None:
                yield SourceReject(row.key, row.size, "no label", f"{self.truth.path.name} does not name it")
            else:
                yield SourceRow(
                    row.key, row.path, row.container, row.offset, row.size, name, extra_json=row.extra_json
                )

    def _classes(self) -> dict[str, str]:
        stems = sorted(_stem(row.key) for row in self.source.rows() if isinstance(row, SourceRow))
        for a, b in itertools.pairwise(stems):
            if a == b:
                raise UserError(
                    f"{self.truth.path} labels images by name, but the source has {a} more than once; give a "
                    f"source without doubles, or leave --ground-truth out"
                )
        if self.truth.in_order is not None:
            if len(stems) != len(self.truth.in_order):
                raise UserError(
                    f"{self.truth.path} has {len(self.truth.in_order)} lines, one per image in the order of "
                    f"their names, but the source has {len(stems)} images; give the whole set, or a list of "
                    f"`name wnid` lines"
                )
            return dict(zip(stems, self.truth.in_order, strict=True))
        classes = self.truth.by_stem or {}
        if stems and not any(stem in classes for stem in stems):
            raise UserError(
                f"{self.truth.path} names no image of the source: it has {', '.join(sorted(classes)[:2])}, "
                f"the source {', '.join(stems[:2])}; give the list of this set"
            )
        return classes


def load_ground_truth(path: Path) -> GroundTruth:
    """The classes that a devkit, Kaggle's table or a list states. Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"--ground-truth {path} is no file; {_WAYS}")
    stored = _read_bounded(path)
    try:
        if stored[:2] == b"\x1f\x8b":
            ids, meta = _read_devkit(path, stored)
            return _from_ids(path, ids, meta)
        lines = stored.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"--ground-truth {path} is neither a devkit nor a text; {_WAYS}") from None
    lines = [line.strip() for line in lines if line.strip()]
    if lines and all(line.isdecimal() for line in lines):
        meta_path = path.parent / _META_NAME
        if not meta_path.is_file():
            raise UserError(
                f"--ground-truth {path} names classes by the devkit's own numbers, which its {_META_NAME} "
                f"explains: put that beside it, or {_WAYS}"
            )
        return _from_ids(path, lines, _read_bounded(meta_path))
    if lines and lines[0].startswith("ImageId,"):
        return _by_name(path, [row[:2] for row in csv.reader(lines[1:])])
    words = [re.split(r"[\s,]+", line) for line in lines]
    if words and all(len(line) == 1 and _WNID.fullmatch(line[0]) for line in words):
        return GroundTruth(path, None, [line[0] for line in words])
    return _by_name(path, words)


def _by_name(path: Path, rows: list[list[str]]) -> GroundTruth:
    """rows: an image's name, then its class, maybe with boxes behind it."""
    classes: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        wnid = row[1].split()[0] if len(row) == 2 and row[1].strip() else ""
        if not _WNID.fullmatch(wnid):
            raise UserError(
                f"--ground-truth {path}: entry {number}, {' '.join(row)[:80]!r}, is no name with a wnid such "
                f"as n01440764; {_WAYS}"
            )
        classes[_stem(row[0])] = wnid
    if not classes:
        raise UserError(f"--ground-truth {path} is empty; {_WAYS}")
    return GroundTruth(path, classes, None)


def _from_ids(path: Path, ids: list[str], meta: bytes) -> GroundTruth:
    try:
        synsets = read_struct_array(meta, "synsets", ("ILSVRC2012_ID", "WNID"))
    except ValueError as error:
        raise UserError(
            f"the {_META_NAME} of --ground-truth {path} cannot be read: {error}; {_WAYS}"
        ) from None
    wnid_of = {
        int(number): wnid for number, wnid in synsets if isinstance(number, float) and number.is_integer()
    }
    try:
        return GroundTruth(path, None, [str(wnid_of[int(number)]) for number in ids])
    except (KeyError, ValueError) as error:
        raise UserError(f"--ground-truth {path} has the class {error}, its {_META_NAME} does not") from None


def _read_devkit(path: Path, stored: bytes) -> tuple[list[str], bytes]:
    """(classes by number, meta.mat) out of the devkit's archive; nothing of it is written anywhere."""
    try:
        with gzip.open(io.BytesIO(stored)) as file:
            unpacked = file.read(MAX_BYTES + 1)
        if len(unpacked) > MAX_BYTES:
            raise UserError(f"--ground-truth {path} unpacks to more than {MAX_BYTES} bytes; {_WAYS}")
        found: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                wanted = name in (_IDS_NAME, _META_NAME) and member.isreg() and member.size <= MAX_BYTES
                if wanted and (data := archive.extractfile(member)):
                    found.setdefault(name, data.read())
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--ground-truth {path} is no sound .tar.gz: {error}; fetch it again") from None
    if missing := {_IDS_NAME, _META_NAME} - found.keys():
        raise UserError(f"--ground-truth {path} holds no {' and no '.join(sorted(missing))}; {_WAYS}")
    return found[_IDS_NAME].decode("latin-1").split(), found[_META_NAME]


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        stored = file.read(MAX_BYTES + 1)
    if len(stored) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES} bytes, which no ground truth has; {_WAYS}")
    return stored


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]
