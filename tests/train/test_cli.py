import json
import math
from pathlib import Path

import fsspec
import pytest
from tests.train.small import SMALL

from linerate.__main__ import main
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.cli import damage_rows, parse_train
from linerate.train.config import ShuffleBN
from linerate.train.pretrain import pretrain
from linerate.train.recipes import RECIPES
from linerate.train.run_folder import Damage


def _error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("linerate: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def run(shards: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("cli") / "run"
    pretrain(SMALL, shards=shards.root, run_dir=root)
    return root


def test_without_a_recipe_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)


def test_flags_change_the_recipes_fields() -> None:
    words = "--seed 3 --iterations 9 --no-shuffle --precision bf16 --knn-test T --no-blur"
    command, config = parse_train(["cifar10", "--run-dir", "R", "--resume", *words.split()])
    assert (command.run, command.resume) == (Path("R"), True)
    assert (config.recipe, config.seed, config.schedule.iterations) == ("cifar10", 3, 9)
    assert (config.bn.shuffle, config.speed.precision, config.watch.knn_test) == (False, "bf16", "T")
    assert config.model == RECIPES["cifar10"].build().model


def test_shuffle_bn_is_switched_by_the_name_that_the_paper_has_for_it() -> None:
    for words, on in (("--shuffle-bn off", False), ("--shuffle-bn=on", True), ("--shuffle-bn=off", False)):
        _, config = parse_train(["cifar10", *words.split(), "--seed", "5"])
        assert (config.bn.shuffle, config.seed) == (on, 5)
    with pytest.raises(UserError, match="--shuffle-bn no is neither on nor off"):
        parse_train(["cifar10", "--shuffle-bn", "no"])
    with pytest.raises(UserError, match="--shuffle-bn wants on or off"):
        parse_train(["cifar10", "--shuffle-bn"])


def test_of_shuffle_bn_and_its_other_names_the_last_one_counts() -> None:
    for words, on in (("--shuffle-bn off --shuffle", True), ("--shuffle-bn on --no-shuffle", False)):
        assert parse_train(["cifar10", *words.split()])[1].bn.shuffle == on


def test_a_shuffle_block_without_shuffling_is_refused_here_and_still_read_from_old_checkpoints() -> None:
    with pytest.raises(UserError, match="give one of --shuffle-block and --no-shuffle"):
        parse_train(["cifar10", "--no-shuffle", "--shuffle-block", "64"])
    assert ShuffleBN(shuffle=False, shuffle_block=64).shuffle_block == 64


def test_a_length_in_one_unit_replaces_the_recipes_in_the_other() -> None:
    for recipe in ("in1m-v1", "ig1b-v1"):
        _, config = parse_train([recipe, "--epochs", "7"])
        assert (config.schedule.epochs, config.schedule.iterations) == (7, None)
        _, config = parse_train([recipe, "--iterations=7"])
        assert (config.schedule.epochs, config.schedule.iterations) == (None, 7)


def test_another_batch_scales_lr_when_told_to() -> None:
    _, config = parse_train(["in1m-v1", "--global-batch", "1024", "--scale-lr"])
    assert config.optim.lr == pytest.approx(0.12)
    _, config = parse_train(["in1m-v1", "--global-batch", "1024", "--lr=0.03"])
    assert config.optim.lr == 0.03


def test_a_dry_run_tells_the_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "ig1b-v1", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["total_steps"] == 1_250_000
    assert told["plan"]["lr_last"] == pytest.approx(0.01621, abs=5e-6)
    assert told["memory_bytes"]["queue"] == 65536 * 128 * 4
    assert told["config"]["recipe"] == "ig1b-v1"


def test_a_dry_run_tells_what_a_dictionary_takes_and_which_fields_it_ignores(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "ig1b-v1", "--dictionary", "memory-bank", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory_bytes"]["memory bank"] == (940_000_000 + 1) * 128 * 4
    assert told["chance_loss"] == pytest.approx(math.log(65537))
    assert main(["train", "in1m-v1", "--dictionary", "end-to-end", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chance_loss"] == pytest.approx(math.log(256))
    assert told["idle_fields"][0].startswith("num_keys: ")
    assert main(["train", "in1m-v1-end-to-end", "--dry-run"]) == 0
    assert "does nothing here" in capsys.readouterr().out


def test_flags_choose_dictionary_loss_and_micro_batch() -> None:
    words = "--dictionary memory-bank --bank-loss infonce --bank-momentum 0.4 --micro-batch 128"
    _, config = parse_train(["cifar10", *words.split()])
    assert (config.dictionary.dictionary, config.dictionary.bank_momentum) == ("memory-bank", 0.4)
    assert config.speed.micro_batch == 128
    _, config = parse_train(["cifar10", "--symmetric", "--queue-dtype", "bf16"])
    assert (config.loss.symmetric, config.dictionary.queue_dtype) == (True, "bf16")


def test_a_dry_run_over_shards_counts_them(shards: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--global-batch", "16", "--scale-lr", "--bn-group", "4"]
    assert main(["train", "demo", "--dry-run", "--shards", str(shards.root), *flags]) == 0
    out = capsys.readouterr().out
    assert "1 x 16" in out
    assert "device: total" in out


def test_a_dry_run_sees_the_world_size(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["train", "in1m-v1", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["rank_batch"] == 32
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "the nearest that do: 2, 4" in _error(capsys, "train", "in1m-v1", "--dry-run")


def test_a_dry_run_tells_every_ranks_shards_and_its_memory_on_the_host(
    capsys: pytest.CaptureFixture[str], shards: Catalog
) -> None:
    flags = ["--shards", str(shards.root), "--global-batch", "16", "--lr", "0.1", "--bn-group", "4"]
    assert main(["train", "demo", "--dry-run", "--ranks", "2", *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    ranks = told["plan"]["shares"]["ranks"]
    assert [rank["num_samples"] for rank in ranks] == [32, 32]
    assert (told["plan"]["world_size"], told["plan"]["num_shards"]) == (2, shards.num_shards)
    assert told["host_memory_of"] == {"num_bytes": shards.max_sample_bytes, "pixels": 24 * 24}
    host = told["host_memory_bytes"]
    assert host["total"] == sum(size for name, size in host.items() if name != "total")
    assert main(["train", "demo", "--dry-run", "--ranks", "2", *flags]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "world size 2" in out
    assert "host: decoded images" in out
    assert "24 x 24" in out
    assert main(["train", "demo", "--dry-run", *flags, "--backend", "webdataset"]) == 0
    assert "host │ not foreseen" in " ".join(capsys.readouterr().out.split())
    assert main(["train", "in1m-v2", "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "180,120 pixels in 110 kB" in out
    assert "activations in fp32" in out
    # CIFAR's images are no photos.
    assert main(["train", "cifar10", "--dry-run", "--precision", "bf16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["host_memory_of"] == {"num_bytes": 900, "pixels": 32 * 32}
    assert told["plan"]["shares"]["ranks"][0]["num_bytes"] == 900 * 97 * 512


def test_damage_is_told_by_shard_and_reason_of_many_the_first() -> None:
    damage = [Damage(shard=f"{i}.tar", reason="torn", num_samples=i or None) for i in range(10)]
    rows = damage_rows(damage, logs=["run/bad.jsonl"])
    assert rows[:2] == [("0.tar", "the whole shard: torn"), ("1.tar", "1 of its samples: torn")]
    assert rows[8:] == [("...", "2 more; --json has all"), ("listed in", "run/bad.jsonl")]


def test_ranks_are_for_a_dry_run_and_at_least_one(
    capsys: pytest.CaptureFixture[str], shards: Catalog, tmp_path: Path
) -> None:
    argv = ("train", "demo", "--shards", str(shards.root), "--run", str(tmp_path / "run"))
    assert "torchrun --nproc-per-node 2 starts them" in _error(capsys, *argv, "--ranks", "2")
    assert "--ranks 0 is no number" in _error(capsys, "train", "in1m-v1", "--dry-run", "--ranks", "0")


def test_bad_words_are_one_line_with_a_way_out(
    capsys: pytest.CaptureFixture[str], shards: Catalog, tmp_path: Path
) -> None:
    missing, root = str(tmp_path / "missing"), str(shards.root)
    run = str(tmp_path / "run")
    assert "did you mean `cifar10`" in _error(capsys, "train", "cifar")
    assert "the recipe comes first" in _error(capsys, "train", "--shards", root)
    assert "--shards is missing" in _error(capsys, "train", "demo")
    assert "--run is missing" in _error(capsys, "train", "demo", "--shards", root)
    assert "no catalog.json" in _error(capsys, "train", "demo", "--shards", missing, "--run", run)
    assert "did you mean --epochs" in _error(capsys, "train", "demo", "--epoch", "3")
    assert "--scale-lr" in _error(capsys, "train", "in1m-v1", "--global-batch", "512")
    assert "nearest that do: 16, 32" in _error(capsys, "train", "in1m-v1", "--bn-group", "24")
    vit = _error(capsys, "train", "in1m-v1", "--encoder", "test_vit", "--dry-run")
    assert "160x160 pixels alone" in vit
    assert "demo is for no particular data set" in _error(capsys, "train", "demo", "--dry-run")
    too_large = _error(capsys, "train", "in1m-v1", "--shards", root, "--run", run)
    assert "256" in too_large
    assert "72" in too_large
    assert not (tmp_path / "run").exists()


def test_a_batch_above_the_shards_is_told_before_the_learning_rate_for_it(
    capsys: pytest.CaptureFixture[str], shards: Catalog, tmp_path: Path
) -> None:
    flags = ("--shards", str(shards.root), "--run", str(tmp_path / "run"), "--global-batch", "100000")
    line = "72 images do not fill one global_batch=100000; give a --global-batch of at most 72"
    for more in ((), ("--scale-lr",), ("--dry-run",)):
        assert line in _error(capsys, "train", "demo", *flags, *more)
    assert not (tmp_path / "run").exists()


def test_an_encoder_that_takes_no_such_size_is_refused_without_a_traceback(
    capsys: pytest.CaptureFixture[str], shards: Catalog, tmp_path: Path
) -> None:
    argv = ("train", "demo", "--shards", str(shards.root), "--run", str(tmp_path / "run"))
    flags = ("--stem", "imagenet", "--encoder", "test_vit")
    assert "give --size 160" in _error(capsys, *argv, *flags)


def test_knn_prints_the_encoder_beside_its_controls(
    run: Path, shards: Catalog, test_shards: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--train", str(shards.root), "--test", str(test_shards.root), "--k", "5", "--threads", "1"]
    assert main(["eval", "knn", str(run), *sets, "--controls", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["results"]] == ["step 12", "untrained encoder", "raw pixels"]
    assert {row["num_test"] for row in told["results"]} == {30}
    assert all(0 <= row["knn_top1"] <= 1 for row in told["results"])
    assert (told["step"], told["k"], told["size"]) == (12, 5, 16)
    assert main(["eval", "knn", str(run), *sets, "--features", "projection"]) == 0
    out = capsys.readouterr().out
    assert "top-1 of 30" in out
    assert "raw pixels" not in out


def test_knn_on_one_set_holds_a_share_out(
    run: Path, shards: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "knn", str(run), "--train", str(shards.root), "--test-share", "0.25", "--json"]
    assert main([*argv, "--threads", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["num_train"] + row["num_test"] == 72


def test_knn_counts_test_images_that_also_vote(
    run: Path, shards: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(shards.root)
    argv = ["eval", "knn", str(run), "--train", root, "--test", root, "--k", "5", "--threads", "1"]
    assert main([*argv, "--backend", "torch", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["num_test_in_train"] == 72
    assert "note: 72 of 72 test images are also among the train images (same bytes)" in err


def test_knn_is_the_same_on_both_backends_crops(
    run: Path, shards: Catalog, test_shards: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "knn", str(run), "--train", str(shards.root), "--test", str(test_shards.root), "--json"]
    found = []
    for backend in ("dali", "torch"):
        assert main([*argv, "--k", "5", "--threads", "1", "--backend", backend]) == 0
        found.append(json.loads(capsys.readouterr().out)["results"][0]["knn_top1"])
    assert abs(found[0] - found[1]) <= 2 / 30


def test_knn_refuses_what_has_no_answer(
    run: Path, shards: Catalog, unlabelled_shards: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(shards.root)
    assert "has no command `knm`; did you mean `knn`" in _error(capsys, "eval", "knm")
    assert "has no checkpoint" in _error(capsys, "eval", "knn", str(tmp_path), "--train", root)
    bad_share = _error(capsys, "eval", "knn", str(run), "--train", root, "--test-share", "2")
    assert "must lie between 0 and 1" in bad_share
    for flag in ("--k", "--threads", "--size"):
        assert f"{flag} 0 must be at least 1" in _error(
            capsys, "eval", "knn", str(run), "--train", root, flag, "0"
        )
    unlabelled = _error(capsys, "eval", "knn", str(run), "--train", str(unlabelled_shards.root))
    assert "has no labels" in unlabelled


def test_export_writes_the_file_and_its_card(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    assert main(["export", str(run), "--to", "safetensors", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(out)
    assert told["max_difference"] <= 1e-5
    assert Path(told["card"]).exists()
    assert "no tiny-resnet-w4" in _error(capsys, "export", str(run), "--to", "timm", "--out", str(out))


def test_a_dry_run_over_shards_elsewhere_tells_what_the_cache_must_hold(
    shards: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.filesystem("memory").put(str(shards.root), "/dry-run", recursive=True)
    flags = ["--shards", "memory://dry-run", "--cache-dir", str(tmp_path)]
    flags += ["--global-batch", "16", "--lr", "0.1", "--bn-group", "8"]
    assert main(["train", "demo", "--dry-run", *flags, "--cache-bytes", "1GB", "--json"]) == 0
    need = json.loads(capsys.readouterr().out)["cache"]["need_bytes"]
    assert need == shards.shard_bytes.sum()
    assert main(["train", "demo", "--dry-run", *flags, "--cache-bytes", "1GB"]) == 0
    assert "shard cache" in capsys.readouterr().out
    assert not [*tmp_path.rglob("*.tar")]
    assert "does not hold" in _error(capsys, "train", "demo", "--dry-run", *flags, "--cache-bytes", "9kB")
