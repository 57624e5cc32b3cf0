"""What a set of shards holds: `catalog.json` and one row per shard; per-sample indices load lazily."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from linerate.shards.errors import UserError

FORMAT_VERSION = 1
CATALOG_NAME = "catalog.json"
SHARDS_NAME = "shards.parquet"
REJECTED_NAME = "rejected.parquet"

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]
UInt64s = NDArray[np.uint64]


@dataclass(frozen=True)
class ShardIndex:
    """Where every sample of one shard lies, in tar order; n samples."""

    sample_id: Int64s
    """(n,) the planned place; ascending, with gaps where a sample was rejected."""
    offset: Int64s
    """(n,) of the JPEG's first byte inside the tar."""
    size: Int64s
    """(n,) bytes of the JPEG."""
    height: Int32s
    """(n,) pixels."""
    width: Int32s
    """(n,) pixels."""
    label: Int32s
    """(n,) index into the catalog's class_names, -1 where there is none."""
    xxh3_64: UInt64s
    """(n,) checksum of the JPEG."""

    def __len__(self) -> int:
        return len(self.sample_id)


class Bring(Protocol):
    """Has a file of a shard here before it is opened, wherever it lies. Raises UserError where it cannot."""

    def __call__(self, shard: int, suffix: str) -> Path: ...


@dataclass(frozen=True, eq=False)
class Catalog:
    """The header of a finished set of shards; S shards, N samples at positions 0..N-1."""

    root: Path
    name: str
    seed: int
    options: dict[str, Any]
    """Every option that decides the bytes, as they were given when packing."""
    plan_id: str
    """Hash of the options and of the planned list of samples; every shard's mark repeats it."""
    class_names: tuple[str, ...]
    num_samples: int
    num_planned: int
    """Samples that were given a place; the ones of them that were rejected leave a gap."""
    num_rejected: int
    """Rows of rejected.parquet: rejected places and files that got none."""
    filtered: dict[str, int]
    """Rows of the source that each filter left out, which are listed nowhere."""
    max_height: int
    max_width: int
    max_sample_bytes: int
    files: list[str]
    """S tar names, relative to root."""
    shard_sizes: Int64s
    """(S,) samples per shard."""
    shard_bytes: Int64s
    """(S,) bytes of each tar."""
    shard_xxh3: UInt64s
    """(S,) xxh3_64 of each tar."""
    listed_id: str = ""
    """The plan's id before equal images were dropped from it; empty where none were looked for."""
    appends: tuple[dict[str, Any], ...] = ()
    """What was added to the shards later, in order: plan, options, first shard and sample, counts."""
    bring: Bring | None = None
    """What fetches tars and indexes of shards that lie elsewhere; None: all are in root."""
    open_there: Callable[[int], BinaryIO] | None = None
    """What opens a shard's tar where it lies, for a few reads; None: as `bring` says."""

    @classmethod
    def load(cls, root: Path | str) -> Catalog:
        """The catalog of the folder `root`; reads two small files.

        Raises UserError when there is none, when it is of a newer version, and when it is cut short.
        """
        _refuse_url(str(root))
        root = Path(root)
        header = _load_header(root)
        try:
            table = _without_unfinished(pq.read_table(root / SHARDS_NAME), header)
            sizes, size_bytes, xxh3 = (_column(table, name) for name in ("samples", "bytes", "xxh3"))
            files = table.column("file").to_pylist()
            totals: dict[str, Any] = {key: int(header[key]) for key in _TOTALS}
            catalog = cls(
                root=root,
                name=str(header["name"]),
                seed=int(header["seed"]),
                options=dict(header["options"]),
                plan_id=str(header["plan_id"]),
                class_names=tuple(header["class_names"]),
                filtered=dict(header.get("filtered", {})),
                listed_id=str(header.get("listed_id") or ""),
                files=files,
                shard_sizes=sizes.astype(np.int64),
                shard_bytes=size_bytes.astype(np.int64),
                shard_xxh3=xxh3.astype(np.uint64),
                appends=tuple(header.get("appends") or ()),
                **totals,
            )
        except (KeyError, TypeError, ValueError, pa.ArrowException, OSError) as error:
            raise UserError(
                f"{root / SHARDS_NAME} or {CATALOG_NAME} beside it is damaged ({_first_line(error)}); "
                f"`linerate shard pack` with the source and options of these shards writes both again"
            ) from None
        if len(files) != int(header["num_shards"]) or int(sizes.sum()) != catalog.num_samples:
            raise UserError(
                f"{root / SHARDS_NAME} lists {len(files)} shards with {int(sizes.sum())} samples, but "
                f"{CATALOG_NAME} says {header['num_shards']} with {catalog.num_samples}; one of the two is "
                f"from another run: copy both again"
            )
        return catalog

    @property
    def num_shards(self) -> int:
        return len(self.files)

    @functools.cached_property
    def starts(self) -> Int64s:
        """(S+1,) position of each shard's first sample; the last entry is N."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.shard_sizes)])

    def shard_plan_id(self, shard: int) -> str:
        """The plan that wrote this shard, as its mark repeats it; several where shards were appended."""
        number = int(self.files[shard].removesuffix(".tar").rpartition("-")[2])
        return plan_id_of(vars(self), number)

    def shard_path(self, shard: int) -> Path:
        """The tar of this shard."""
        return self.root / self.files[shard]

    def ready_path(self, shard: int, suffix: str = ".tar") -> Path:
        """A file of this shard that can be opened: fetched first where it lies elsewhere."""
        return self.bring(shard, suffix) if self.bring else self.shard_path(shard).with_suffix(suffix)

    def open_tar(self, shard: int) -> BinaryIO:
        """The tar of this shard, for a few reads at any place."""
        return self.open_there(shard) if self.open_there else self.ready_path(shard).open("rb")

    def shard_index(self, shard: int) -> ShardIndex:
        """Load the numeric columns of one shard's index. Raises UserError when it is missing or cut short."""
        names = [field.name for field in fields(ShardIndex)]
        table = self.load_table(shard, names)
        return ShardIndex(*(_column(table, name) for name in names))

    def keys(self, shard: int) -> list[str]:
        """Load the samples' keys in the source (a path inside it), in tar order."""
        return list(self.load_table(shard, ["key"]).column("key").to_pylist())

    def load_table(self, shard: int, columns: list[str] | None = None) -> Any:
        """Load columns of one shard's .parquet as an Arrow table of shard_sizes[shard] rows."""
        path = self.ready_path(shard, ".parquet")
        try:
            table = pq.read_table(path, columns=columns)
        except FileNotFoundError:
            raise UserError(f"the index {path} is missing; {_PACK_AGAIN}") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"the index {path} is damaged ({_first_line(error)}); {_PACK_AGAIN}") from None
        if table.num_rows != self.shard_sizes[shard]:
            raise UserError(
                f"the index {path} has {table.num_rows} rows, {SHARDS_NAME} says "
                f"{self.shard_sizes[shard]}; {_PACK_AGAIN}"
            )
        return table


_TOTALS = ("num_samples", "num_planned", "num_rejected", "max_height", "max_width", "max_sample_bytes")
_PACK_AGAIN = "copy it again, or run the same `linerate shard pack` again, which writes what is missing"


def write_catalog(root: Path, *, header: Mapping[str, Any], shards: Any) -> None:
    """Write shards.parquet and then catalog.json, each under a temporary name and then renamed.

    shards: Arrow table with columns file, samples, bytes, xxh3.
    """
    temp = root / f".{SHARDS_NAME}.tmp"
    pq.write_table(shards, temp)
    _sync_rename(temp, root / SHARDS_NAME)
    document = {"format_version": FORMAT_VERSION, "num_shards": shards.num_rows, **header}
    temp = root / f".{CATALOG_NAME}.tmp"
    temp.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync_rename(temp, root / CATALOG_NAME)


def plan_id_of(header: Mapping[str, Any], number: int) -> str:
    """The plan that wrote the shard whose files have this number, by a catalog's header."""
    appends = list(header.get("appends") or ())
    if not appends:
        return str(header["plan_id"])
    wrote = [append["plan_id"] for append in appends if append["first_shard"] <= number]
    return str(wrote[-1] if wrote else appends[0]["base_plan_id"])


def _without_unfinished(table: Any, header: Mapping[str, Any]) -> Any:
    """The rows that the header counts: an append writes the longer table first, then the header."""
    counted = table.slice(0, int(header["num_shards"]))
    whole = pc.sum(counted.column("samples")).as_py() == int(header["num_samples"])
    return counted if whole else table


def _refuse_url(root: str) -> None:
    # As a Path, which the command line makes of it, a URL has lost its second slash.
    if found := re.match(r"(s3|gs):/+(.*)", root):
        scheme, rest = found.groups()
        tool = "aws s3 cp" if scheme == "s3" else "gcloud storage cp"
        raise UserError(
            f"{scheme}://{rest} is not on this machine, and shards are looked at where they lie on a disk; "
            f"copy them first: {tool} --recursive {scheme}://{rest} FOLDER"
        )


def _sync_rename(temp: Path, path: Path) -> None:
    with temp.open("rb") as file:
        os.fsync(file.fileno())
    temp.replace(path)


def _load_header(root: Path) -> dict[str, Any]:
    path = root / CATALOG_NAME
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        version = int(header["format_version"])
    except (FileNotFoundError, NotADirectoryError):
        if (root / ".pack").is_dir():
            raise UserError(
                f"the shards in {root} are not finished; the same `linerate shard pack` again continues"
            ) from None
        raise UserError(
            f"there is no {CATALOG_NAME} in {root}; give a folder that `linerate shard pack` wrote"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({_first_line(error)}); remove it and run the same "
            f"`linerate shard pack` again, which keeps the whole shards"
        ) from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this linerate reads up to {FORMAT_VERSION}; "
            f"upgrade linerate, or pack the source again"
        )
    return dict(header)


def _column(table: Any, name: str) -> NDArray[Any]:
    return np.ascontiguousarray(table.column(name).to_numpy())


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
