import json

import numpy as np
import pytest
from PIL import Image

from linerate.pipeline import parity
from linerate.pipeline.cli import main
from linerate.shards.errors import UserError


def run_json(capsys, *argv: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_views_draws_samples_from_all_over_the_shards(catalog, tmp_path, capsys):
    out = tmp_path / "views.png"
    argv = ("v2", "--shards", catalog.root, "--out", out, "--samples", 3, "--backend", "torch", "--size", 32)
    result = run_json(capsys, *argv)
    assert [sample["position"] for sample in result["samples"]] == [0, 20, 40]
    assert result["samples"][1]["class"] == "cat"
    assert np.asarray(Image.open(out)).std() > 20


def test_a_sample_replays_the_same_views_and_every_epoch_others(catalog, tmp_path, capsys):
    def picture(name: str, *more: object) -> tuple[np.ndarray, list[dict]]:
        argv = ["v3", "--shards", catalog.root, "--sample", 17, "--backend", "torch", "--size", 24]
        result = run_json(capsys, *argv, "--out", tmp_path / name, *more)
        return np.asarray(Image.open(tmp_path / name)), result["samples"]

    first, described = picture("a.png", "--epoch", 3)
    again, _ = picture("b.png", "--epoch", 3)
    np.testing.assert_array_equal(first, again)
    _, many = picture("c.png", "--epoch", 2, "--epochs", 3)
    assert [sample["epoch"] for sample in many] == [2, 3, 4]
    assert many[1] == described[0]
    assert many[0]["query"] != many[1]["query"] != many[1]["key"]


def test_without_json_a_table_names_the_picture(catalog, tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "v.png"
    argv = ["v1", "--shards", str(catalog.root), "--out", str(out), "--samples", "1"]
    assert main([*argv, "--backend", "torch", "--size", "16"]) == 0
    assert "v1 at 16 px by torch" in capsys.readouterr().out
    assert out.stat().st_size > 0


def test_order_reports_steps_drops_lanes_and_the_shuffle(catalog, capsys):
    argv = ("v2", "--shards", catalog.root, "--order", "--global-batch", 8, "--world-size", 2)
    result = run_json(capsys, *argv)
    assert (result["steps_per_epoch"], result["num_dropped"], result["num_lanes"]) == (5, 1, 8)
    assert [rank["num_samples"] for rank in result["ranks"]] == [20, 20]
    assert result["shuffle"]["num_steps_measured"] == 5
    assert 1 <= result["shuffle"]["shards_per_batch"] <= 4
    assert result["shuffle"]["class_run"] == pytest.approx(result["shuffle"]["class_run_uniform"], abs=0.5)
    assert main(["v2", "--shards", str(catalog.root), "--order", "--global-batch", "8"]) == 0
    assert "shards per batch" in capsys.readouterr().out


def test_parity_is_measured_per_operation_and_for_the_recipe(catalog, capsys):
    argv = ("v2", "--shards", catalog.root, "--parity", "--samples", 4, "--size", 48)
    result = run_json(capsys, *argv)
    assert (result["met"], result["num_samples"], result["device"]) == (True, 4, "cpu")
    names = [one["name"] for one in result["differences"]]
    assert names[0] == "crop"
    assert "v2" in names
    assert all(0 <= one["mean"] <= one["p99"] + 1 <= one["max"] + 2 for one in result["differences"])


def test_parity_beyond_a_bound_exits_with_1(catalog, capsys, monkeypatch):
    monkeypatch.setitem(parity.MEAN_BOUNDS, "blur", -1.0)
    argv = ["v2", "--shards", str(catalog.root), "--parity", "--sample", "3", "--size", "32"]
    assert main(argv) == 1
    table = capsys.readouterr().out
    assert table.count("TOO FAR") == 1
    assert "TOO FAR" in next(line for line in table.splitlines() if "blur" in line)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["v22"], "no recipe `v22`; did you mean `v2`"),
        (["v2", "--backend", "synthetic"], "no backend that makes views of images: `synthetic`"),
        (["v2", "--sample", "99"], r"sample 99 is not in 0\.\.40"),
        (["v2", "--out", "/dev/null/x/views.png"], "its folder /dev/null/x cannot be made"),
        (["v2", "--out", "views.jpg"], r"give a name that ends in \.png, \.gif, \.html"),
        (["v2", "--samples", "0"], "--samples is 0, at least 1 is needed"),
        (["v2", "--epochs", "0"], "--epochs is 0, at least 1 is needed"),
        (["v2", "--epoch", "-1"], "--epoch is -1, at least 0 is needed"),
        (["v2", "--order", "--global-batch", "99"], "41 samples do not fill one global_batch=99"),
        (["v2", "--order", "--global-batch", "8", "--world-size", "3"], "world_size=3 does not divide"),
        (["v2", "--order", "--global-batch", "8", "--world-size", "0"], "world_size=0 must be 1 or more"),
        (["v2", "--parity", "--device", "gpu"], "no device `gpu`"),
        (["v2", "--epoch"], "see `linerate views --help`"),
    ],
)
def test_what_cannot_work_is_one_line(catalog, argv, message):
    with pytest.raises(UserError, match=message):
        main([*argv, "--shards", str(catalog.root)])


def test_a_folder_without_a_catalog_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"there is no catalog\.json"):
        main(["v2", "--shards", str(tmp_path)])


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_a_sample_that_does_not_decode_is_one_line(make_shards, make_sample, tmp_path, backend):
    good = make_sample(1)
    bad = type(good)(good.jpeg[:100], good.height, good.width)
    catalog = make_shards([[good, bad]])
    argv = ["v2", "--shards", str(catalog.root), "--backend", backend, "--out", str(tmp_path / "v.png")]
    with pytest.raises(UserError, match="cannot decode sample 000000000001"):
        main(argv)
    assert not (tmp_path / "v.png").exists()


def test_parity_on_a_device_that_is_not_there_is_one_line(catalog, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="there is no CUDA device here"):
        main(["v2", "--shards", str(catalog.root), "--parity", "--device", "cuda"])


@pytest.mark.parametrize(("name", "num_samples"), [("v.gif", 2), ("v.html", 1)])
def test_an_animation_or_a_page_shows_few_samples_over_many_epochs(
    catalog, tmp_path, capsys, name, num_samples
):
    argv = ("v2", "--shards", catalog.root, "--out", tmp_path / name, "--backend", "torch", "--size", "24")
    samples = run_json(capsys, *argv)["samples"]
    assert (tmp_path / name).stat().st_size > 0
    assert len({sample["sample_id"] for sample in samples}) == num_samples
    assert [sample["epoch"] for sample in samples][::num_samples] == list(range(12))
