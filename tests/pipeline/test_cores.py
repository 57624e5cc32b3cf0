import os

import pytest

from linerate.pipeline.cores import default_num_threads, usable_cores


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("9900000 100000", 8), ("odd", 8)],
)
def test_usable_cores_obey_the_cgroups_quota(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    path = tmp_path / "cpu.max"
    path.write_text(text)
    assert usable_cores(path) == expected


def test_usable_cores_without_a_cgroup_are_the_affinitys(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 7})
    assert usable_cores(tmp_path / "none") == 3


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("linerate.pipeline.cores.usable_cores", lambda: 13)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_num_threads() == 13
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_num_threads() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert default_num_threads() == 1
