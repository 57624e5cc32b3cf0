"""ffcv's file: written whole or not at all, and the same bytes as in the shards."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from linerate.__main__ import main
from linerate.shards import beton
from linerate.shards.beton import ShardImages, default_time_limit_s, write_beton
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.pack import pack

needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None,
    reason="ffcv is not installed, so writing a .beton stays untested",
)


@pytest.fixture
def with_cmyk(make_jpeg: Callable[..., bytes], tmp_path: Path) -> Catalog:
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(make_jpeg(i, 24, 32, "CMYK" if i == 2 else "RGB"))
    return pack(tmp_path / "in", tmp_path / "out", num_workers=0)


def test_samples_are_asked_for_by_position(packed: Catalog, photo_folder: Path) -> None:
    images = ShardImages(packed)
    assert len(images) == 40
    for position in (0, 39, 8, 7):
        image, label, sample_id = images[position]
        shard, row = divmod(position, 8)
        key = packed.keys(shard)[row]
        assert image.jpeg == (photo_folder / key).read_bytes()
        assert packed.class_names[label] == key.split("/")[0]
        assert sample_id == position
    images.close()


def test_what_ffcv_cannot_decode_is_converted(with_cmyk: Catalog) -> None:
    images = ShardImages(with_cmyk)
    modes = []
    for position in range(5):
        with Image.open(io.BytesIO(images[position][0].jpeg)) as image:
            modes.append((image.mode, image.size))
    images.close()
    assert modes == [("RGB", (32, 24))] * 5


def test_the_time_limit_grows_with_the_bytes(packed: Catalog) -> None:
    assert 60 < default_time_limit_s(packed) < 61


def test_without_ffcv_the_way_out_is_said(
    packed: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beton.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs ffcv: apt-get install libturbojpeg0-dev"):
        write_beton(packed, tmp_path / "x.beton")


def _fake_ffcv(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of ffcv's name whose writer does `body`."""
    package = folder / "fake" / "ffcv"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "fields.py").write_text(
        "class RGBImageField:\n    def __init__(self, **o): pass\nclass IntField: pass\n"
    )
    (package / "writer.py").write_text(
        "import sys, time\nclass DatasetWriter:\n    def __init__(self, *a, **o): self.out = a[0]\n"
        f"    def from_indexed_dataset(self, data):\n        open(self.out, 'wb').close()\n        {body}\n"
    )
    monkeypatch.setattr(sys, "path", [str(folder / "fake"), *sys.path])
    monkeypatch.setattr(beton.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("limit_s", "body", "message"),
    [
        (0.5, "time.sleep(60)", r"not done after 0 s and was ended; raise --time-limit-s"),
        (60, "sys.exit('out of pages')", r"ffcv's writer failed: out of pages"),
        (60, "sys.exit(4)", r"ffcv's writer failed: it said nothing"),
        (60, "pass", r"ffcv wrote 0 of 40 samples"),
    ],
)
def test_a_writer_that_hangs_or_fails_leaves_nothing(
    packed: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_s: float, body: str, message: str
) -> None:
    _fake_ffcv(tmp_path, body, monkeypatch)
    with pytest.raises(UserError, match=message):
        write_beton(packed, tmp_path / "x.beton", time_limit_s=limit_s)
    assert [path.name for path in tmp_path.iterdir()] == ["fake"]


READ = """
import sys, json, numpy as np
from ffcv.reader import Reader
reader = Reader(sys.argv[1])
image, label, sample_id = (reader.metadata[name] for name in reader.metadata.dtype.names)
print(json.dumps([reader.field_names, image["data_ptr"].tolist(), sample_id.tolist()]))
"""


@needs_ffcv
def test_ffcv_reads_back_the_same_images(
    with_cmyk: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.beton"
    assert main(["shard", "beton", str(with_cmyk.root), str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_samples"], report["num_converted"]) == (5, 1)
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}  # importing ffcv takes half the time so
    done = subprocess.run(
        [sys.executable, "-c", READ, path], env=environment, capture_output=True, check=True, text=True
    )
    fields, starts, sample_ids = json.loads(done.stdout)
    assert fields == ["image", "label", "sample_id"]
    assert sample_ids == list(range(5))
    stored, images = path.read_bytes(), ShardImages(with_cmyk)
    for position, start in enumerate(starts):
        jpeg = images[position][0].jpeg
        assert stored[start : start + len(jpeg)] == jpeg
    images.close()
    damaged = bytearray(stored)
    damaged[starts[0] + 100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="ffcv wrote something else for sample"):
        beton.check_beton(with_cmyk, path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="ffcv wrote 0 of 5 samples"):
        beton.check_beton(with_cmyk, path)


def test_the_command_prints_one_line(
    packed: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = beton.BetonReport(tmp_path / "x.beton", 40, 2_000_000, 3)
    monkeypatch.setattr(beton, "write_beton", lambda catalog, path, time_limit_s: report)
    assert main(["shard", "beton", str(packed.root), str(tmp_path / "x.beton")]) == 0
    assert "40 samples, 2 MB, 3 converted to RGB" in capsys.readouterr().out
