"""Tars read in place: of an image folder, or WebDataset samples (jpg, cls, json under one key)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from linerate.shards.errors import UserError
from linerate.shards.sources import (
    MAX_JSON_BYTES,
    SourceReject,
    SourceRow,
    display_name,
    judge_name,
)
from linerate.shards.tar_reader import Member, OtherMember, read_members

# WebDataset names what a member is by all that follows the first dot of its file name.
_IMAGE_FIELDS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "img", "image")


class TarSource:
    """The images of one or several tars; each tar is WebDataset's if any member is named .cls or .json."""

    def __init__(self, tars: Sequence[Path]) -> None:
        self._tars = list(tars)
        names = [tar.name for tar in self._tars]
        same = len(set(names)) < len(names)
        # With several tars the same member name may occur in each, so the tar's name is part of the key.
        self._prefixes = [f"{tar if same else tar.name}/" if len(names) > 1 else "" for tar in self._tars]

    @property
    def containers(self) -> list[Path]:
        return self._tars

    def rows(self) -> Iterator[SourceRow | SourceReject]:
        for container, (tar, prefix) in enumerate(zip(self._tars, self._prefixes, strict=True)):
            members, rejects = _named_members(tar, prefix)
            yield from rejects
            webdataset = any(name.endswith((".cls", ".json")) for name in members)
            list_rows = _webdataset_rows if webdataset else _folder_rows
            yield from list_rows(tar, members, container=container, prefix=prefix)


def _named_members(tar: Path, prefix: str) -> tuple[dict[str, Member], list[SourceReject]]:
    """The regular files of a tar by name, the later of two with one name as tar itself would extract it."""
    members: dict[str, Member] = {}
    rejects = []
    for item in read_members(tar):
        name = display_name(item.name)
        if isinstance(item, OtherMember):
            rejects.append(SourceReject(prefix + name, 0, "not a regular file", item.kind))
            continue
        if (old := members.pop(name, None)) is not None:
            rejects.append(
                SourceReject(prefix + name, old.size, "replaced", "a later member of the tar has its name")
            )
        members[name] = item
    return members, rejects


def _folder_rows(
    tar: Path, members: dict[str, Member], *, container: int, prefix: str
) -> Iterator[SourceRow | SourceReject]:
    depth = _class_depth(members)
    for name, member in members.items():
        parts = name.split("/")
        if parts[-1].startswith("."):
            yield SourceReject(prefix + name, member.size, "hidden", "its name begins with a dot")
        elif reject := judge_name(prefix + name, member.size):
            yield reject
        else:
            label_name = parts[depth] if len(parts) > depth + 1 else None
            yield SourceRow(prefix + name, b"", container, member.offset, member.size, label_name)


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


def _webdataset_rows(
    tar: Path, members: dict[str, Member], *, container: int, prefix: str
) -> Iterator[SourceRow | SourceReject]:
    samples: dict[str, dict[str, Member]] = {}
    for name, member in members.items():
        folder, _, file_name = name.rpartition("/")
        stem, _, field = file_name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        samples.setdefault(key, {})[field.lower()] = member
    with tar.open("rb") as file:
        fd = file.fileno()
        for key, fields in samples.items():
            images = [field for field in _IMAGE_FIELDS if field in fields]
            if not images:
                size = sum(member.size for member in fields.values())
                yield SourceReject(prefix + key, size, "not an image", f"only {', '.join(sorted(fields))}")
                continue
            image = fields[images[0]]
            image_key = prefix + display_name(image.name)
            if reject := judge_name(image_key, image.size):
                yield reject
                continue
            label, extra = fields.get("cls"), fields.get("json")
            yield SourceRow(
                image_key,
                b"",
                container,
                image.offset,
                image.size,
                *_parse_label(_read_small(fd, label) if label else b""),
                _read_small(fd, extra) if extra else None,
            )


def _parse_label(text: bytes) -> tuple[str | None, int]:
    """(name, number) of a .cls member: one of the two is known, or none."""
    text = text.strip()
    if text.isdigit() and len(text) <= 9:
        return None, int(text)
    return text.decode("utf-8", "replace") or None, -1


def _read_small(fd: int, member: Member) -> bytes:
    if member.size > MAX_JSON_BYTES:
        raise UserError(
            f"{display_name(member.name)} has {member.size} bytes of metadata; "
            f"at most {MAX_JSON_BYTES} are taken for one image: shorten it, or leave it out"
        )
    return os.pread(fd, member.size, member.offset)
