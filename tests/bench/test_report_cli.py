import json
from pathlib import Path

import pytest
from tests.bench.made_records import DESK, made, scaled, versus

from linerate.bench.cli import main
from linerate.bench.record import append_jsonl
from linerate.shards.errors import UserError


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "node.jsonl"
    append_jsonl(path, versus(2000.0, 2.0, bar=1.5))
    append_jsonl(path, made(4310.0, name="ceilings", work="memory copy", unit="GB/s"))
    append_jsonl(path, scaled("strong", 1, 100.0))
    append_jsonl(path, scaled("strong", 2, 180.0))
    append_jsonl(
        path,
        made(1900.0, name="pipeline", work="loader and step: x", stages={"read": 0.1}, verdict="read-bound"),
    )
    append_jsonl(path, made(None, name="pack", peer="[b]cat", work="w", refused="[red]they differ"))
    return path


def test_the_page_goes_to_a_folder_that_is_made(results: Path, capsys: pytest.CaptureFixture[str]):
    out = results.parent / "new" / "report.html"
    assert main(["report", str(results), "--html", str(out), "--price-per-hour", "3"]) == 0
    assert capsys.readouterr().out.startswith(str(out))
    assert "2,400,000" in out.read_text(encoding="utf-8")
    # The name of the file alone: where it lay is nobody's business.
    assert str(results.parent) not in out.read_text(encoding="utf-8")
    assert "node.jsonl" in out.read_text(encoding="utf-8")


def test_without_a_page_the_terminal_says_the_same_within_80_columns(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["report", str(results), "--price-per-hour", "H200=3"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    words = " ".join(printed.split())
    for told in ("memory copy 4,310 GB/s", "2.00x", "90 %", "read-bound", "2,400,000", "35.6", "107"):
        assert told in words
    assert "[b]cat" in words
    assert "refused: [red]they differ" in words


def test_json_is_one_object_with_costs_and_statuses(results: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(results), "--json", "--price-per-hour", "3"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["tally"] == {"met": 1, "refused": 1}
    assert [point["efficiency"] for point in found["scaling"][0]["points"]] == [1.0, 0.9]
    costs = {cost["name"]: cost for cost in found["cost"]}
    assert costs["step"]["images_per_usd"] == 2_400_000
    assert costs["step"]["chosen"]
    assert [run["images"] for run in costs["step"]["runs"]] == [256_233_400, 1_280_000_000]


def test_matrix_merges_files_of_two_machines(results: Path, capsys: pytest.CaptureFixture[str]):
    other = results.parent / "desk.jsonl"
    append_jsonl(other, versus(500.0, 1.2, machine=DESK))
    assert main(["matrix", str(results), str(other), "--markdown", "--of", "rate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("| **2,000** | 500 |") for line in lines)
    assert main(["matrix", str(results), str(other), "--of", "ratio"]) == 0
    assert "of 6 rows have no ratio" in capsys.readouterr().out
    assert main(["matrix", str(results), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report"], "FILES are missing"),
        (["matrix"], "FILES are missing"),
        (["report", "absent.jsonl"], "there is no results file absent.jsonl"),
        (["matrix", "absent.jsonl"], "there is no results file absent.jsonl"),
        (["report", "{results}", "--price-per-hour", "0"], "is no price"),
        (["report", "{results}", "--price-per-hour", "B300=2"], "no machine of these files has that name"),
        (["report", "{results}", "--html", "{folder}"], "is a folder; name a file"),
        (["report", "{results}", "--html", "{results}/page.html"], "cannot be written"),
        (["matrix", "{results}", "--markdown", "--json"], "contradict"),
    ],
)
def test_what_cannot_work_is_one_clear_line(results: Path, argv: list[str], message: str):
    words = [word.format(results=results, folder=results.parent) for word in argv]
    with pytest.raises(UserError, match=message):
        main(words)


def test_compare_of_files_that_share_nothing_is_an_error(results: Path):
    other = results.parent / "other.jsonl"
    append_jsonl(other, made(1.0, name="read"))
    with pytest.raises(UserError, match="share no benchmark"):
        main(["compare", str(results), str(other)])
