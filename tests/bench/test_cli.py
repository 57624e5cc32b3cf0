import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from linerate.bench import cli, disk, isolated, registry
from linerate.bench.contest import Bar, Contest, Count, Disagreement, Setting
from linerate.bench.machine import available_cores, machine
from linerate.bench.record import Record, append_jsonl, load_jsonl
from linerate.bench.timing import Side, one_core
from linerate.shards.errors import UserError


def squares(setting: Setting) -> Iterator[Contest | Count]:
    (setting.scratch / "proof").write_text("the scratch folder can be written")
    yield Contest(
        peer="slow",
        work="squares",
        unit="calls/s",
        amount=1,
        ours=Side(run=lambda: sum(range(100))),
        theirs=Side(run=lambda: sum(range(5000))),
        agree=lambda: "nothing to tell",
        bar=Bar(1.5),
    )
    yield Count(peer="slow", work="squares", unit="ops", ours=1, theirs=2)


def disagreeing(setting: Setting) -> Iterator[Contest]:
    def differ() -> str:
        raise Disagreement("ours is 3, theirs 4")

    side = Side(run=lambda: None)
    yield Contest(peer="other", work="w", unit="x/s", amount=1, ours=side, theirs=side, agree=differ)


def orphan(setting: Setting) -> Iterator[Contest]:
    yield Contest(
        peer="other",
        work="w",
        unit="x/s",
        amount=1,
        ours=Side(run=lambda: None),
        missing="other is not installed",
    )


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"squares": squares, "disagreeing": disagreeing, "orphan": orphan}
    table = {name: registry.Benchmark(f"toys:{name}", f"the toy {name}", ("webdataset",)) for name in made}
    monkeypatch.setattr(registry, "BENCHMARKS", table)
    monkeypatch.setattr(registry.Benchmark, "load", lambda self: made[self.where.partition(":")[2]])
    monkeypatch.setattr(disk, "NUM_BYTES", {"quick": 2**16, "full": 2**16})


def run(*argv: str) -> int:
    return cli.main(["run", *argv, "--suite", "quick"])


def test_json_is_one_pure_line_a_record(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert run("squares", "--json", "--scratch", str(tmp_path)) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["name"], line["kind"], line["suite"]) for line in lines] == [
        ("squares", "time", "quick"),
        ("squares", "count", "quick"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_every_line_has_the_disks_rates_unless_nothing_is_measured(capsys: pytest.CaptureFixture[str]):
    for words in ([], ["--tiny"]):
        assert run("squares", "--json", *words) == 0
        machines = [json.loads(line)["machine"] for line in capsys.readouterr().out.splitlines()]
        assert len(machines) == 2
        for found in machines:
            assert ("disk" in found) == (not words)
            assert words or found["disk"]["write_mb_per_s"] > 0


def test_the_cores_on_record_are_the_machines_though_the_work_was_pinned_to_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def pinned(setting: Setting) -> Iterator[Contest | Count]:
        with one_core():
            yield Count(peer=None, work="w", unit="ops", ours=available_cores())

    monkeypatch.setattr(registry.Benchmark, "load", lambda self: pinned)
    cores = available_cores()
    machine.cache_clear()
    setting = Setting(scratch=tmp_path)
    (record,) = registry.run_benchmark("squares", setting=setting, suite="quick")
    assert (record.ours, record.machine["cores"]) == (1, cores)


def test_the_full_suite_runs_the_gpus_benchmarks_after_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def note(name: str, options: list[str], *, suite: str, limit_s: float) -> Iterator[Record]:
        yield Record(name=f"{name} apart", peer=None, work="w", unit="x/s", ours=1.0, suite=suite)

    def here(name: str, *, setting: Setting, suite: str) -> Iterator[Record]:
        assert (setting.max_ranks, setting.size) == (4, "full")
        yield Record(name=name, peer=None, work="w", unit="x/s", ours=1.0, suite=suite)

    limits = dataclasses.replace(registry.SUITES["gpu"], limits_s={"orphan": 9.0})
    monkeypatch.setitem(registry.SUITES, "gpu", limits)
    monkeypatch.setattr(isolated, "run_isolated", note)
    monkeypatch.setattr(registry, "run_benchmark", here)
    ran = {}
    for has_gpu in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        for words in ([], ["squares"]):
            cli.main(["run", *words, "--suite", "full", "--json"])
            lines = map(json.loads, capsys.readouterr().out.splitlines())
            ran[has_gpu, *words] = [(line["name"], line["suite"]) for line in lines]
    whole = [("squares", "full"), ("disagreeing", "full"), ("orphan", "full")]
    assert ran == {
        (False,): whole,
        (False, "squares"): whole[:1],
        (True,): [*whole, ("orphan apart", "gpu")],
        (True, "squares"): whole[:1],
    }


def test_out_is_appended_to_and_the_table_names_the_ratio(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out = tmp_path / "results.jsonl"
    assert run("squares", "--out", str(out)) == 0
    assert run("squares", "--out", str(out)) == 0
    assert len(load_jsonl(out)) == 4
    assert "squares" in capsys.readouterr().out


def test_disagreement_is_told_and_is_exit_code_1(capsys: pytest.CaptureFixture[str]):
    assert run("disagreeing", "--json") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["refused"] == "ours is 3, theirs 4"
    assert "ours is 3, theirs 4" in captured.err


def test_a_missing_peer_is_told_but_is_no_failure(capsys: pytest.CaptureFixture[str]):
    assert run("orphan", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["missing"] == "other is not installed"
    assert "other is not installed" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "squars"], "did you mean `squares`"),
        (["run", "--rounds", "3"], "give 7 or more"),
        (["run", "--images", "no/such/folder"], "is no folder"),
        (["run", "--scratch", "no/such/folder"], "give a folder that can be written"),
        (["run", "--out", "."], "is a folder; name a file"),
        (["compare", "a.jsonl", "b.jsonl"], "there is no results file"),
        (["compare", "a.jsonl", "b.jsonl", "--tolerance", "5"], "is no share"),
        (["rum"], "did you mean `run`"),
        (["run", "squares", "--backends", "dali"], "--backends are of `views` alone"),
        (["run", "squares", "--within-s", "5"], "--within-s 5 is for --suite gpu"),
    ],
)
def test_what_cannot_work_is_one_clear_line(argv: list[str], message: str):
    with pytest.raises(UserError, match=message):
        cli.main(argv)


def test_list_names_every_benchmark_and_suite(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed["benchmarks"]) == ["squares", "disagreeing", "orphan"]
    assert listed["benchmarks"]["squares"]["about"] == "the toy squares"
    assert set(listed["suites"]) == {"quick", "cpu", "gpu", "full"}
    assert cli.main(["list"]) == 0
    assert "disagreeing" in capsys.readouterr().out


def test_compare_exits_with_1_on_a_regression_only(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert run("squares", "--out", str(tmp_path / "measured.jsonl")) == 0
    (timed, counted) = load_jsonl(tmp_path / "measured.jsonl")
    for path, seconds in ((a, 0.01), (b, 0.02)):
        append_jsonl(path, dataclasses.replace(timed, ours=1 / seconds, ours_s=(seconds,) * 7))
        append_jsonl(path, counted)
    capsys.readouterr()
    assert cli.main(["compare", str(a), str(a), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["regressions"] == 0
    assert cli.main(["compare", str(a), str(b), "--tolerance", "0.2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [d["regressed"] for d in found["differences"]] == [True, False]
    assert cli.main(["compare", str(a), str(b), "--tolerance", "0.2"]) == 1
    assert "past the tolerance" in " ".join(capsys.readouterr().out.split())


def test_the_cpu_suite_leaves_out_what_takes_an_hour_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ran: list[str] = []

    def note(name: str, **_: object) -> Iterator[None]:
        ran.append(name)
        return iter(())

    toy = registry.BENCHMARKS["squares"]
    monkeypatch.setattr(registry, "BENCHMARKS", {"ema": toy, "plan": toy})
    monkeypatch.setattr(registry, "run_benchmark", note)
    for names in ([], ["plan"]):
        cli.main(["run", *names, "--json"])
    assert ran == ["ema", "plan"]


def test_each_benchmark_of_the_gpu_suite_gets_a_process_and_what_is_left_of_the_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    called: list[tuple[str, tuple[str, ...], float]] = []

    def note(name: str, options: list[str], *, suite: str, limit_s: float) -> Iterator[Record]:
        called.append((name, tuple(options[:3]), limit_s))
        yield Record(
            name=name, peer=None, work="w", unit="x/s", ours=1234567.0, suite=suite, machine={"a": 1}
        )

    suite = dataclasses.replace(
        registry.SUITES["gpu"], limits_s={"squares": 3.0, "to-come": 3.0, "orphan": 9.0}
    )
    monkeypatch.setitem(registry.SUITES, "gpu", suite)
    monkeypatch.setattr(isolated, "run_isolated", note)
    assert cli.main(["run", "--suite", "gpu", "--tiny", "--rounds", "8", "--within-s", "5"]) == 0
    assert [(name, options) for name, options, _ in called] == [
        ("squares", ("--tiny", "--rounds", "8")),
        ("orphan", ("--tiny", "--rounds", "8")),
    ]
    assert called[0][2] == 3.0
    assert 0 < called[1][2] <= 5.0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["name"] for line in lines] == ["squares", "orphan"]
    assert lines[0] == {"name": "squares", "kind": "time", "work": "w", "unit": "x/s", "ours": 1234600.0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["views", "--backends", "dalli"], "no backend to measure `dalli`; did you mean `dali`"),
        (["views", "--backends", "synthetic"], "no backend to measure `synthetic`"),
        (["views", "--recipe", "v1"], "--recipe v1 needs --backends"),
        (["views", "--suite", "gpu"], "needs a CUDA device, and torch sees none"),
    ],
)
def test_what_views_cannot_measure_is_one_clear_line(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(registry, "BENCHMARKS", {"views": registry.BENCHMARKS["squares"]})
    with pytest.raises(UserError, match=message):
        cli.main(["run", *argv])
