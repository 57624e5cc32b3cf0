from pathlib import Path

import pytest
import simplejpeg

from linerate.bench import images
from linerate.shards.errors import UserError


def test_generated_photos_are_as_large_as_imagenets_and_the_same_on_every_call(tmp_path: Path):
    images.make_folder(tmp_path / "a", num_images=10)
    images.make_folder(tmp_path / "b", num_images=10)
    a = images.list_folder(tmp_path / "a", num_images=10)
    b = images.list_folder(tmp_path / "b", num_images=10)
    assert [p.read_bytes() for p in a.files] == [p.read_bytes() for p in b.files]
    assert 90 <= a.mean_kb <= 130
    assert sorted(set(a.labels)) == list(range(10))
    height, width, _, subsampling = simplejpeg.decode_jpeg_header(a.files[0].read_bytes())
    assert (height, width, subsampling) == (375, 500, "444")


def test_small_ones_are_about_5_kb(tmp_path: Path):
    images.make_folder(tmp_path / "small", num_images=10, small=True)
    made = images.list_folder(tmp_path / "small", num_images=10)
    assert 3_000 < made.num_bytes / 10 < 8_000


def test_a_set_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LINERATE_BENCH_CACHE", str(tmp_path / "cache"))
    first = images.load_images(None, num_images=3)
    times = [path.stat().st_mtime_ns for path in first.files]
    again = images.load_images(None, num_images=3)
    assert [path.stat().st_mtime_ns for path in again.files] == times
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.root.name]


def test_a_given_folder_is_sampled_over_all_its_classes(tmp_path: Path):
    images.make_folder(tmp_path / "photos", num_images=20, small=True)
    some = images.load_images(tmp_path / "photos", num_images=5)
    assert len(some.files) == 5
    assert len(set(some.labels)) == 5


def test_a_folder_without_jpegs_is_the_users_error(tmp_path: Path):
    with pytest.raises(UserError, match="holds no"):
        images.load_images(tmp_path, num_images=5)


def test_a_copy_keeps_names_labels_and_bytes(tmp_path: Path):
    images.make_folder(tmp_path / "photos", num_images=12, small=True)
    source = images.list_folder(tmp_path / "photos", num_images=12)
    copied = images.copy_folder(source, tmp_path / "copy")
    assert copied.labels == source.labels
    assert [p.read_bytes() for p in copied.files] == [p.read_bytes() for p in source.files]
