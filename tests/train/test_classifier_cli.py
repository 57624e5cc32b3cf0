import json
from pathlib import Path

import pytest
from tests.train.small import SMALL

from linerate.__main__ import after_interrupt, main
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.evaluate.classifier_recipes import (
    FINETUNE_RECIPES,
    LINEAR_RECIPES,
    ClassifierConfig,
    scaled_milestones,
)
from linerate.train.pretrain import pretrain
from linerate.train.schedules import lr_at


@pytest.fixture(scope="module")
def run(shards: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("classifier") / "run"
    pretrain(SMALL, shards=shards.root, run_dir=root)
    return root


def _error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("linerate: error: ")
    assert err.count("\n") == 1
    return err


def _rates(config: ClassifierConfig, *epochs: int) -> list[float]:
    return [lr_at(config.schedule, lr=config.lr, step=7 * e, steps_per_epoch=7) for e in epochs]


def test_the_linear_recipes_are_the_references() -> None:
    v1, v3 = (LINEAR_RECIPES[name]() for name in ("v1", "v3"))
    assert (v1.global_batch, v1.weight_decay, v1.sgd_momentum, v1.epochs) == (256, 0.0, 0.9, 100)
    assert _rates(v1, 0, 59, 60, 79, 80, 99) == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert (v3.global_batch, v3.weight_decay, v3.epochs) == (1024, 0.0, 90)
    assert _rates(v3, 0, 45) == pytest.approx([0.4, 0.2])


def test_the_fine_tuning_recipes_are_the_papers() -> None:
    in1m, inat18 = (FINETUNE_RECIPES[name]() for name in ("in1m", "inat18"))
    assert (in1m.lr, inat18.lr) == (0.03, 0.025)
    assert (in1m.epochs, inat18.epochs, in1m.bn_group) == (100, 100, 32)


def test_milestones_move_with_the_epochs() -> None:
    v1 = LINEAR_RECIPES["v1"]()
    assert [scaled_milestones(v1, epochs) for epochs in (100, 10, 2, 1)] == [(60, 80), (6, 8), (1, 2), (1,)]


def test_settings_without_sense_are_refused() -> None:
    for field, value, line in (
        ("epochs", 0, "epochs=0 is too small"),
        ("lr", 0.0, "lr=0 must be above 0"),
        ("label_share", 1.5, "label_share=1.5 is no share"),
        ("test_share", 1.0, "test_share=1 leaves nothing to learn from"),
        ("milestones", (60, 120), "milestones 120 lie beyond the 100 epochs"),
        ("milestones", (60, 40), "must rise"),
    ):
        with pytest.raises(UserError, match=line):
            ClassifierConfig(**{**LINEAR_RECIPES["v1"]().plain(), field: value})


def test_linear_prints_every_encoder_with_mean_and_deviation(
    run: Path, shards: Catalog, test_shards: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--train", str(shards.root), "--test", str(test_shards.root), "--threads", "1"]
    flags = ["--fast", "--global-batch", "24", "--scale-lr", "--epochs", "5", "--runs", "2", "--controls"]
    assert main(["eval", "linear", str(run), *sets, *flags, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert [row["name"] for row in told["results"]] == ["trained", "untrained"]
    for row in told["results"]:
        top1 = [one["top1"] for one in row["runs"]]
        assert row["top1_mean"] == pytest.approx(sum(top1) / 2)
        assert row["top1_std"] == pytest.approx(abs(top1[0] - top1[1]) / 2**0.5)
        assert [one["seed"] for one in row["runs"]] == [0, 1]
    assert told["config"]["lr"] == pytest.approx(30 * 24 / 256)
    assert (told["num_train"], told["num_test"], told["num_test_in_train"]) == (72, 30, 0)
    assert told["out"] == str(run / "linear" / "v1-fast-step-000000012")
    assert "fast variant" in told["variant"]
    assert err.startswith("fast variant: ")
    assert "lr 2.8125 (the recipe's is 30 at batch 256), x 0.1 at epochs [3, 4]" in err
    # The same command again: nothing is left to do, the label stands on the table too.
    assert main(["eval", "linear", str(run), *sets, *flags]) == 0
    out = capsys.readouterr().out
    assert "fast variant" in out
    assert "+-" in out


def test_finetune_runs_on_a_share_of_the_labels_of_one_set(
    run: Path, shards: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--global-batch", "8", "--lr", "0.01", "--bn-group", "4", "--epochs", "1", "--threads", "1"]
    flags += ["--label-share", "0.5", "--test-share", "0.2", "--backend", "torch", "--out", str(tmp_path)]
    assert main(["eval", "finetune", str(run), "--train", str(shards.root), *flags, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["config"]["test_share"] == 0.2
    assert 0 < told["num_train"] < 72 - told["num_test"]
    assert "note: 0.5 of the labels: " in err
    assert "epoch 1/1 lr 0.01 " in err
    assert (tmp_path / "trained" / "seed-0" / "state.pt").exists()


def test_what_has_no_answer_is_one_line_with_a_way_out(
    run: Path, shards: Catalog, unlabelled_shards: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear, train = ("eval", "linear", str(run)), ("--train", str(shards.root))
    assert "did you mean `linear`" in _error(capsys, "eval", "liner")
    assert "has no checkpoint" in _error(capsys, "eval", "linear", str(tmp_path), *train)
    assert "has no labels" in _error(capsys, *linear, "--train", str(unlabelled_shards.root))
    too_large = _error(capsys, *linear, *train)
    assert "images do not fill one global_batch=256" in too_large
    undecided = _error(capsys, *linear, *train, "--global-batch", "16")
    assert "is not the 256 that lr=30 of linear v1 is for; decide: --scale-lr for 1.875" in undecided
    both = _error(capsys, *linear, *train, "--global-batch", "16", "--scale-lr", "--lr", "1")
    assert "contradict" in both
    for flag in ("--runs", "--epochs", "--global-batch", "--size", "--threads"):
        assert f"{flag} 0 must be at least 1" in _error(capsys, *linear, *train, flag, "0")
    groups = _error(capsys, "eval", "finetune", str(run), *train, "--bn-group", "0")
    assert "--bn-group 0 must be at least 1" in groups
    assert "must lie between 0 and 1" in _error(capsys, *linear, *train, "--test-share", "1")
    assert "--label-share -1 is no share" in _error(capsys, *linear, *train, "--label-share", "-1")
    group = _error(
        capsys, "eval", "finetune", str(run), *train, "--global-batch", "16", "--scale-lr", "--threads", "1"
    )
    assert "bn_group=32 does not divide the 16 images of a rank" in group
    assert not (run / "linear" / "v1-step-000000012").exists()


def test_a_default_folder_is_named_by_what_it_is_of(run: Path) -> None:
    from linerate.train.checkpoint import load_trained
    from linerate.train.evaluate.classifier_cli import default_out

    config = ClassifierConfig(**{**FINETUNE_RECIPES["in1m"]().plain(), "label_share": 0.01})
    trained = load_trained(run)
    assert default_out(trained, config) == run / "finetune" / "in1m-step-000000012-labels-0.01"


def test_after_an_interrupt_the_same_command_continues() -> None:
    for protocol in ("linear", "finetune"):
        assert after_interrupt(["eval", protocol, "r"]) == "the same command continues where it stopped"
