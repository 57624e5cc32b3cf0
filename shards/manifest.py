"""Manifests: Parquet, CSV, TSV or JSON lines with a column of paths or URLs, listed by DuckDB alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from linerate.shards.errors import UserError
from linerate.shards.fetch_options import FetchOptions
from linerate.shards.manifest_sql import (
    FILE_COLUMN,
    INTEGERS,
    URL_CONTAINER,
    column_sql,
    container_sql,
    extra_sql,
    from_url_sql,
    good_sql,
    list_as_tags,
    literal,
    path_sql,
    plan_name,
    problem_sql,
    quoted,
    split_problem,
    text_as_tags,
)
from linerate.shards.options import ManifestColumns
from linerate.shards.remote_url import show_url
from linerate.shards.scan import MAX_CLASSES, Listing, RejectWriter, mixed_labels
from linerate.shards.sources import Source, open_source

MANIFEST_NAME = "manifest.parquet"

_PARQUET = (".parquet", ".parq", ".pq")
_TEXT = (".csv", ".tsv", ".jsonl", ".ndjson")
_PACKINGS = ("", ".gz", ".zst")
# What may lie in a folder of Parquet files beside them.
_BESIDE = (".json", ".txt", ".md", ".crc")
_NAMES: dict[str, tuple[str, ...]] = {
    "path": ("path", "file", "file_name", "filename", "image", "image_path", "url", "uri"),
    "key": (),
    "label": ("label", "class", "cls", "target"),
    "size": ("size", "bytes", "file_size"),
    "tag": ("hashtags", "tags"),
}


def open_any_source(
    paths: Sequence[Path | str], *, columns: ManifestColumns, fetch: FetchOptions | None = None
) -> Source | ManifestSource:
    """The source that these paths make: manifests with these columns, or open_source's.

    Of URLs only names are known then: bring_source fetches what it takes to list them.
    """
    from linerate.shards.remote_source import any_urls, open_urls

    if any_urls(paths):
        return open_urls([str(path) for path in paths], columns, fetch or FetchOptions())
    files = find_manifests(paths)
    return ManifestSource(files, columns) if files else open_source(paths)


def find_manifests(paths: Sequence[Path | str]) -> list[Path]:
    """The manifests that these paths are: files, a pattern of them, or a folder of Parquet files; or none.

    Raises UserError where some of the paths are manifests and others are not.
    """
    found = {path: _manifests_at(path) for path in map(Path, paths)}
    others = [path for path, manifests in found.items() if not manifests]
    if others and len(others) < len(found):
        raise UserError(
            f"{others[0]} is no manifest, beside others that are; give manifests alone, or none, "
            f"and see that it exists"
        )
    return [manifest for manifests in found.values() for manifest in manifests]


def _manifests_at(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if manifest_kind(path) else []
    if path.is_dir():
        return _in_folder(path)
    if any(sign in path.name for sign in "*?[") and path.parent.is_dir():
        return sorted(one for one in path.parent.glob(path.name) if one.is_file() and manifest_kind(one))
    return []


def _in_folder(folder: Path) -> list[Path]:
    names = [path for path in folder.iterdir() if not path.name.startswith((".", "_"))]
    found = sorted(path for path in names if path.suffix.lower() in _PARQUET and path.is_file())
    others = [path for path in names if path.suffix.lower() not in (*_PARQUET, *_BESIDE)]
    return [] if others else found


def manifest_kind(path: Path | str) -> str | None:
    """`parquet`, `csv`, `tsv` or `json` by the name; None where it is no manifest."""
    name = str(path).lower()
    if name.endswith(_PARQUET):
        return "parquet"
    for suffix in _TEXT:
        if name.endswith(tuple(suffix + packing for packing in _PACKINGS)):
            return "json" if suffix in (".jsonl", ".ndjson") else suffix[1:]
    return None


@dataclass(frozen=True)
class ManifestSource:
    """The images that one or several manifests of one kind name."""

    files: Sequence[Path]
    columns: ManifestColumns = field(default_factory=ManifestColumns)
    urls: Sequence[str] = ()
    """Where the manifests lie that `files` are copies of; there are no files yet until they are fetched."""

    @property
    def containers(self) -> Sequence[Path | str]:
        """What is read to list the source; never written to."""
        return [show_url(url) for url in self.urls] or list(self.files)

    def open_listing(self, db: Any, folder: Path, rejects: RejectWriter) -> Listing:
        """The manifests as SQL. Text is made Parquet in `folder` first: it is read three times.

        What cannot be a sample goes to `rejects`. Raises UserError for a column that is missing or of no use.
        """
        if strange := [path for path in self.files if any(sign in os.fspath(path) for sign in "*?[")]:
            raise UserError(f"the name of {strange[0]} is a pattern to DuckDB; rename what has *, ? or [")
        kinds = {manifest_kind(path.name) for path in self.files}
        if len(kinds) > 1:
            raise UserError(
                f"the manifests are of several kinds ({', '.join(sorted(map(str, kinds)))}); pack them apart"
            )
        files, folders = self.files, sorted({os.fspath(path.absolute().parent) for path in self.files})
        name_column = f", filename={literal(FILE_COLUMN)}" if len(folders) > 1 else ""
        if kinds != {"parquet"}:
            _convert(db, self.files, str(*kinds), folder / MANIFEST_NAME, name_column, rejects)
            files, name_column = [folder / MANIFEST_NAME], ""
        listed = ", ".join(literal(os.fspath(path.absolute())) for path in files)
        table = f"read_parquet([{listed}], union_by_name=true{name_column})"
        return _Columns(db, table, self).listing(folders, rejects)


_CLASS, _NUMBER = "linerate class", "linerate number"


def _convert(
    db: Any, files: Sequence[Path], kind: str, out: Path, name_column: str, rejects: RejectWriter
) -> None:
    """Write text manifests as Parquet, types as all rows allow; lines that do not parse are rejects."""
    listed = ", ".join(literal(os.fspath(path.absolute())) for path in files)
    if kind == "json":
        read = (
            f"read_json([{listed}], format='newline_delimited', ignore_errors=true, sample_size=-1, "
            f"union_by_name=true{name_column})"
        )
    else:
        separator = ", delim=chr(9)" if kind == "tsv" else ""
        read = (
            f"read_csv([{listed}], header=true, sample_size=-1, store_rejects=true{separator}{name_column})"
        )
    db.execute(f"COPY (SELECT * FROM {read}) TO {literal(os.fspath(out))} (COMPRESSION zstd)")
    if kind == "json":
        return
    found = db.execute(
        "SELECT regexp_extract(any_value(s.file_path), '[^/]*$') || ' line ' || e.line, "
        "lower(any_value(e.error_type)) FROM reject_errors e JOIN reject_scans s USING (scan_id, file_id) "
        "GROUP BY e.file_id, e.line ORDER BY e.file_id, e.line"
    )
    while rows := found.fetchmany(10_000):
        rejects.add([(key, 0, "unreadable row", detail) for key, detail in rows])


@dataclass(frozen=True)
class _Survey:
    """What one look at every row of a manifest tells."""

    num_bad: int
    """Rows that cannot be samples."""
    num_elsewhere: int
    """Rows that name a URL or an absolute path."""
    low: int | None
    """The least and the largest class number, where classes have numbers."""
    high: int | None


class _Columns:
    """What the columns of a manifest's table mean."""

    def __init__(self, db: Any, table: str, source: ManifestSource) -> None:
        self.db, self.table = db, table
        self.urls = dict(
            zip([os.fspath(path.absolute()) for path in source.files], source.urls, strict=False)
        )
        self.where_from = ", ".join(os.fspath(path) for path in source.containers[:3])
        described = db.execute(f"DESCRIBE SELECT * FROM {table}").fetchall()
        self.types: dict[str, str] = {name: kind for name, kind, *_ in described if name != FILE_COLUMN}
        path = self._find("path", source.columns.path_column)
        if path is None:
            raise UserError(
                f"{self.where_from} has no column of paths or URLs among {', '.join(self.types)}; name it by "
                f"--path-column"
            )
        self.path = path
        if self.types[path] not in ("VARCHAR", "JSON"):
            raise UserError(
                f"the path column {path} of {self.where_from} is {self.types[path]}; give one of text by "
                f"--path-column"
            )
        self.key = self._find("key", source.columns.key_column)
        self.label = self._find("label", source.columns.label_column)
        self.size = self._find("size", source.columns.size_column)
        self.tag = self._find("tag", source.columns.tag_column)
        if self.size and self.types[self.size] not in INTEGERS:
            if source.columns.size_column:
                raise UserError(
                    f"--size-column {self.size} is {self.types[self.size]}; give a column of whole numbers"
                )
            self.size = None

    def _find(self, what: str, given: str | None) -> str | None:
        names = {name.lower(): name for name in reversed(self.types)}
        for name in [given] if given is not None else _NAMES[what]:
            if name.lower() in names:
                return names[name.lower()]
        if given is not None:
            raise UserError(
                f"--{what}-column {given}: {self.where_from} has no such column; there are "
                f"{', '.join(self.types)}"
            )
        return None

    def listing(self, folders: list[str], rejects: RejectWriter) -> Listing:
        """The table as the plan takes it; its rows that cannot be samples go to `rejects`."""
        stated = path = f"{quoted(self.path)}::VARCHAR"
        if self.urls:
            path = from_url_sql(stated, self.urls, folders)
        key = f"{quoted(self.key)}::VARCHAR" if self.key else stated
        size = quoted(self.size) if self.size else None
        survey = self._survey(path, key, size)
        if survey.num_bad:
            self._reject(path, key, size, rejects)
        class_names, label, relation = self._classes(survey)
        taken = {self.label, self.size, self.key or self.path}
        metadata = {
            plan_name(name, list(self.types)): (name, kind)
            for name, kind in self.types.items()
            if name not in taken
        }
        # What the sort carries is kept small: what follows from it is made behind it.
        fields = {"key": key, "label": label, "size": size or "-1"}
        after = {
            "offset": "0::BIGINT",
            "size": "coalesce(greatest(size, -1), -1)::BIGINT",
            "label": "coalesce(label, -1)::INTEGER",
            "extra_json": extra_sql(metadata),
        }
        if survey.num_elsewhere or len(folders) > 1:
            fields["container"] = container_sql(path, folders)
        else:
            after["container"] = "2::INTEGER"
        if key != path:
            fields["path"] = path
            after["path"] = path_sql("path")
        fields |= {name: column_sql(quoted(column), kind) for name, (column, kind) in metadata.items()}
        return Listing(
            relation=relation,
            good=good_sql(path, key, size) if survey.num_bad else "true",
            fields=fields,
            after=after,
            tags=self._tags(),
            containers=[URL_CONTAINER, "/", *folders],
            class_names=class_names,
            numbered=bool(class_names) and class_names[0].isdigit(),
            reasons=rejects.reasons,
            own_keys=self.key is not None,
            where_from=self.where_from,
        )

    def _survey(self, path: str, key: str, size: str | None) -> _Survey:
        numbers = self.label is not None and self.types[self.label] in INTEGERS
        label = quoted(self.label) if self.label is not None and numbers else "NULL"
        found = self.db.execute(
            f"SELECT count(*) FILTER (NOT ({good_sql(path, key, size)})), "
            f"count(*) FILTER (contains({path}, '://') OR starts_with({path}, '/')), "
            f"min({label}), max({label}) "
            f"FROM {self.table}"
        ).fetchall()
        return _Survey(*found[0])

    def _reject(self, path: str, key: str, size: str | None, rejects: RejectWriter) -> None:
        numbered = f"{self.table[:-1]}, file_row_number=true)"
        found = self.db.execute(
            f"SELECT coalesce(nullif(left({path}, 1000), ''), 'row ' || (file_row_number + 1)), "
            f"coalesce({size or 'NULL'}, -1), {problem_sql(path, key, size)} "
            f"FROM {numbered} WHERE NOT ({good_sql(path, key, size)})"
        )
        while rows := found.fetchmany(10_000):
            rejects.add([(key, size, *split_problem(problem)) for key, size, problem in rows])

    def _tags(self) -> str | None:
        if self.tag is None:
            return None
        kind, name = self.types[self.tag], quoted(self.tag)
        if kind.endswith("[]"):
            return list_as_tags(f"{name}::VARCHAR[]")
        return text_as_tags(f"{name}::VARCHAR")

    def _classes(self, survey: _Survey) -> tuple[list[str], str, str]:
        """Names of the classes, SQL of a row's class number, and the table with what that needs."""
        if self.label is None:
            return [], "-1", self.table
        kind, name = self.types[self.label], quoted(self.label)
        if kind in INTEGERS:
            self._require_numbers(survey.low, survey.high)
            count = 0 if survey.high is None else survey.high + 1
            return [str(label) for label in range(count)], name, self.table
        if kind not in ("VARCHAR", "JSON"):
            raise UserError(
                f"the label column {self.label} of {self.where_from} is {kind}; give one of text or whole "
                f"numbers by --label-column"
            )
        unpacked = f"{name}->>'$'" if kind == "JSON" else name
        text = f"nullif({unpacked}, '')"
        found = self.db.execute(
            f"SELECT DISTINCT {text} AS name FROM {self.table} WHERE name IS NOT NULL LIMIT {MAX_CLASSES + 1}"
        )
        names = sorted(name for (name,) in found.fetchall())
        numbers = [int(name) for name in names if name.isascii() and name.isdigit() and len(name) <= 18]
        if numbers and len(numbers) < len(names):
            raise UserError(mixed_labels(max(numbers), [name for name in names if not name.isdigit()]))
        if numbers:
            self._require_numbers(min(numbers), max(numbers))
            classes = [str(label) for label in range(max(numbers) + 1)]
            return classes, f"TRY_CAST({text} AS INTEGER)", self.table
        self._require_numbers(0, len(names) - 1)
        self.db.register(
            "classes", pa.table({_CLASS: pa.array(names, pa.string()), _NUMBER: range(len(names))})
        )
        relation = f"(SELECT t.*, c.* FROM {self.table} t LEFT JOIN classes c ON {text} = c.{quoted(_CLASS)})"
        return names, quoted(_NUMBER), relation

    def _require_numbers(self, low: int | None, high: int | None) -> None:
        """Raise UserError where class numbers are too many, or none."""
        if low is not None and low < 0:
            raise UserError(
                f"the label column {self.label} of {self.where_from} holds {low}; classes are numbered from "
                f"0, and a row without one is empty"
            )
        if high is not None and high >= MAX_CLASSES:
            raise UserError(
                f"the label column {self.label} of {self.where_from} has {MAX_CLASSES} classes or more; name "
                f"another by --label-column"
            )
