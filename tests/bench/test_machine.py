import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linerate.bench.machine import Probe, _own_s, cgroup_quota, code_identity, machine, noise, probe


def test_the_record_names_what_decides_a_figure_and_holds_no_path():
    record = machine()
    assert record["cpu"]
    assert 0 < record["cores"] <= record["cores_installed"]
    assert record["memory_gib"] > 0
    assert record["libraries"]["torch"]
    assert len(record["code"]["sources_xxh3"]) == 16
    assert record["code"]["path"].endswith("/linerate")
    assert not Path(record["code"]["path"]).is_absolute()
    text = json.dumps(record)
    assert str(Path.home()) not in text
    assert str(Path(__file__).resolve().parents[2]) not in text
    assert os.uname().nodename not in text


def test_the_code_identity_is_stable_between_calls():
    assert code_identity()["sources_xxh3"] == code_identity()["sources_xxh3"]


@pytest.mark.parametrize(
    ("own", "parent", "cores"),
    [
        ("max 100000", "max 100000", None),
        ("150000 100000", "max 100000", 1.5),
        ("max 1", "50000 100000", 0.5),
    ],
)
def test_the_tightest_quota_above_the_group_counts(
    tmp_path: Path, own: str, parent: str, cores: float | None
):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "cpu.max").write_text(parent + "\n")
    (tmp_path / "outer" / "inner" / "cpu.max").write_text(own + "\n")
    assert cgroup_quota(tmp_path, "outer/inner") == cores


def test_a_first_version_quota_counts_too(tmp_path: Path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path, "") == 2.5


def quiet_probe(at_s: float, *, busy_s: float, own_s: float, ms: float = 1.0) -> Probe:
    return Probe((ms / 1e3,) * 25, busy_s, own_s, at_s)


def test_a_steady_kernel_on_an_idle_machine_is_quiet():
    verdict = noise(quiet_probe(0, busy_s=100, own_s=10), quiet_probe(10, busy_s=110, own_s=20))
    assert verdict["noisy"] is False
    assert verdict["others_cores"] == 0


def test_neighbours_make_the_machine_noisy():
    cores = os.cpu_count() or 1
    verdict = noise(quiet_probe(0, busy_s=0, own_s=0), quiet_probe(10, busy_s=10 + 5 * cores, own_s=10))
    assert verdict["others_cores"] == pytest.approx(cores / 2)
    assert verdict["noisy"] is True


def test_a_kernel_that_slowed_down_makes_the_machine_noisy():
    verdict = noise(quiet_probe(0, busy_s=0, own_s=0), quiet_probe(10, busy_s=0, own_s=0, ms=1.5))
    assert verdict["spread"] > 0.3
    assert verdict["noisy"] is True


def test_a_gpus_clocks_and_power_are_read_behind_the_work(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def output(command: list[str]) -> str:
        asked.append(command)
        return "1980, 2619, 551.20"

    monkeypatch.setattr("linerate.bench.machine._output", output)
    quiet = quiet_probe(0, busy_s=0, own_s=0), quiet_probe(1, busy_s=0, own_s=0)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    assert "clocks_sm" not in noise(*quiet)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    found = noise(*quiet)
    assert (found["clocks_sm"], found["clocks_mem"], found["power_draw"]) == ("1980", "2619", "551.20")
    assert "--query-gpu=clocks.sm,clocks.mem,power.draw" in asked[0]


def test_the_probe_is_timed_as_often_as_told():
    seconds = probe(repeats=5).seconds
    assert len(seconds) == 5
    assert min(seconds) > 0


def test_what_a_child_uses_while_it_runs_is_our_own_and_is_counted_once_when_it_has_ended():
    work = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True); input()"
    before, started = _own_s(), os.times()
    child = subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    running = _own_s()
    child.communicate(b"\n")
    ended, now = _own_s(), os.times()
    assert running - before >= 0.4
    # The system's own reckoning of children that have ended.
    used = sum(
        getattr(now, part) - getattr(started, part)
        for part in ("user", "system", "children_user", "children_system")
    )
    assert ended - before == pytest.approx(used, abs=0.1)
