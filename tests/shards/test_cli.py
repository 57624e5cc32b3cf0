"""`linerate shard`: what stands on stdout, and the exit codes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from linerate.__main__ import main
from linerate.shards import cli
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.overview import summarize
from linerate.shards.preview import choose_positions, draw_contact_sheet, write_contact_sheet

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *argv: object) -> tuple[int, Any, str]:
    """(exit code, stdout as JSON, stderr)."""
    code = main(["shard", *map(str, argv), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_pack_tells_what_it_packed(capsys: Capture, photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").symlink_to(photo_folder)
    code, result, err = run(capsys, "pack", "--seed", 3, tmp_path / "in", "--workers", "0", tmp_path / "out")
    assert (code, err) == (0, "")
    assert (result["num_samples"], result["num_rejected"], result["packed_now"]) == (40, 0, 40)
    assert result["classes"] == {"ant": 10, "bee": 10, "cat": 10, "dog": 10}
    assert result["options"]["seed"] == 3
    assert Catalog.load(tmp_path / "out").seed == 3


def test_pack_takes_the_classes_of_a_ground_truth(capsys: Capture, tmp_path: Path, make_jpeg: Any) -> None:
    (tmp_path / "in").mkdir()
    for number in (1, 2):
        (tmp_path / "in" / f"ILSVRC2012_val_0000000{number}.JPEG").write_bytes(make_jpeg(number))
    (tmp_path / "truth.txt").write_text("n02119789\nn01440764\n")
    truth = ["--ground-truth", tmp_path / "truth.txt"]
    code, result, _ = run(capsys, "pack", tmp_path / "in", *truth, tmp_path / "out", "--workers", 0)
    assert (code, result["classes"]) == (0, {"n01440764": 1, "n02119789": 1})


def test_images_without_labels_make_no_class(capsys: Capture, tmp_path: Path, make_jpeg: Any) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(make_jpeg(0))
    assert main(["shard", "pack", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0"]) == 0
    assert "1 in no classes" in capsys.readouterr().out


def test_pack_prints_a_table_with_the_rejects(capsys: Capture, tmp_path: Path, make_jpeg: Any) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(make_jpeg(0))
    (tmp_path / "in" / "b.jpg").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(["shard", "pack", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "1 not a JPEG (PNG)" in out
    assert "--baseline" in out
    assert main(["shard", "pack", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert "nothing was left to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "needs a source and the folder for its shards"),
        (["only-one"], "needs a source and the folder for its shards"),
        (["/no/such/folder", "out"], "the source /no/such/folder does not exist"),
        (["a", "b", "--check", "sha256"], "sha256"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_code_2(capsys: Capture, argv: list[str], message: str) -> None:
    assert main(["shard", "pack", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_wrong_subcommand_gets_a_hint(capsys: Capture) -> None:
    assert main(["shard", "verfy"]) == 2
    assert "did you mean `verify`?" in capsys.readouterr().err


def test_options_may_stand_between_the_paths() -> None:
    argv = ["a", "--seed", "1", "b", "--json", "--name=x", "c", "--", "-d"]
    assert cli._paths_last(argv) == ["--seed", "1", "--json", "--name=x", "a", "b", "c", "-d"]


def test_verify_exits_with_1_on_damage(capsys: Capture, packed: Catalog, tmp_path: Path) -> None:
    root = shutil.copytree(packed.root, tmp_path / "copy")
    assert run(capsys, "verify", root)[:2][0] == 0
    assert main(["shard", "verify", str(root)]) == 0
    assert "all is well: 40 samples in 5 shards" in capsys.readouterr().out
    (root / "shard-000001.idx").unlink()
    code, result, _ = run(capsys, "verify", root)
    assert (code, result["ok"]) == (1, False)
    assert result["problems"] == [
        {"file": "shard-000001.tar", "sample_id": None, "what": "its .idx is missing"}
    ]
    assert main(["shard", "verify", str(root)]) == 1
    assert "shard-000001.tar: its .idx is missing" in capsys.readouterr().out


def test_inspect_counts_what_is_there(capsys: Capture, packed: Catalog) -> None:
    code, result, _ = run(capsys, "inspect", packed.root)
    assert code == 0
    sizes = [int(size) for shard in range(5) for size in packed.shard_index(shard).size]
    assert result["jpeg_bytes"] == sum(sizes)
    assert (result["sample_bytes"]["min"], result["sample_bytes"]["max"]) == (min(sizes), max(sizes))
    assert sum(count for _, count in result["size_histogram"]) == 40
    for end, count in result["size_histogram"]:
        assert count == sum(end // 2 < size <= end or (end == 1024 and size <= end) for size in sizes)
    assert (result["smallest_shard"], result["largest_shard"]) == (8, 8)
    assert main(["shard", "inspect", str(packed.root), "--classes", "2"]) == 0
    out = capsys.readouterr().out
    assert "classes, the largest 2 of 4" in out
    assert "size of a JPEG" in out


def test_inspect_shows_properties_and_rejects(
    capsys: Capture, tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(make_jpeg(0, progressive=True))
    (tmp_path / "in" / "b.jpg").write_bytes(make_jpeg(0, 20, 30, "L"))
    (tmp_path / "in" / "c.jpg").write_bytes(b"")
    main(["shard", "pack", str(tmp_path / "in"), str(tmp_path / "out")])
    capsys.readouterr()
    _, result, _ = run(capsys, "inspect", tmp_path / "out")
    assert result["formats"] == {"progressive": 1, "grayscale": 1}
    assert result["rejects"] == {"empty": 1}
    assert result["classes"] == {"(none)": 2}
    main(["shard", "inspect", str(tmp_path / "out")])
    assert "progressive" in capsys.readouterr().out


def test_a_missing_index_is_no_traceback(packed: Catalog, tmp_path: Path) -> None:
    root = shutil.copytree(packed.root, tmp_path / "it's here")
    catalog = Catalog.load(root)
    assert summarize(catalog).num_samples == 40
    (root / "shard-000002.parquet").unlink()
    with pytest.raises(UserError, match=r"an index of .* cannot be read .*linerate shard verify"):
        summarize(catalog)


def test_preview_draws_the_images_it_names(capsys: Capture, packed: Catalog, tmp_path: Path) -> None:
    code, result, _ = run(capsys, "preview", packed.root, "--out", tmp_path / "sheet.png", "--num", 6)
    assert (code, result["num"]) == (0, 6)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert len(sheet.getcolors(1 << 20) or []) > 100
    assert main(["shard", "preview", str(packed.root), "--out", str(tmp_path / "new" / "b.png")]) == 0
    assert "40 of 40 samples" in capsys.readouterr().out


def test_preview_chooses_without_repeating(packed: Catalog) -> None:
    positions = choose_positions(packed, num=30, seed=1)
    assert len(set(positions.tolist())) == 30
    assert positions.tolist() == choose_positions(packed, num=30, seed=1).tolist()
    assert positions.tolist() != choose_positions(packed, num=30, seed=2).tolist()
    assert choose_positions(packed, num=99, seed=1).tolist() == list(range(40))


def test_a_broken_image_is_a_red_cell(packed: Catalog, tmp_path: Path) -> None:
    root = shutil.copytree(packed.root, tmp_path / "copy")
    for shard in range(5):
        index = packed.shard_index(shard)
        with (root / packed.files[shard]).open("r+b") as tar:
            for offset in index.offset:
                tar.seek(int(offset))
                tar.write(bytes(16))
    sheet = draw_contact_sheet(Catalog.load(root), num=4)
    assert sheet.getpixel((60, 100)) == (235, 200, 200)


def test_preview_refuses_what_it_cannot_write(packed: Catalog, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--num is 0"):
        draw_contact_sheet(packed, num=0)
    with pytest.raises(UserError, match=r"x\.nonsense has no suffix"):
        write_contact_sheet(packed, tmp_path / "x.nonsense")
    assert list(tmp_path.iterdir()) == []
