"""Add new images to finished shards as new shards; what is there keeps every byte, and its numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from linerate.shards.catalog import CATALOG_NAME, REJECTED_NAME, SHARDS_NAME, Catalog
from linerate.shards.errors import UserError
from linerate.shards.options import Sizing
from linerate.shards.out_folder import WORK_NAME
from linerate.shards.plan import HEADER_NAME, Plan, make_plan_without
from linerate.shards.plan_rows import DUPLICATE_BYTES, SHARDS_PER_FILE, rows_path

PLACE_NAME = "place.json"
# As the shards have it: without a name and password in a URL, see remote_url.without_userinfo.
_PLAIN_KEY = r"regexp_replace(key, '^([Hh][Tt][Tt][Pp][Ss]?://)[^/?#]*@', '\1')"
_KNOWN_NAME = "known.json"


class NothingNewError(Exception):
    """All that the source holds is in the shards already. num_known: so many images."""

    def __init__(self, num_known: int = 0) -> None:
        super().__init__(num_known)
        self.num_known = num_known


@dataclass(frozen=True)
class Base:
    """The finished shards that an append adds to, as they were before: their catalog lies in OUT/.pack/base.

    The append's own catalog takes the place of OUT's only when it is whole, and however often it is killed
    before, it starts from this one.
    """

    catalog: Catalog
    """Its root is the folder of the copy."""
    out: Path
    first_shard: int
    """Number of the first new shard."""
    first_sample_id: int

    @property
    def options(self) -> dict[str, Any]:
        """What this adds to the options of the plan: another base gives another plan."""
        return {
            "append": {
                "to": self.catalog.plan_id,
                "first_shard": self.first_shard,
                "first_sample_id": self.first_sample_id,
            }
        }

    @property
    def indexes(self) -> list[Path]:
        """The .parquet of every shard that is there."""
        return [(self.out / file).with_suffix(".parquet") for file in self.catalog.files]

    def drop_known(self, plan: Plan, *, sizing: Sizing, memory: str) -> Plan:
        """The plan less the samples whose key is there, with the classes that are there numbered as there.

        There is what was packed, what was rejected after it had got a place, and what had the bytes of
        another. DuckDB joins, so that memory stays bounded; the count is kept beside the plan. Raises
        NothingNewError when none is left.
        """
        from linerate.shards.plan_query import open_database

        files = [os.fspath(path) for path in self.indexes]
        planned = " UNION ALL ".join(
            f"SELECT file_row_number + {plan.first_sample_id(shard)} AS sample_id, {_PLAIN_KEY} AS key "
            f"FROM read_parquet({_quoted(rows_path(plan.folder, shard))}, file_row_number = true)"
            for shard in range(0, plan.num_shards, SHARDS_PER_FILE)
        )
        with open_database(plan.folder, memory=memory) as db:
            found = db.sql(
                f"SELECT sample_id FROM ({planned}) SEMI JOIN ("
                f"SELECT key FROM read_parquet([{', '.join(map(_quoted, files))}]) UNION ALL "
                f"SELECT key FROM read_parquet({_quoted(self.catalog.root / REJECTED_NAME)}) "
                f"WHERE sample_id IS NOT NULL OR reason = '{DUPLICATE_BYTES}') USING (key) ORDER BY sample_id"
            )
            # The name of the same method differs between DuckDB 1 and 2.
            reader = getattr(found, "to_arrow_reader", None) or found.fetch_arrow_reader
            left = make_plan_without(
                plan,
                (batch.column("sample_id").to_numpy() for batch in reader(65_536)),
                rejects=iter(()),
                sizing=sizing,
                class_names=self.catalog.class_names,
            )
        if not left.num_samples:
            raise NothingNewError(plan.num_samples)
        self.note(plan, num_known=plan.num_samples - left.num_samples)
        return left

    def note(self, plan: Plan, **counts: int) -> None:
        """Keep these beside the plan, for the record of the append."""
        path = plan.folder / _KNOWN_NAME
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(before | counts), encoding="utf-8")

    def extend(
        self, header: dict[str, Any], shards: Any, rejects: Any, plan: Plan
    ) -> tuple[dict[str, Any], Any, Any]:
        """(header, shards, rejects) of old and new together, from those of the new shards alone."""
        old = self.catalog
        rejects = self._join_rejects(rejects)
        known = json.loads((plan.folder / _KNOWN_NAME).read_text(encoding="utf-8"))
        record = {
            "plan_id": plan.plan_id,
            "base_plan_id": old.plan_id,
            "first_shard": self.first_shard,
            "num_shards": shards.num_rows,
            "first_sample_id": self.first_sample_id,
            "num_samples": header["num_samples"],
            "num_planned": header["num_planned"],
            "num_rejected": rejects.num_rows - old.num_rejected,
            **known,
            "filtered": header["filtered"],
            "options": {key: value for key, value in header["options"].items() if key != "append"},
        }
        extended = {
            **header,
            "seed": old.seed,
            # Whoever trains on these shards must see that they are no longer the ones of before.
            "plan_id": xxhash.xxh3_128_hexdigest(f"{old.plan_id}+{plan.plan_id}".encode()),
            "num_samples": old.num_samples + header["num_samples"],
            "num_planned": old.num_planned + header["num_planned"],
            "num_rejected": rejects.num_rows,
            **{name: max(getattr(old, name), header[name]) for name in _MAXIMA},
            "options": old.options,
            "filtered": old.filtered,
            "listed_id": old.listed_id,
            "appends": [*old.appends, record],
        }
        return extended, pa.concat_tables([pq.read_table(old.root / SHARDS_NAME), shards]), rejects

    def _join_rejects(self, rejects: Any) -> Any:
        """Old ones and new ones, but files without a place (by their name no images) only once."""
        old = pq.read_table(self.catalog.root / REJECTED_NAME).cast(rejects.schema)
        unplaced = old.filter(pc.is_null(old.column("sample_id"))).column("key")
        seen = pc.is_in(rejects.column("key"), value_set=unplaced.combine_chunks())
        again = pc.and_(pc.is_null(rejects.column("sample_id")), seen)
        return pa.concat_tables([old, rejects.filter(pc.invert(again))]).combine_chunks()


_MAXIMA = ("max_height", "max_width", "max_sample_bytes")


def open_base(out: Path, *, name: str) -> Base:
    """What an append to OUT begins with: kept by one that was killed, else OUT's catalog as it is now.

    Raises UserError when OUT has no finished shards, or others than these may be added to.
    """
    work = out / WORK_NAME
    folder = work / "base"
    if (work / HEADER_NAME).exists():
        if not folder.exists():
            raise UserError(
                f"the shards in {out} are not finished; the same `linerate shard pack` as before continues, "
                f"then --append can add to them"
            )
    else:
        shutil.rmtree(folder, ignore_errors=True)
        _keep_base(out, folder, name=name)
    place = json.loads((folder / PLACE_NAME).read_text(encoding="utf-8"))
    return Base(catalog=Catalog.load(folder), out=out, **place)


def load_base(out: Path) -> Base | None:
    """Of an append that is under way; None where there is none."""
    folder = out / WORK_NAME / "base"
    if not folder.exists() or not (out / WORK_NAME / HEADER_NAME).exists():
        return None
    place = json.loads((folder / PLACE_NAME).read_text(encoding="utf-8"))
    return Base(catalog=Catalog.load(folder), out=out, **place)


def refuse_appended(out: Path) -> None:
    """Raise UserError where a run without --append would undo what one with it has done."""
    if load_base(out):
        raise UserError(
            f"OUT {out} has an unfinished append; the same command as then, with --append, continues it"
        )
    if not (out / CATALOG_NAME).exists():
        return
    if appends := Catalog.load(out).appends:
        raise UserError(
            f"OUT {out} was packed and then appended to {len(appends)} times; --append adds more, and "
            f"`linerate shard verify {out} --repair` mends what is damaged"
        )


def refuse_unlisted(catalog: Catalog, names: Collection[str], out: Path | str) -> None:
    """Raise UserError where a shard lies in OUT that its catalog does not list. names: of its files."""
    listed = set(catalog.files)
    foreign = sorted(
        name
        for name in names
        if name.startswith(f"{catalog.name}-") and name.endswith(".tar") and name not in listed
    )
    if foreign:
        raise UserError(
            f"{out} holds {', '.join(foreign[:3])}, which its catalog does not list; move it away first"
        )


def _keep_base(out: Path, folder: Path, *, name: str) -> None:
    if not (out / CATALOG_NAME).exists():
        raise UserError(f"--append adds to finished shards, {out} holds none; leave --append out first")
    catalog = Catalog.load(out)
    if catalog.name != name:
        raise UserError(
            f"--name is {name}, but the shards of {out} are named {catalog.name}; give --name {catalog.name}"
        )
    refuse_unlisted(catalog, {path.name for path in out.iterdir()}, out)
    marks = (re.fullmatch(rf"{re.escape(name)}-(\d{{6,}})\.parquet", path.name) for path in out.iterdir())
    last_ids = catalog.shard_index(catalog.num_shards - 1).sample_id
    place = {
        "first_shard": 1 + max(int(mark[1]) for mark in marks if mark),
        # After a repair the count can be less than the last place.
        "first_sample_id": max(catalog.num_planned, 1 + int(last_ids[-1])),
    }
    temp = folder.with_name("base.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    for file in (CATALOG_NAME, SHARDS_NAME, REJECTED_NAME):
        shutil.copyfile(out / file, temp / file)
    (temp / PLACE_NAME).write_text(json.dumps(place), encoding="utf-8")
    temp.replace(folder)


def _quoted(path: Path | str) -> str:
    return "'" + os.fspath(path).replace("'", "''") + "'"
