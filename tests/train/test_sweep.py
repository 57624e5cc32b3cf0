"""The paper's cells, the plan of a sweep, and the words that make each cell."""

import dataclasses

import pytest

from linerate.__main__ import main
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.cli import parse_train
from linerate.train.recipes import RECIPES
from linerate.train.sweep_cells import DICTIONARIES, OVERS, paper_cell, paper_cells
from linerate.train.sweep_plan import Cell, SweepPlan, cell_flags, plan_sweep

IN1M = 1_281_167


def _plan(recipe: str, over: str, **options: object) -> SweepPlan:
    options = {"num_images": IN1M, **options}
    return plan_sweep(RECIPES[recipe].build(), over=over, **options)  # type: ignore[arg-type]


def _cell(recipe: str, over: str, value: str, **options: object) -> Cell:
    (cell,) = _plan(recipe, over, values=(value,), **options).cells
    return cell


def test_the_table_holds_the_papers_figures() -> None:
    sizes = (256, 512, 1024, 4096, 16384, 65536)
    rows = {
        "end-to-end": (54.9, 56.5, 57.3),
        "memory-bank": (50.0, 52.0, 54.1, 56.5, 57.8, 58.0),
        "queue": (54.7, 56.4, 57.5, 59.0, 60.4, 60.6),
    }
    for kind, row in rows.items():
        found = {int(cell.value): cell.top1 for cell in paper_cells("K", dictionaries=(kind,))}
        assert found == dict(zip(sizes, row, strict=False))
    m = {cell.value: cell.top1 for cell in paper_cells("m", dictionaries=())}
    assert m == {"0": None, "0.9": 55.2, "0.99": 57.8, "0.999": 59.0, "0.9999": 58.9}
    three = {cell.value: cell.top1 for cell in paper_cells("dictionary", dictionaries=())}
    assert three == {"end-to-end": 57.3, "memory-bank": 58.0, "queue": 60.6}
    assert "99.9" in paper_cells("shuffle-bn", dictionaries=())[1].text


def test_a_figure_that_is_not_in_the_papers_text_is_never_shown_without_the_word_memory() -> None:
    cells = [cell for over in OVERS for cell in paper_cells(over, dictionaries=DICTIONARIES)]  # type: ignore[arg-type]
    in_text = {(c.dictionary, c.value) for c in cells if c.over == "K" and "memory" not in c.text.split()}
    assert in_text == {("memory-bank", "65536"), ("queue", "4096"), ("queue", "65536")}
    assert paper_cell("K", "256", dictionary="queue").text == "54.7 memory"  # type: ignore[union-attr]
    assert paper_cell("dictionary", "end-to-end", dictionary="end-to-end").text == "57.3 memory at K 1,024"  # type: ignore[union-attr]
    assert paper_cell("K", "257", dictionary="queue") is None


def test_a_sweep_of_k_is_figure_3() -> None:
    cells = _plan("in1m-v1", "K", dictionaries=DICTIONARIES).cells
    assert [(c.dictionary, c.value) for c in cells] == [
        (c.dictionary, c.value) for c in paper_cells("K", dictionaries=DICTIONARIES)
    ]
    by_queue = [cell for cell in cells if cell.dictionary == "queue"]
    assert [cell.config.num_negatives for cell in by_queue] == [256, 512, 1024, 4096, 16384, 65536]
    assert len({cell.name for cell in cells}) == len(cells)


def test_k_of_end_to_end_is_the_batch_with_lr_and_bn_groups_in_proportion_and_as_many_images() -> None:
    config = _cell("in1m-v1", "K", "1024", dictionaries=("end-to-end",)).config
    recipe = RECIPES["in1m-v1-end-to-end"].build()
    assert (config.optim, config.bn) == (recipe.optim, recipe.bn)
    config = _cell("demo", "K", "256", dictionaries=("end-to-end",)).config
    assert config.schedule.iterations == 1500 * 64 // 256
    assert config.optim.lr == pytest.approx(0.08)


def test_a_sweep_of_m_has_the_papers_k_unless_another_was_given_or_the_images_are_fewer() -> None:
    plan = _plan("in1m-v1", "m")
    assert [c.config.model.ema_momentum for c in plan.cells] == [0, 0.9, 0.99, 0.999, 0.9999]
    assert {c.config.dictionary.num_keys for c in plan.cells} == {4096}
    assert _cell("in1m-v1", "m", "0.5", keep_num_keys=True).config.dictionary.num_keys == 65536
    few = _plan("demo", "m", num_images=500)
    assert {c.config.dictionary.num_keys for c in few.cells} == {500}
    assert "the shards hold 500 images" in few.notes[0]


def test_values_of_k_beyond_the_data_set_are_left_out_and_named() -> None:
    plan = _plan("demo", "K", num_images=5000)
    assert [cell.value for cell in plan.cells] == ["256", "512", "1024", "4096"]
    assert "16,384, 65,536 are left out" in plan.notes[0]
    assert _cell("demo", "K", "9000", num_images=5000).config.dictionary.num_keys == 9000


def test_every_cell_is_run_with_every_seed_and_judged() -> None:
    cells = _plan("in1m-v1", "shuffle-bn", seeds=(3, 4)).cells
    assert [(c.value, c.seed) for c in cells] == [("on", 3), ("on", 4), ("off", 3), ("off", 4)]
    assert [c.config.bn.shuffle for c in cells] == [True, True, False, False]
    bare = dataclasses.replace(RECIPES["demo"].build().watch, knn_epochs=0)
    config = dataclasses.replace(RECIPES["demo"].build(), watch=bare)
    plan = plan_sweep(config, over="m", num_images=640)
    assert {c.config.watch.knn_epochs for c in plan.cells} == {150 // 8}


@pytest.mark.parametrize(
    ("recipe", "over"), [("in1m-v1", "K"), ("cifar10", "m"), ("demo", "dictionary"), ("demo", "shuffle-bn")]
)
def test_the_words_of_a_cell_make_its_config(recipe: str, over: str) -> None:
    options = {"dictionaries": DICTIONARIES} if over == "K" else {}
    for cell in _plan(recipe, over, num_images=600, seeds=(5,), **options).cells[-2:]:
        words = cell_flags(cell.config, recipe=RECIPES[recipe].build())
        assert parse_train([recipe, *words])[1] == cell.config


def test_the_words_of_a_cell_hold_lists_switches_and_what_is_none() -> None:
    recipe = RECIPES["in1m-v1"].build()
    schedule = dataclasses.replace(recipe.schedule, epochs=None, iterations=7, milestones=(3, 5))
    watch = dataclasses.replace(recipe.watch, trackers=("tensorboard",))
    config = dataclasses.replace(recipe, num_lanes=8, schedule=schedule, watch=watch)
    assert parse_train(["in1m-v1", *cell_flags(config, recipe=recipe)])[1] == config


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"over": "K", "values": ("many",)}, "many is no K"),
        ({"over": "m", "values": ("x",)}, "x is no m"),
        ({"over": "m", "values": ("1",)}, "must be in [0, 1)"),
        ({"over": "dictionary", "values": ("bank",)}, "bank is no dictionary"),
        ({"over": "shuffle-bn", "values": ("true",)}, "there are on, off"),
        ({"over": "m", "dictionaries": ("queue",)}, "goes with --over K"),
        ({"over": "K", "dictionaries": ("heap",)}, "heap is none"),
        ({"over": "K", "num_images": 200}, "fewer than every K of the paper"),
        (
            {"over": "K", "values": ("2048",), "dictionaries": ("end-to-end",), "num_images": 200},
            "do not fill",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told.replace("[", r"\[").replace(")", r"\)")):
        _plan("in1m-v1", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("over", "recipe"), [("m", "in1m-v1-memory-bank"), ("shuffle-bn", "in1m-v1-memory-bank")]
)
def test_an_ablation_of_what_the_dictionary_lacks_is_refused(over: str, recipe: str) -> None:
    with pytest.raises(UserError, match="give --dictionary queue"):
        _plan(recipe, over)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["demoo", "--over", "K"], "did you mean"),
        (["demo"], "what is missing: --over and --shards and --out"),
        (["demo", "--over", "L"], "--over L is not one of"),
        (["--over", "K"], "the recipe comes first"),
        (
            ["demo", "--over", "K", "--num-keys", "9", "--shards", "S", "--out", "O"],
            "choose them by --values",
        ),
        (
            ["demo", "--over", "shuffle-bn", "--no-shuffle", "--shards", "S", "--out", "O"],
            "its own --no-shuffle",
        ),
        (
            ["demo", "--over", "shuffle-bn", "--shuffle-bn", "off", "--shards", "S", "--out", "O"],
            "its own --shuffle-bn",
        ),
        (["demo", "--over", "m", "--seeds", "1,x", "--shards", "S", "--out", "O"], "a whole number"),
        (["demo", "--over", "m", "--seed", "1", "--seeds", "2", "--shards", "S", "--out", "O"], "contradict"),
        (
            ["demo", "--over", "m", "--shards", "S", "--out", "F", "--global-batch", "8", "--lr", "1"],
            "bn_group=32",
        ),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], told: str, shards: Catalog, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"S": str(shards.root), "O": str(tmp_path / "out"), "F": str(tmp_path / "f")}
    assert main(["sweep", *(known.get(word, word) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert told in err
    assert not any(tmp_path.iterdir())
