from pathlib import Path

import pytest
from tests.bench.made_records import DESK, NODE, made

from linerate.bench.fleet import load_files, machines_of, settled_work, short_name
from linerate.bench.record import append_jsonl
from linerate.shards.errors import UserError

H200 = "NVIDIA H200"


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (NODE, "H200, 16 of 192 cores"),
        (DESK, "AMD Ryzen 9 7950X, 32 cores"),
        ({**NODE, "gpu": {"name": H200, "count": 8}}, "8x H200, 16 of 192 cores"),
        ({"cpu": "Intel(R) Core(TM) i7-8550U CPU @ 1.80GHz", "cores": 1.0}, "Intel Core i7-8550U, 1 core"),
        ({"cpu": "AMD EPYC", "cores": 1.0, "cores_installed": 2}, "AMD EPYC, 2 cores"),
        ({}, "unknown machine"),
    ],
)
def test_a_machine_is_called_by_its_chip_and_cores(facts: dict[str, object], name: str):
    assert short_name(facts) == name


def test_a_line_of_one_pinned_core_belongs_to_the_machine_of_the_others():
    pinned = made(1, name="pack", machine={**DESK, "cores": 1.0})
    (machine,) = machines_of([pinned, made(2, machine=DESK)])
    assert (machine.name, machine.facts["cores"], len(machine.records)) == (
        "AMD Ryzen 9 7950X, 32 cores",
        32.0,
        2,
    )


def test_a_share_of_the_cores_is_another_machine():
    found = machines_of([made(1), made(2, machine={**NODE, "cores": 64.0})])
    assert [machine.name for machine in found] == ["H200, 16 of 192 cores", "H200, 64 of 192 cores"]


def test_machines_of_one_name_are_told_apart():
    found = machines_of([made(1), made(2, machine={**NODE, "cpu": "another"})])
    assert [machine.name for machine in found] == ["H200, 16 of 192 cores", "H200, 16 of 192 cores (2)"]


def test_files_merge_by_time_whatever_their_order_and_a_line_counts_once(tmp_path: Path):
    times = ("2026-11-03T00:00:00+00:00", "2026-11-01T00:00:00+00:00", "2026-11-02T01:00:00+02:00")
    paths = [tmp_path / f"{place}.jsonl" for place in range(3)]
    for place, (path, time) in enumerate(zip(paths, times, strict=True)):
        append_jsonl(path, made(100.0 + place, measured_at=time))
    append_jsonl(paths[0], made(101.0, measured_at=times[1]))
    records = load_files(paths)
    # 01:00 in a zone two hours ahead is still the first of November.
    assert [record.ours for record in records] == [101.0, 102.0, 100.0]
    (machine,) = machines_of(records)
    assert [record.ours for record in machine.newest] == [100.0]
    (history,) = machine.histories
    assert [record.ours for record in history] == [101.0, 102.0, 100.0]


def test_history_leaves_out_what_has_no_value():
    (machine,) = machines_of([made(1), made(None, refused="they differ"), made(None, missing="x")])
    assert machine.histories == []


def test_as_many_threads_as_the_machine_has_cores_are_no_other_work():
    two = made(1, work="N=256, 16 threads, fp32")
    assert settled_work(two) == "N=256, all threads, fp32"
    assert settled_work(made(1, work="N=256, 4 threads")) == "N=256, 4 threads"


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_file_is_one_clear_line(tmp_path: Path, text: str):
    path = tmp_path / "empty.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="holds no records"):
        load_files([path])


@pytest.mark.parametrize(
    "line",
    [
        '{"name": "a", "peer": null, "work": "w", "unit": "x/s", "ours": "fast"}',
        '{"name": "a", "peer": null, "work": "w", "unit": "x/s", "ours": NaN}',
        '{"name": "a", "peer": 3, "work": "w", "unit": "x/s"}',
        '{"name": null, "peer": null, "work": "w", "unit": "x/s"}',
        '{"name": "a", "peer": null, "work": "w", "unit": "x/s", "machine": "mine"}',
        '{"name": "a", "peer": null, "work": "w", "unit": "x/s", "stages": {"read": "long"}}',
    ],
)
def test_a_field_of_the_wrong_kind_is_one_clear_line(tmp_path: Path, line: str):
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="line 1, is no benchmark record"):
        load_files([path])
