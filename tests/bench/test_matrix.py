import io
import json

from rich.console import Console
from tests.bench.made_records import DESK, HOSTILE, NODE, made, versus

from linerate.bench.matrix import (
    best_place,
    cell_text,
    matrix_json,
    matrix_markdown,
    matrix_of,
    matrix_tables,
)


def test_a_column_is_a_machine_and_its_newest_line_counts():
    records = [
        versus(1000.0, 2.0, measured_at="2026-11-01"),
        versus(400.0, 3.0, machine=DESK),
        versus(1100.0, 2.5, measured_at="2026-11-02"),
    ]
    matrix = matrix_of(records)
    assert [machine.name for machine in matrix.machines] == [
        "H200, 16 of 192 cores",
        "AMD Ryzen 9 7950X, 32 cores",
    ]
    (row,) = matrix.rows
    assert [record and record.ours for record in row.cells] == [1100.0, 400.0]
    assert best_place(row, "rate") == 0
    assert best_place(row, "ratio") == 1


def test_all_threads_of_two_machines_are_one_row():
    ours = made(1.0, name="ema", work="161 tensors, 16 threads")
    matrix = matrix_of([ours, made(2.0, name="ema", work="161 tensors, 32 threads", machine=DESK)])
    assert [row.work for row in matrix.rows] == ["161 tensors, all threads"]


def test_fewer_is_better_for_counts():
    records = [
        made(900.0, kind="count", unit="aten ops"),
        made(749.0, kind="count", unit="aten ops", machine=DESK),
    ]
    assert best_place(matrix_of(records).rows[0], "both") == 1


def test_a_cell_says_what_it_is_asked_for_or_why_not():
    noisy = {**NODE, "noise": {"noisy": True}}
    record = versus(1234.5, 2.0, ceiling="copy", ceiling_rate=2469.0, ceiling_share=0.5, machine=noisy)
    shown = [cell_text(record, of) for of in ("rate", "ratio", "share", "both")]
    assert shown == ["~1,234", "~2.00x", "~50 %", "~1,234\n2.00x"]
    assert cell_text(made(5.0, missing="x is not installed"), "both") == "5\nno peer"
    assert cell_text(made(None, missing="to a GPU: there is no CUDA device"), "both") == "-\nno GPU"
    assert cell_text(made(None, refused="they differ"), "rate") == "refused"
    assert cell_text(None, "rate") == "-"


def test_markdown_has_a_line_a_row_and_escapes_what_would_break_it():
    lines = matrix_markdown(
        matrix_of([made(5.0, name=HOSTILE), made(7.0, machine=DESK)]), "rate"
    ).splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("| H200, 16 of 192 cores | AMD Ryzen 9 7950X, 32 cores |")
    assert lines[3].endswith("| pairs/s | - | 7 |")
    unescaped = lines[2].replace("\\|", "")
    assert unescaped.count("|") == lines[3].count("|")
    assert "<script>" not in lines[2].replace("\\<", "")


def test_json_holds_every_cell_with_what_is_missing():
    matrix = matrix_of([made(5.0, missing="x is not installed"), made(7.0, name="read", machine=DESK)])
    plain = json.loads(json.dumps(matrix_json(matrix)))
    assert [machine["name"] for machine in plain["machines"]] == [m.name for m in matrix.machines]
    first, second = plain["rows"]
    assert (first["cells"][0]["ours"], first["cells"][0]["missing"]) == (5.0, "x is not installed")
    assert first["cells"][1] is None
    assert second["cells"][1]["ours"] == 7.0


def test_five_machines_fit_80_columns_and_each_row_has_its_work_below():
    machines = [{"cpu": f"chip number {place}", "cores": 64.0, "cores_installed": 64} for place in range(5)]
    records = [versus(1000.0 + place, 2.0, machine=machine) for place, machine in enumerate(machines)]
    records.append(made(3.0, name="[red]x[/]", work="[b]w", machine=machines[0]))
    printed = io.StringIO()
    for table in matrix_tables(matrix_of(records), "both"):
        Console(width=80, file=printed).print(table)
    text = printed.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "\u2026" not in text
    for place in range(5):
        assert f"{1000 + place:,}" in text
    assert "[red]x[/]" in text
    assert "[b]w" in text
