"""Embeddings of a whole set of shards as one file, written part by part, so that a killed run goes on.

Parts lie beside the file in `.NAME.parts/`; the file appears whole at the end, under its name. A row is a
sample, in the order of positions. Parquet: sample_id, key, label, feature (a list of D).
.npy: (N, D) alone, row i is position i.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from linerate.pipeline.evaluation_views import CropBackend, open_images
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.terminal import make_parent
from linerate.train.evaluate.features import Encode, evaluation_resize

Dtype = Literal["float32", "float16"]
PART_ROWS = 8192
METADATA_NAME = "linerate.features"
_NAMES = ("sample_id", "key", "label")


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """What a feature file is of; parts of another are not taken over."""

    checkpoint: str
    """Name of the checkpoint, and with it the step."""
    weights_xxh3: str
    """Hash of the query encoder's weights."""
    plan_id: str
    """Of the shards."""
    num_samples: int
    features: str
    """backbone or projection."""
    size: int
    """Side of the images, pixels."""
    dtype: Dtype
    backend: CropBackend = "dali"
    """Whose centre crops they are of."""


def write_features(
    encode: Encode,
    catalog: Catalog,
    source: FeatureSource,
    *,
    out: Path,
    backend: CropBackend = "dali",
    device: str = "cpu",
    batch: int = 256,
    num_threads: int | None = None,
    part_rows: int = PART_ROWS,
    advance: Callable[[float], None] = lambda _: None,
) -> int:
    """Write the features of every sample to `out` (.parquet or .npy) and return D.

    Parts that a run before left are taken over. Raises UserError where `out` exists, has another ending, or
    parts of other features lie beside it.
    """
    require_writable(out)
    parts = out.with_name(f".{out.name}.parts")
    _open_parts(parts, source, part_rows=part_rows, out=out)
    starts = range(0, catalog.num_samples, part_rows)
    missing = [start for start in starts if not _part(parts, start).exists()]
    advance(catalog.num_samples - sum(min(part_rows, catalog.num_samples - start) for start in missing))
    for start in missing:
        positions = np.arange(start, min(start + part_rows, catalog.num_samples))
        rows = _encode_part(
            encode,
            catalog,
            positions,
            source,
            backend=backend,
            device=device,
            batch=batch,
            num_threads=num_threads,
            advance=advance,
        )
        _save_whole(_part(parts, start), partial(_write_npy, rows=rows))
    arrays = [np.load(_part(parts, start), mmap_mode="r") for start in starts]
    # Joined among the parts, which a run after a kill takes over and removes at the end.
    joined = parts / f"joined{out.suffix}"
    if out.suffix == ".npy":
        _save_whole(joined, lambda path: _join_npy(path, arrays))
    else:
        _save_whole(joined, lambda path: _join_parquet(path, arrays, catalog, source, part_rows=part_rows))
    joined.replace(out)
    shutil.rmtree(parts)
    return int(arrays[0].shape[1])


def require_writable(out: Path) -> None:
    """Raise UserError where `out` has an unknown ending or is there already; make its folder."""
    if out.suffix not in (".parquet", ".npy"):
        raise UserError(f"--out {out} ends in neither .parquet nor .npy; name it {out.stem}.parquet")
    if out.exists():
        raise UserError(f"--out {out} is there already; remove it, or name another")
    make_parent(out)


@torch.inference_mode()
def _encode_part(
    encode: Encode,
    catalog: Catalog,
    positions: NDArray[np.int64],
    source: FeatureSource,
    *,
    backend: CropBackend,
    device: str,
    batch: int,
    num_threads: int | None,
    advance: Callable[[float], None],
) -> NDArray[Any]:
    rows = []
    images = open_images(
        catalog,
        size=source.size,
        resize=evaluation_resize(catalog, source.size),
        backend=backend,
        device=device,
        num_threads=num_threads,
        batch=batch,
        positions=positions,
    )
    for part in images:
        rows.append(encode(part.images).float().cpu().numpy().astype(source.dtype))
        advance(len(part.label))
    return np.concatenate(rows)


def _open_parts(parts: Path, source: FeatureSource, *, part_rows: int, out: Path) -> None:
    about = parts / "about.json"
    mine = {**asdict(source), "part_rows": part_rows}
    if about.exists():
        theirs = json.loads(about.read_text(encoding="utf-8"))
        if other := [
            f"{name} {theirs.get(name)} (now {mine[name]})" for name in mine if theirs.get(name) != mine[name]
        ]:
            raise UserError(
                f"{parts} holds parts of other features: {', '.join(other)}; remove it, "
                f"or name another --out than {out}"
            )
        return
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror or error}); name another") from None
    _save_whole(about, lambda path: path.write_text(json.dumps(mine, indent=1), encoding="utf-8"))


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:012d}.npy"


def _write_npy(path: Path, rows: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, rows)


def _join_npy(path: Path, arrays: list[NDArray[Any]]) -> None:
    shape = (sum(len(array) for array in arrays), arrays[0].shape[1])
    joined = np.lib.format.open_memmap(path, mode="w+", dtype=arrays[0].dtype, shape=shape)
    start = 0
    for array in arrays:
        joined[start : start + len(array)] = array
        start += len(array)
    joined.flush()


def _join_parquet(
    path: Path, arrays: list[NDArray[Any]], catalog: Catalog, source: FeatureSource, *, part_rows: int
) -> None:
    kind = pa.float16() if source.dtype == "float16" else pa.float32()
    dim = arrays[0].shape[1]
    about = json.dumps({**asdict(source), "class_names": catalog.class_names})
    schema = pa.schema(
        [
            ("sample_id", pa.int64()),
            ("key", pa.string()),
            ("label", pa.int32()),
            ("feature", pa.list_(kind, dim)),
        ],
        metadata={METADATA_NAME: about},
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for array, rows in zip(arrays, _rows(catalog, part_rows), strict=True):
            feature = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1), kind), dim)
            columns = [rows.column(name).combine_chunks() for name in _NAMES]
            writer.write_table(pa.Table.from_arrays([*columns, feature], schema=schema))


def _rows(catalog: Catalog, part_rows: int) -> Iterator[Any]:
    """What the index says of each part's rows; one shard's index is at hand at a time."""
    waiting = catalog.load_table(0, [*_NAMES])
    for shard in range(1, catalog.num_shards + 1):
        while len(waiting) >= part_rows:
            yield waiting.slice(0, part_rows)
            waiting = waiting.slice(part_rows)
        if shard < catalog.num_shards:
            waiting = pa.concat_tables([waiting, catalog.load_table(shard, [*_NAMES])])
    if len(waiting):
        yield waiting


def load_features(path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    """(N, D) features of a .parquet that write_features made, and what it is of.

    Raises UserError where the file is missing or is another.
    """
    try:
        table = pq.read_table(path, columns=["feature"])
        about = json.loads(table.schema.metadata[METADATA_NAME.encode()])
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there; make it with `linerate features RUN --shards S --out {path}`"
        ) from None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no feature file of `linerate features`; make it anew") from None
    column = table.column("feature").combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1), about


def _save_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, fsync, rename: the file is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); mend that: the same command goes on from "
            "the parts that are there"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
