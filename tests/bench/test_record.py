import dataclasses
import json
from pathlib import Path

import pytest

from linerate.bench.record import Record, append_jsonl, from_json, latest, load_jsonl
from linerate.shards.errors import UserError

RECORD = Record(
    name="ema",
    peer="per-tensor loop",
    work="161 tensors",
    unit="updates/s",
    ours=400.0,
    theirs=100.0,
    ratio=4.0,
    ratio_low=3.5,
    ratio_high=4.5,
    bar=3.3,
    bar_reads="ratio >= 3.3",
    met=True,
    ours_s=(0.0025, 0.0025),
    theirs_s=(0.01, 0.01),
    ranks=2,
    stages={"read": 0.25, "decode": 0.5},
    verdict="decode-bound",
    machine={"cpu": "one"},
)


def test_a_line_holds_the_fields_of_the_bars_and_reads_back_equal(tmp_path: Path):
    path = tmp_path / "new folder" / "results.jsonl"
    append_jsonl(path, RECORD)
    append_jsonl(path, dataclasses.replace(RECORD, name="read"))
    line = json.loads(path.read_text().splitlines()[0])
    wanted = "name peer work ratio ratio_low ratio_high bar met ours theirs unit machine"
    assert set(wanted.split()) <= set(line)
    assert load_jsonl(path) == [RECORD, dataclasses.replace(RECORD, name="read")]


def test_the_newest_line_of_a_key_counts():
    newer = dataclasses.replace(RECORD, ours=500.0)
    assert latest([RECORD, newer]) == {RECORD.key: newer}


@pytest.mark.parametrize("text", ["no json\n", '{"name": "only"}\n', "[1]\n", ""])
def test_a_file_that_is_no_results_file_is_the_users_error(tmp_path: Path, text: str):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="linerate bench run --out"):
        load_jsonl(path)


def test_a_file_that_is_no_text_is_the_users_error(tmp_path: Path):
    path = tmp_path / "shards.parquet"
    path.write_bytes(b"PAR1\x00\xff\xfe")
    with pytest.raises(UserError, match="is no text"):
        load_jsonl(path)


def test_a_folder_is_the_users_error_and_names_its_last_file(tmp_path: Path):
    with pytest.raises(UserError, match=r"is a folder, .* it holds no file NAME\.jsonl"):
        load_jsonl(tmp_path)
    for name in ("2026-11-30.jsonl", "2026-11-25.jsonl", "notes.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"is a folder, .* its last by name is .*/2026-11-30\.jsonl"):
        load_jsonl(tmp_path)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("dali, against torch", "torch"),
        ("dali's decode, against all of it", "all of dali's time"),
        ("Pillow + torchvision v2", "Pillow + torchvision v2"),
        (None, None),
    ],
)
def test_lines_of_views_that_named_our_side_in_the_peer_have_the_key_of_now(written: str | None, read: str):
    line = {**RECORD.to_json(), "name": "views", "peer": written}
    assert from_json(line).peer == read
    assert from_json({**line, "name": "pack"}).peer == written


def test_a_missing_file_is_the_users_error(tmp_path: Path):
    with pytest.raises(UserError, match="there is no results file"):
        load_jsonl(tmp_path / "absent.jsonl")


def test_a_field_of_a_newer_version_is_dropped(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({**RECORD.to_json(), "invented_later": 1}) + "\n")
    assert load_jsonl(path) == [RECORD]
