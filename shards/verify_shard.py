"""One shard held against its own index, its mark and the catalog; every byte of it is read."""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.inspect_image import RejectedError, check_full_decode, check_header
from linerate.shards.pack_shard import MARK_KEY
from linerate.shards.tar_reader import Member, read_members

Decode = Literal["none", "header", "full"]
MAX_PROBLEMS = 100  # of one shard
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    file: str
    what: str
    sample_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyTask:
    """One shard to look at."""

    root: str
    shard: int
    decode: Decode
    url: str = ""
    """Where the shards lie if not in root: then this one is there only while it is looked at."""


def run_task(task: VerifyTask, report: Callable[[int], None]) -> list[Problem]:
    """The problems of one shard, at most MAX_PROBLEMS of them."""
    catalog = Catalog.load(task.root)
    with _brought(catalog, task):
        problems = _problems(catalog, task)
    report(int(catalog.shard_sizes[task.shard]))
    return problems


@contextlib.contextmanager
def _brought(catalog: Catalog, task: VerifyTask) -> Iterator[None]:
    if not task.url:
        yield
        return
    from linerate.shards.bucket import Bucket
    from linerate.shards.look_there import bring_file

    bucket = Bucket(task.url)
    paths: list[Path] = []
    try:
        for suffix in (".parquet", ".idx", ".tar"):
            paths.append(catalog.shard_path(task.shard).with_suffix(suffix))
            bring_file(catalog, bucket, task.shard, suffix)
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _problems(catalog: Catalog, task: VerifyTask) -> list[Problem]:
    file = catalog.files[task.shard]
    problems = []
    for problem in _check_shard(catalog, task.shard, task.decode):
        problems.append(Problem(file, *problem))
        if len(problems) == MAX_PROBLEMS:
            problems.append(Problem(file, f"more than {MAX_PROBLEMS} problems; the rest is not listed"))
            break
    return problems


Found = tuple[str] | tuple[str, int]


def _check_shard(catalog: Catalog, shard: int, decode: Decode) -> Iterator[Found]:
    path = catalog.shard_path(shard)
    try:
        table = catalog.load_table(shard)
    except UserError as error:
        yield (str(error),)
        table = None
    else:
        yield from _check_mark(catalog, shard, table)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _check_bytes(catalog, shard, data)
            mark = load_mark_fields(table)
            members, damage = list_members(path)
            if damage and not mark.get("damage"):
                yield (damage,)
            if table is not None:
                yield from _check_samples(catalog, table, members, memoryview(data), decode)
    except FileNotFoundError:
        yield ("the tar is missing",)
        return
    except (UserError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        yield (str(error),)
        return
    if not damage:  # of a damaged tar the index tells more than its headers
        left_out = {sample_id for sample_id, *_ in mark.get("rejects", [])}
        yield from _check_text_index(path.with_suffix(".idx"), members, left_out)


def load_mark_fields(table: Any) -> dict[str, Any]:
    """The mark of a shard's .parquet; empty where there is none."""
    try:
        return dict(json.loads(table.schema.metadata[MARK_KEY]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def list_members(tar: Path) -> tuple[list[Any], str]:
    """(members, what is wrong): those before the place where the tar is damaged, all where nothing is."""
    members = []
    try:
        for member in read_members(tar):
            members.append(member)
    except UserError as error:
        return members, str(error)
    return members, ""


def _check_mark(catalog: Catalog, shard: int, table: Any) -> Iterator[Found]:
    mark = load_mark_fields(table)
    if not mark:
        yield ("the .parquet has no mark of a finished shard",)
        return
    expected = {
        "plan_id": catalog.shard_plan_id(shard),
        "samples": int(catalog.shard_sizes[shard]),
        "tar_bytes": int(catalog.shard_bytes[shard]),
        "tar_xxh3": int(catalog.shard_xxh3[shard]),
    }
    for key, value in expected.items():
        if mark.get(key) != value:
            yield (f"the .parquet's mark says {key} {mark.get(key)}, the catalog {value}",)


def _check_bytes(catalog: Catalog, shard: int, data: mmap.mmap) -> Iterator[Found]:
    size, expected = len(data), int(catalog.shard_bytes[shard])
    if size != expected:
        yield (f"the tar has {size} bytes, the catalog says {expected}",)
    elif (digest := xxhash.xxh3_64_intdigest(data)) != int(catalog.shard_xxh3[shard]):
        yield (f"the tar's xxh3_64 is {digest:016x}, the catalog says {int(catalog.shard_xxh3[shard]):016x}",)


def _check_samples(
    catalog: Catalog, table: Any, members: list[Any], data: memoryview, decode: Decode
) -> Iterator[Found]:
    mark = load_mark_fields(table)
    samples = group_members(members)
    rows = table.to_pylist()
    ids = {row["sample_id"] for row in rows}
    for sample_id in samples.keys() - ids - {reject[0] for reject in mark.get("rejects", [])}:
        yield (f"the tar holds {sample_id}, the .parquet does not",)
    with data:
        for row in rows:
            sample_id = row["sample_id"]
            image = samples.get(f"{sample_id:012d}", samples.get(sample_id, {})).get("jpg")
            if image is None and mark.get("damage"):  # the tar's header is damaged, not the image
                with data[row["offset"] : row["offset"] + row["size"]] as jpeg:
                    yield from ((what, sample_id) for what in _check_jpeg(jpeg, row, decode))
            elif image is None:
                yield "the .parquet lists it, the tar does not hold it", sample_id
            elif (image.offset, image.size) != (row["offset"], row["size"]):
                yield (
                    f"lies at {image.offset} with {image.size} bytes, the .parquet says {row['offset']} with "
                    f"{row['size']}",
                    sample_id,
                )
            else:
                with data[image.offset : image.offset + image.size] as jpeg:
                    yield from ((what, sample_id) for what in _check_jpeg(jpeg, row, decode))
                yield from (
                    (what, sample_id)
                    for what in _check_label(samples[sample_id].get("cls"), row["label"], data, catalog)
                )


def group_members(members: list[Any]) -> dict[Any, dict[str, Member]]:
    """Sample id (or the member's name, where it is none) -> extension -> member."""
    samples: dict[Any, dict[str, Member]] = {}
    for member in members:
        stem, _, extension = member.name.decode("utf-8", "backslashreplace").partition(".")
        samples.setdefault(int(stem) if stem.isdigit() else stem, {})[extension] = member
    return samples


def _check_jpeg(jpeg: memoryview, row: dict[str, Any], decode: Decode) -> Iterator[str]:
    if xxhash.xxh3_64_intdigest(jpeg) != row["xxh3_64"]:
        yield "its bytes differ from the checksum in the .parquet"
        return
    if decode == "none":
        return
    try:
        header = check_header(jpeg, max_pixels=NO_LIMIT)
        if decode == "full":
            check_full_decode(jpeg, header)
    except RejectedError as error:
        yield str(error)
        return
    if (header.height, header.width) != (row["height"], row["width"]):
        yield f"is {header.width} x {header.height}, the .parquet says {row['width']} x {row['height']}"


def _check_label(member: Member | None, label: int, data: memoryview, catalog: Catalog) -> Iterator[str]:
    text = (
        bytes(data[member.offset : member.offset + member.size]).decode("ascii", "replace")
        if member
        else "-1"
    )
    if text != str(label):
        yield f"its label is {label} in the .parquet, {text if member else 'none'} in the tar"
    elif label >= len(catalog.class_names):
        yield f"its label is {label}, the catalog names {len(catalog.class_names)} classes"


def text_index(members: list[Any], left_out: Collection[int] = ()) -> str:
    """DALI's text index v1.2 of a tar whose samples' members lie together, without these samples."""
    lines = [
        " ".join(f"{ext} {m.offset} {m.size} {m.name.decode()}" for ext, m in fields.items()) + "\n"
        for sample_id, fields in group_members(members).items()
        if sample_id not in left_out
    ]
    return "".join([f"v1.2 {len(lines)}\n", *lines])


def _check_text_index(path: Path, members: list[Any], left_out: Collection[int]) -> Iterator[Found]:
    try:
        stored = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        yield ("its .idx is missing",)
        return
    expected = text_index(members, left_out)
    if stored != expected:
        pairs = zip(stored.splitlines(), expected.splitlines(), strict=False)
        line = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(stored.count("\n"), expected.count("\n"))
        )
        yield (f"its .idx differs from the tar from line {line + 1} on",)
