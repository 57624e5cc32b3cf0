"""Do the shards still hold what the catalog says? Every byte is read, every index compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from linerate.shards.catalog import REJECTED_NAME, Catalog
from linerate.shards.engines import choose_num_workers, run_tasks
from linerate.shards.errors import UserError
from linerate.shards.look_there import Look
from linerate.shards.verify_shard import Decode, Problem, VerifyTask


@dataclass(frozen=True)
class Report:
    """What verify_shards found."""

    num_shards: int
    num_samples: int
    num_bytes: int
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify_shards(
    catalog: Catalog,
    *,
    decode: Decode = "header",
    sample: float = 1.0,
    seed: int = 0,
    num_workers: int | None = None,
    url: str = "",
    on_progress: Callable[[float], None] = lambda samples: None,
) -> Report:
    """Read every shard and compare tar, index, marks and totals; nothing is changed.

    decode: how far each image is looked into besides its checksum: none, its header, or every pixel.
    sample: the share of the shards that is read, drawn by `seed`; of the others only the tar's size is seen.
    url: where the shards lie, if not in the catalog's folder (see look_there.py). Each comes into it once,
    whole, and is removed when it is looked at: one for each process is there at a time.
    Raises UserError for a share that is none.
    """
    chosen = choose_shards(catalog.num_shards, sample=sample, seed=seed)
    tasks = [
        VerifyTask(root=os.fspath(catalog.root), shard=shard, decode=decode, url=url) for shard in chosen
    ]
    found: dict[int, list[Problem]] = {}

    def on_done(index: int, problems: list[Problem]) -> None:
        found[chosen[index]] = problems

    num_bytes = int(catalog.shard_bytes[chosen].sum())

    failures = run_tasks(
        "linerate.shards.verify_shard:run_task",
        tasks,
        num_workers=choose_num_workers(num_workers, num_bytes=num_bytes, may_crash=decode == "full"),
        on_done=on_done,
        on_progress=on_progress,
    )
    failed = {chosen[index]: failure for index, failure in failures.items()}
    sizes = Look(catalog, url).sizes()
    problems = _check_folder(catalog, sizes)
    for shard, file in enumerate(catalog.files):
        if shard in failed:
            problems.append(Problem(file, f"{failed[shard].kind}: {failed[shard].text}"))
        problems.extend(found.get(shard, [] if shard in failed else _check_size(catalog, shard, sizes)))
    if url:
        problems = [replace(one, what=one.what.replace(os.fspath(catalog.root), url)) for one in problems]
    return Report(len(chosen), int(catalog.shard_sizes[chosen].sum()), num_bytes, problems)


def choose_shards(num_shards: int, *, sample: float, seed: int) -> list[int]:
    """This share of the shards, at least one, ascending. Raises UserError for a share that is none."""
    if not 0 < sample <= 1:
        raise UserError(
            f"--sample is {sample}; give a share of the shards above 0 and at most 1, such as 0.01"
        )
    count = max(1, round(sample * num_shards))
    return sorted(np.random.default_rng(seed).permutation(num_shards)[:count].tolist())


def _check_size(catalog: Catalog, shard: int, sizes: Mapping[str, int]) -> list[Problem]:
    """What can be said of a shard without reading it."""
    file, expected = catalog.files[shard], int(catalog.shard_bytes[shard])
    if file not in sizes:
        return [Problem(file, "the tar is missing")]
    said = f"the tar has {sizes[file]} bytes, the catalog says {expected}"
    return [] if sizes[file] == expected else [Problem(file, said)]


def _check_folder(catalog: Catalog, sizes: Mapping[str, int]) -> list[Problem]:
    """What no single shard shows: files too many, and the count of rejects."""
    root = catalog.root
    listed = set(catalog.files)
    problems = [
        Problem(name, "is not listed in the catalog")
        for name in sorted(sizes)
        if name.endswith(".tar") and "/" not in name and name not in listed
    ]
    try:
        rejected = pq.read_table(root / REJECTED_NAME, columns=["sample_id"])
    except (OSError, pa.ArrowException) as error:
        return [*problems, Problem(REJECTED_NAME, f"cannot be read ({type(error).__name__})")]
    places = pc.drop_null(rejected.column("sample_id")).to_numpy()
    if rejected.num_rows != catalog.num_rejected:
        problems.append(
            Problem(REJECTED_NAME, f"has {rejected.num_rows} rows, the catalog says {catalog.num_rejected}")
        )
    if len(np.unique(places)) + catalog.num_samples != catalog.num_planned:
        problems.append(
            Problem(
                REJECTED_NAME,
                f"{catalog.num_samples} samples and {len(np.unique(places))} rejects are not the "
                f"{catalog.num_planned} that were planned",
            )
        )
    return problems
