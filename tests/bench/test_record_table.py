import dataclasses
import io
from collections.abc import Sequence

import pytest
from rich.console import Console
from tests.bench.made_records import made, versus

from linerate.bench.peers import missing_peer
from linerate.bench.record import Record, lacking
from linerate.bench.record_table import number, results_table
from linerate.bench.suites.ceilings import NO_GPU


def shown(records: Sequence[Record], *, width: int = 200) -> str:
    """The table as text."""
    printed = io.StringIO()
    Console(width=width, file=printed).print(results_table(records))
    return printed.getvalue()


def words(records: Sequence[Record]) -> str:
    """The table's words with one blank between them."""
    return " ".join(shown(records).split())


def test_rows_of_one_name_carry_the_number_of_their_work():
    records = [
        versus(400.0, 4.0, name="infonce", peer="cat", work="one core"),
        versus(800.0, 4.0, name="infonce", peer="cat", work="all cores", ceiling="products"),
        versus(500.0, 4.0, name="infonce", peer="another", work="one core"),
        versus(100.0, 2.0, name="ema", work="161 tensors"),
    ]
    records[1] = dataclasses.replace(records[1], ceiling_share=0.5, ceiling_rate=1600.0)
    table, _, below = shown(records, width=80).partition("\n infonce #1 ")
    names = [line.split("  ")[1] for line in table.splitlines() if line.startswith("  ") and "x" in line]
    assert names == ["infonce #1", "infonce #2", "infonce #1", "ema"]
    assert " ".join(below.split()).startswith("one core infonce #2 all cores ema 161 tensors")
    assert "infonce #2: 50 % of its ceiling" in below


def test_a_row_says_what_it_measured_and_its_peer():
    text = words([versus(100.0, 2.0, name="views", peer="torch", work="--backend dali: JPEGs")])
    assert "views 100 50 2.00x - --backend dali pairs/s" in text
    assert "torch" in text.partition("--backend dali")[2]


def test_the_table_names_a_missing_peer_and_a_refusal():
    missing = made(400.0, peer="webdataset", missing="webdataset is not installed")
    text = words([versus(400.0, 4.0, bar=3.3), missing, made(None, refused="the keys differ")])
    assert "4.00x" in text
    assert "3.80 to 4.20" in text
    assert "no peer" in text
    assert "webdataset is not installed" in text
    assert "refused: the keys differ" in text


@pytest.mark.parametrize(
    ("ours", "missing", "told"),
    [
        (400.0, "webdataset is not installed; bring it with: pip install webdataset", "no peer"),
        (None, f"pinned host to GPU: {NO_GPU}", "no GPU"),
        (None, missing_peer("absent") or "", "no absent"),
        (None, "JPEG decode by DALI: nvidia.dali is not installed; bring it with: make", "no dali"),
        (None, "its shards are gone", "not run"),
    ],
)
def test_a_row_without_a_ratio_says_what_it_lacks(ours: float | None, missing: str, told: str):
    record = made(ours, peer="x", missing=missing)
    assert lacking(record) == told
    assert f" {told} " in shown([record])


def test_other_size_names_the_suite_whose_work_the_bar_is_for():
    small, on_gpu = (
        versus(400.0, 4.0, bar=3.0, met=None, suite=suite, name=suite) for suite in ("quick", "gpu")
    )
    assert "the work of `--suite cpu`," in words([small])
    assert "the work of `--suite gpu`," in words([on_gpu])
    assert "the work of `--suite cpu` and `--suite gpu`," in words([small, on_gpu])
    assert "--suite" not in words([versus(400.0, 4.0, bar=3.0)])


def test_what_a_record_notes_stands_below_its_work_once():
    noted = versus(400.0, 4.0, work="161 tensors", note="25 % of the time [of all]")
    text = shown([noted, noted, dataclasses.replace(noted, note=None)])
    lines = [line.strip() for line in text.splitlines()]
    at = next(place for place, line in enumerate(lines) if line.endswith("161 tensors"))
    assert lines[at + 1] == "25 % of the time [of all]"
    assert text.count("25 %") == 1


def test_numbers_are_short():
    numbers = [number(x) for x in (None, 0.0, 968, 12345.6, 0.98765, 43.21)]
    assert numbers == ["-", "0", "968", "12,346", "0.988", "43.2"]
