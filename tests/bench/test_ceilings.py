import contextlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from linerate.bench import ceilings, disk
from linerate.bench.ceilings import copy_of, matmul_of, step_ceiling
from linerate.bench.disk import disk_kind, disk_record, read_file, scratch_file, write_file
from linerate.bench.floors import StepWork
from linerate.bench.suites.step_parts import InfoNceSides
from linerate.bench.timing import Side
from linerate.train.infonce import chunk_size

BYTES = 3 * 2**20 + 5


def test_a_disks_record_has_its_kind_and_rates_and_no_path(tmp_path: Path) -> None:
    record = disk_record(tmp_path, num_bytes=BYTES)
    assert record["kind"].partition(" ")[0] in ("memory", "disk")
    assert record["write_mb_per_s"] > 0
    assert record["read_mb_per_s"] > 0
    assert str(tmp_path) not in json.dumps(record)
    assert [path.name for path in tmp_path.iterdir()] == [disk.NAME], "the file that was timed is gone"


def test_a_process_inside_the_folder_takes_the_rates_that_were_measured(tmp_path: Path) -> None:
    record = disk_record(tmp_path, num_bytes=BYTES)
    inside = tmp_path / "inside"
    inside.mkdir()
    assert disk_record(inside, num_bytes=10**15) == record
    assert list(inside.iterdir()) == []


def test_a_full_disk_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")(4 * BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    record = disk_record(tmp_path, num_bytes=BYTES)
    assert (record["write_mb_per_s"], record["read_mb_per_s"]) == (None, None)
    assert list(tmp_path.iterdir()) == []


def test_all_bytes_are_written_and_read_and_a_limit_ends_both(tmp_path: Path) -> None:
    with scratch_file(tmp_path, BYTES) as path:
        assert path is not None
        assert write_file(path, BYTES)[0] == path.stat().st_size == BYTES
        assert read_file(path)[0] == BYTES
        assert read_file(path, limit_s=0.0)[0] == 0
        assert write_file(path, BYTES, limit_s=0.0)[0] == path.stat().st_size == 0


def test_what_lies_in_memory_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = f"dev / ext4 rw 0 0\nshm {tmp_path} tmpfs rw 0 0\ndev {tmp_path}/on\\040disk xfs rw 0 0\n"
    read_text = Path.read_text

    def told(path: Path, **how: str) -> str:
        return mounts if str(path) == "/proc/mounts" else read_text(path, **how)

    monkeypatch.setattr(Path, "read_text", told)
    assert disk_kind(tmp_path / "a") == "memory (tmpfs)"
    assert disk_kind(tmp_path / "on disk" / "a") == "disk (xfs)"
    assert disk_kind(tmp_path.parent) == "disk (ext4)"


def test_a_copy_counts_what_is_read_and_written_and_a_product_two_a_multiply_add() -> None:
    assert copy_of("cpu", 1000).amount == 2000 / 1e9
    assert matmul_of("cpu", torch.float32, 10).amount == 2 * 10**3 / 1e12


def test_infonces_ceiling_is_its_two_products_whole() -> None:
    sides = InfoNceSides(4, 1000, device="cpu")
    assert chunk_size(4, 1000, device_type="cpu") < 1000, (
        "more than one block, and a last one that is smaller"
    )
    expected = sides.query.detach() @ sides.negatives.T @ sides.negatives
    torch.testing.assert_close(sides.products(), expected)


@pytest.mark.parametrize(("copy_s", "name"), [(1.0, "its bytes as one copy, eager"), (1e-9, "its products")])
def test_a_steps_ceiling_is_the_slower_of_its_floors(
    copy_s: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Side(run=contextlib.nullcontext)
    took = {1.0: copy_s, 2.0: 1e-3}
    monkeypatch.setattr(ceilings, "copy_of", lambda *_: ceilings.Probed(side=nothing, amount=1.0))
    monkeypatch.setattr(ceilings, "matmul_of", lambda *_: ceilings.Probed(side=nothing, amount=2.0))
    monkeypatch.setattr(ceilings.Probed, "seconds", lambda self: took[self.amount])
    work = StepWork(
        pairs=10,
        flops=4 * 10**12,
        eager_bytes=5 * 10**9,
        bn_relu_bytes=3 * 10**9,
        bn_relu_add_bytes=2 * 10**9,
        conv_bn_bytes=None,
    )
    found = step_ceiling(work, device="cpu", dtype=torch.float32)
    assert found.name.startswith(name)
    # A copy of 1 GB is a fifth of the bytes, a product of 2 TFLOP half of the arithmetic.
    assert found.amount == pytest.approx(2.0 if "copy" in name else 5.0)
    compiled = step_ceiling(work, device="cpu", dtype=torch.float32, form="compiled")
    assert compiled.amount == pytest.approx(5.0)
