"""Tars read in place: of an image folder, of tars of its classes, or WebDataset samples (jpg, cls, json)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from linerate.shards.errors import UserError
from linerate.shards.sources import (
    MAX_JSON_BYTES,
    SourceReject,
    SourceRow,
    display_name,
    judge_name,
)
from linerate.shards.tar_reader import Member, OtherMember, is_tar, read_members

# WebDataset names what a member is by all that follows the first dot of its file name.
_IMAGE_FIELDS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "img", "image")
# What is held in memory of one tar: about 300 bytes a member.
MAX_MEMBERS = 10_000_000
NOT_DOWNLOADED = "not downloaded"


class TarSource:
    """The images of one or several tars.

    A member named .tar is read in place as the class folder of that name, as in ImageNet's train archive. A
    tar is WebDataset's if any member is named .cls or .json, or if an image has a caption named .txt.
    """

    def __init__(self, tars: Sequence[Path]) -> None:
        self._tars = list(tars)
        self._prefixes = key_prefixes([str(tar) for tar in self._tars])

    @property
    def containers(self) -> Sequence[Path | str]:
        return self._tars

    def rows(self) -> Iterator[SourceRow | SourceReject]:
        for container, (tar, prefix) in enumerate(zip(self._tars, self._prefixes, strict=True)):
            told = set()
            for row in _OpenTar(tar, container).rows(prefix):
                if isinstance(row, SourceReject) and row.reason == NOT_DOWNLOADED:
                    told.add(row.key)
                yield row
            yield from (reject for reject in _failed_downloads(tar, prefix) if reject.key not in told)


def key_prefixes(tars: Sequence[str]) -> list[str]:
    """What stands before a member's name in its key, for each tar.

    With several tars the same member name may occur in each, so the tar's name is part of the key.
    """
    names = [tar.rpartition("/")[2] for tar in tars]
    same = len(set(names)) < len(names)
    return [
        f"{tar if same else name}/" if len(tars) > 1 else "" for tar, name in zip(tars, names, strict=True)
    ]


class _OpenTar:
    """One of the tars, and where its rows say that they lie."""

    def __init__(self, tar: Path, container: int) -> None:
        self._tar = tar
        self._container = container

    def rows(
        self, prefix: str, *, within: Member | None = None, class_name: str | None = None
    ) -> Iterator[SourceRow | SourceReject]:
        """What the tar lists, or the tar `within` it, which is the folder of a class."""
        members, rejects = self._named_members(prefix, within)
        yield from rejects
        inner = {name: members.pop(name) for name in [*members] if name.endswith(".tar")}
        if any(name.endswith((".cls", ".json")) for name in members) or _has_captions(members):
            yield from self._webdataset_rows(members, prefix, class_name)
        else:
            yield from self._folder_rows(members, prefix, class_name)
        for name, member in inner.items():
            if within:
                yield SourceReject(prefix + name, member.size, "not an image", "a tar in a tar in a tar")
            elif name.rpartition("/")[2].startswith("."):
                yield SourceReject(prefix + name, member.size, "hidden", "its name begins with a dot")
            elif is_tar(self._tar, within=member):
                stem = name.removesuffix(".tar")
                yield from self.rows(f"{prefix}{stem}/", within=member, class_name=stem.rpartition("/")[2])
            else:
                yield SourceReject(prefix + name, member.size, "not an image", "a .tar file that is none")

    def _named_members(
        self, prefix: str, within: Member | None
    ) -> tuple[dict[str, Member], list[SourceReject]]:
        """The regular files by name, the later of two with one name as tar itself would extract it."""
        members: dict[str, Member] = {}
        rejects = []
        for item in read_members(self._tar, within=within):
            name = display_name(item.name)
            if isinstance(item, OtherMember):
                rejects.append(SourceReject(prefix + name, 0, "not a regular file", item.kind))
                continue
            if (old := members.pop(name, None)) is not None:
                detail = "a later member of the tar has its name"
                rejects.append(SourceReject(prefix + name, old.size, "replaced", detail))
            members[name] = item
            if len(members) + len(rejects) > MAX_MEMBERS:
                raise UserError(
                    f"the tar {self._tar} has more than {MAX_MEMBERS:,} members, which are held in memory to "
                    f"tell doubles and classes; give it as several tars"
                )
        return members, rejects

    def _folder_rows(
        self, members: dict[str, Member], prefix: str, class_name: str | None
    ) -> Iterator[SourceRow | SourceReject]:
        depth = _class_depth(members)
        for name, member in members.items():
            parts = name.split("/")
            if parts[-1].startswith("."):
                yield SourceReject(prefix + name, member.size, "hidden", "its name begins with a dot")
            elif reject := judge_name(prefix + name, member.size):
                yield reject
            else:
                label = class_name or (parts[depth] if len(parts) > depth + 1 else None)
                yield SourceRow(prefix + name, b"", self._container, member.offset, member.size, label)

    def _webdataset_rows(
        self, members: dict[str, Member], prefix: str, class_name: str | None
    ) -> Iterator[SourceRow | SourceReject]:
        samples: dict[str, dict[str, Member]] = {}
        for name, member in members.items():
            key, field = _key_and_field(name)
            samples.setdefault(key, {})[field] = member
        with self._tar.open("rb") as file:
            fd = file.fileno()
            for key, fields in samples.items():
                images = [field for field in _IMAGE_FIELDS if field in fields]
                if not images:
                    size = sum(member.size for member in fields.values())
                    yield SourceReject(prefix + key, size, *_why_no_image(fd, fields))
                    continue
                image = fields[images[0]]
                image_key = prefix + display_name(image.name)
                if reject := judge_name(image_key, image.size):
                    yield reject
                    continue
                stated, label = _parse_label(_read_small(fd, fields["cls"]) if "cls" in fields else b"")
                if stated is None and label < 0:
                    stated = class_name
                extra, problem = _metadata(fd, fields)
                if problem:
                    yield SourceReject(prefix + key, len(extra or b""), *problem)
                yield SourceRow(
                    image_key, b"", self._container, image.offset, image.size, stated, label, extra
                )


def _key_and_field(name: str) -> tuple[str, str]:
    folder, slash, file_name = name.rpartition("/")
    stem, _, field = file_name.partition(".")
    return folder + slash + stem, field.lower()


def _has_captions(members: dict[str, Member]) -> bool:
    """Does an image have a .txt of its name beside it?"""
    texts = {name[:-4] for name in members if name.endswith(".txt")}
    if not texts:
        return False
    fields = (_key_and_field(name) for name in members)
    return any(key in texts and field in _IMAGE_FIELDS for key, field in fields)


def _class_depth(members: dict[str, Member]) -> int:
    """How many folders all members share before class folders begin (`train/cat/1.jpg`: 1)."""
    folders = [name.split("/")[:-1] for name in members]
    if not folders:
        return 0
    shared = 0
    for level in zip(*folders, strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    # A tar of one class folder keeps that folder as its class.
    return min(shared, max(0, min(len(folder) for folder in folders) - 1))


def _parse_label(text: bytes) -> tuple[str | None, int]:
    """(name, number) of a .cls member: one of the two is known, or none."""
    text = text.strip()
    if text.isdigit() and len(text) <= 9:
        return None, int(text)
    return text.decode("utf-8", "replace") or None, -1


def _metadata(fd: int, fields: dict[str, Member]) -> tuple[bytes | None, tuple[str, str] | None]:
    """(JSON of a sample, what is wrong with it): a .txt is the caption where no .json has one."""
    stored = _read_small(fd, fields["json"]) if "json" in fields else None
    if "txt" not in fields or (stored and b'"caption"' in stored):
        return stored, None
    try:
        document = json.loads(stored) if stored else {}
        document["caption"] = _read_small(fd, fields["txt"]).decode("utf-8", "replace").strip()
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(), None
    except (ValueError, TypeError, RecursionError):
        return stored, ("caption left out", "its .json is no object that could hold its .txt")


def _why_no_image(fd: int, fields: dict[str, Member]) -> tuple[str, str]:
    """(reason, detail) for members of one key without an image among them."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        document = json.loads(_read_small(fd, fields["json"]) if "json" in fields else b"{}")
        if document.get("status", "success") != "success":
            return NOT_DOWNLOADED, _short(document.get("error_message") or document["status"])
    return "not an image", f"only {', '.join(sorted(fields))}"[:200]


def _failed_downloads(tar: Path, prefix: str) -> Iterator[SourceReject]:
    """What img2dataset's table beside its tar says it could not fetch: those have no member in the tar."""
    table = tar.with_suffix(".parquet")
    try:
        with pq.ParquetFile(table) as file:
            if not {"key", "status", "error_message"} <= set(file.schema_arrow.names):
                return
            columns = ["key", "status", "error_message"]
            for batch in file.iter_batches(columns=columns):
                for key, status, message in zip(*batch.to_pydict().values(), strict=True):
                    if status != "success":
                        yield SourceReject(f"{prefix}{key}", 0, NOT_DOWNLOADED, _short(message or status))
    except FileNotFoundError:
        return
    except (OSError, pa.ArrowException) as error:
        yield SourceReject(prefix + table.name, 0, "unreadable", _short(error))


def _short(text: object) -> str:
    """One line that any table takes, whatever JSON escapes it was made of."""
    return " ".join(str(text).split())[:200].encode("utf-8", "backslashreplace").decode()


def _read_small(fd: int, member: Member) -> bytes:
    if member.size > MAX_JSON_BYTES:
        raise UserError(
            f"{display_name(member.name)} has {member.size} bytes of metadata; "
            f"at most {MAX_JSON_BYTES} are taken for one image: shorten it, or leave it out"
        )
    return os.pread(fd, member.size, member.offset)
