import json
import re
from pathlib import Path

import pytest

from linerate.bench import demo
from linerate.bench.demo import DemoOptions, main, run_demo
from linerate.bench.demo_page import headline
from linerate.bench.record import from_json
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    options = DemoOptions(out=out, num_images=600, iterations=3, measure_s=0.1)
    return options, run_demo(options)


def test_the_demo_goes_the_whole_way(done):
    options, result = done
    assert result["images"]["num_train"] == Catalog.load(options.out / "shards-train").num_samples == 500
    assert result["images"]["num_test"] == Catalog.load(options.out / "shards-test").num_samples == 100
    assert result["train"]["step"] == 3
    assert result["knn"]["num_classes"] == 10
    assert all(0 <= result["knn"][name] <= 1 for name in ("trained", "untrained", "raw_pixels"))
    assert [r["unit"] for r in result["throughput"]] == ["pairs/s"] * 3
    assert all(r["ours"] > 0 for r in result["throughput"])
    assert json.loads((options.out / "result.json").read_text())["knn"] == result["knn"]


def test_the_report_is_one_file_that_shows_every_part(done):
    options, result = done
    page = (options.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 * 12
    assert page.count("data:image/svg+xml;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:)', page)
    for words in (
        "kNN against the controls",
        "Throughput",
        "The machine",
        f"{100 * result['knn']['trained']:.1f} %",
    ):
        assert words in page


def test_the_same_demo_again_gives_the_same_figures_without_training(done, monkeypatch):
    options, result = done
    # What it measures anew is none of the figures.
    measured = [from_json(one) for one in result["throughput"]]
    monkeypatch.setattr("linerate.bench.suites.pipeline.measure_pipeline", lambda *_, **__: measured)
    log = (options.out / "run" / "log.jsonl").read_text().count('"event": "step"')
    again = run_demo(options)
    assert again["knn"] == result["knn"]
    assert (options.out / "run" / "log.jsonl").read_text().count('"event": "step"') == log


def test_other_options_in_the_same_folder_are_refused_with_what_differs(done):
    options, _ = done
    with pytest.raises(UserError, match=r"seed was 0, now 1.*--out"):
        run_demo(DemoOptions(out=options.out, num_images=600, iterations=3, seed=1))


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no demo"):
        run_demo(DemoOptions(out=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ['{"seed": 0, "per_cl', "", "[3]", "7", "\xff"])
def test_a_mark_that_cannot_be_read_is_one_line_with_a_way_out(text, tmp_path):
    (tmp_path / "demo.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"demo\.json is damaged.*another --out, or remove"):
        run_demo(DemoOptions(out=tmp_path))


def test_a_kill_while_the_mark_is_written_leaves_a_folder_that_can_be_taken(tmp_path, monkeypatch):
    def killed(path, target):
        raise KeyboardInterrupt

    options = DemoOptions(out=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            demo._claim(options)
    assert [path.name for path in tmp_path.iterdir()] == [".demo.json"]
    demo._claim(options)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_images_without_classes_are_refused_with_a_way_out(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"class folder.*linerate shard pack"):
        main(["--images", str(tmp_path / "flat"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("argv", [["--num-images", "10"], ["--per-class", "1"]])
def test_numbers_that_cannot_work_are_refused(argv):
    with pytest.raises(UserError, match="give"):
        main(argv)


def test_the_headline_says_when_the_control_is_better():
    knn = {"trained": 0.2, "untrained": 0.1, "raw_pixels": 0.25}
    line = headline({"knn": knn, "train": {"step": 90}})
    assert line == (
        "kNN top-1 20.0 % after 90 steps of MoCo, 5.0 points below the better control (raw pixels, 25.0 %)."
    )


@pytest.mark.data
def test_cifar_can_be_given_as_a_tar(tmp_path, capsys):
    tar = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "cifar10-test.tar"
    if not tar.exists():
        pytest.skip(
            "../shared/data/cifar10-test.tar is absent: the demo on a tar of real images stays untested"
        )
    argv = ["--images", str(tar), "--per-class", "12", "--out", str(tmp_path / "out"), "--iterations", "2"]
    assert main([*argv, "--measure-s", "0.1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"]["num_train"], result["images"]["num_test"]) == (100, 20)
    assert result["images"]["class_names"][:2] == ["airplane", "automobile"]
