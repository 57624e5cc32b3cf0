"""SQL that turns a manifest's columns into those of a plan."""

from __future__ import annotations

import re
from collections.abc import Mapping

from linerate.shards.scan import SCAN_SCHEMA
from linerate.shards.sources import MAX_SAMPLE_BYTES

FILE_COLUMN = "linerate file"
URL_CONTAINER = "url:"
URL_SCHEMES = ("http", "https", "s3", "gs")
# A path is no longer on Linux, and no URL is meant to be.
MAX_PATH_BYTES = 4000
# In the index of a shard or in the plan, so no metadata column can have these names.
_TAKEN = frozenset(
    [*SCAN_SCHEMA.names, "sample_id", "height", "width", "xxh3_64", "flags", "place"]  # see INDEX_SCHEMA
)
# Types that the .parquet of a shard holds as they are; others travel as text.
INTEGERS = frozenset(
    ["TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"]
)
_TIMES = ["DATE", "TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"]
_PLAIN = INTEGERS | {"BOOLEAN", "FLOAT", "DOUBLE", "VARCHAR", "BLOB", *_TIMES}
# What may stand between two tags in a text; the last five are of lists that were made text.
_TAG_BREAKS = " ,;#|\t\r[]\"'"


def literal(text: str) -> str:
    """Text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def quoted(name: str) -> str:
    """A column's name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def plan_name(name: str, names: list[str]) -> str:
    """The name of a metadata column in plan and shards: its own, or with `_` behind where that is taken."""
    others = _TAKEN | {other.lower() for other in names if other != name}
    while name.lower() in others:
        name += "_"
    return name


def good_sql(path: str, key: str, size: str | None) -> str:
    """SQL of whether a row can be a sample: true or false, never null; 0.1 us a row."""
    schemes = "|".join(URL_SCHEMES)
    parts = [
        f"coalesce(strlen({path}) BETWEEN 1 AND {MAX_PATH_BYTES}, false)",
        f"NOT contains({path}, chr(0))",
        f"(NOT contains({path}, '://') OR regexp_matches({path}, '^({schemes})://[^/]'))",
    ]
    if key != path:
        parts.append(f"coalesce(strlen({key}) BETWEEN 1 AND {MAX_PATH_BYTES}, false)")
    if size is not None:
        parts.append(f"coalesce({size} <= {MAX_SAMPLE_BYTES}, true)")
    return " AND ".join(parts)


def problem_sql(path: str, key: str, size: str | None) -> str:
    """SQL of why a row is not good, `reason: detail`."""
    return (
        f"CASE WHEN {path} IS NULL OR {path} = '' THEN 'no path: the row names no file' "
        f"WHEN strlen({path}) > {MAX_PATH_BYTES} THEN 'path too long: ' || strlen({path}) || ' bytes' "
        f"WHEN contains({path}, chr(0)) THEN 'no path: it holds a zero byte' "
        f"WHEN contains({path}, '://') AND NOT regexp_matches({path}, '^({'|'.join(URL_SCHEMES)})://[^/]') "
        f"THEN 'scheme not allowed: ' || left(regexp_extract({path}, '^(.*?)://', 1), 40) "
        f"WHEN {key} IS NULL OR {key} = '' THEN 'no key: the row has no name' "
        f"WHEN strlen({key}) > {MAX_PATH_BYTES} THEN 'key too long: ' || strlen({key}) || ' bytes' "
        f"ELSE 'too many bytes: ' || {size or 'NULL'} || ' exceeds {MAX_SAMPLE_BYTES}' END"
    )


def split_problem(problem: str) -> tuple[str, str]:
    """(reason, detail) of what problem_sql says."""
    reason, _, detail = problem.partition(": ")
    return reason, detail


def container_sql(path: str, folders: list[str]) -> str:
    """SQL of a row's place in [URL_CONTAINER, "/", *folders]."""
    return (
        f"(CASE WHEN contains({path}, '://') THEN 0 WHEN starts_with({path}, '/') THEN 1 "
        f"ELSE {_folder_sql(folders)} END)::INTEGER"
    )


def from_url_sql(path: str, urls: Mapping[str, str], folders: list[str]) -> str:
    """SQL of a path as one in a manifest at a URL means it: relative to that URL.

    urls: where the files were fetched from, by their names here. A path that begins with a slash would be
    one of this machine, which a manifest from elsewhere must not name: it becomes what good_sql refuses.
    """
    bases = {
        name.rpartition("/")[0]: re.split(r"[?#]", url)[0].rpartition("/")[0] for name, url in urls.items()
    }
    listed = ", ".join(literal(f"{bases[folder]}/") for folder in folders)
    base = f"list_extract([{listed}], {_folder_sql(folders)} - 1)"
    return (
        f"(CASE WHEN contains({path}, '://') THEN {path} WHEN starts_with({path}, '/') "
        f"THEN 'file://' || {path} ELSE {base} || {path} END)"
    )


def _folder_sql(folders: list[str]) -> str:
    if len(folders) == 1:
        return "2"
    listed = ", ".join(map(literal, folders))
    return f"list_position([{listed}], regexp_replace({quoted(FILE_COLUMN)}, '/[^/]*$', '')) + 1"


def path_sql(name: str) -> str:
    """SQL of a path relative to its container; a URL is whole."""
    return f"encode(CASE WHEN starts_with({name}, '/') THEN substr({name}, 2) ELSE {name} END)"


def column_sql(sql: str, kind: str) -> str:
    """SQL of a metadata column as Parquet and every reader of it take it."""
    item = kind.removesuffix("[]")
    if kind in _PLAIN or item in _PLAIN or (kind.startswith("DECIMAL") and not kind.endswith("]")):
        return sql
    if kind == "TIMESTAMP WITH TIME ZONE":
        return f"make_timestamp(epoch_us({sql}))"  # in UTC, whatever zone this machine is in
    if kind.endswith("]") and kind.rpartition("[")[0] in _PLAIN:  # of fixed length
        return f"{sql}::{kind.rpartition('[')[0]}[]"
    return f"to_json({sql})::VARCHAR" if _is_nested(kind) else f"{sql}::VARCHAR"


def extra_sql(metadata: dict[str, tuple[str, str]]) -> str:
    """SQL of the metadata as one JSON object, in bytes. metadata: column -> (its own name, its type)."""
    if not metadata:
        return "NULL::BLOB"
    items = ", ".join(
        f"{literal(name)}: {_json_value(quoted(column), kind)}" for column, (name, kind) in metadata.items()
    )
    return f"encode(to_json({{{items}}})::VARCHAR)"


def _json_value(sql: str, kind: str) -> str:
    # JSON has neither NaN nor infinity.
    if kind in ("FLOAT", "DOUBLE"):
        return f"CASE WHEN isfinite({sql}) THEN {sql} END"
    if kind.startswith(("FLOAT[", "DOUBLE[")) and kind.count("[") == 1:
        return f"list_transform({sql}, lambda x: CASE WHEN isfinite(x) THEN x END)"
    if _is_nested(kind):  # DuckDB writes both inside them, and reads them: such a value stays text
        return (
            f"CASE WHEN regexp_matches({sql}, 'NaN|Inf') THEN to_json({sql}) ELSE TRY_CAST({sql} AS JSON) END"
        )
    return sql


def _is_nested(kind: str) -> bool:
    return kind.startswith(("STRUCT", "MAP", "UNION", "JSON")) or (
        kind.endswith("]") and (kind.rpartition("[")[0] not in _PLAIN)
    )


def list_as_tags(sql: str) -> str:
    """SQL of a list's items as text, a line feed before and behind each."""
    return f"concat(chr(10), array_to_string({sql}, chr(10)), chr(10))"


def text_as_tags(sql: str) -> str:
    """The same of a text of tags with commas, blanks or # between them."""
    breaks = f"repeat(chr(10), {len(_TAG_BREAKS)})"
    return f"concat(chr(10), translate({sql}, {literal(_TAG_BREAKS)}, {breaks}), chr(10))"
