import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from linerate.shards.errors import UserError
from linerate.train.config import (
    Dictionary,
    Loss,
    Model,
    Optim,
    Schedule,
    ShuffleBN,
    Speed,
    TrainConfig,
    Views,
    Watch,
)
from linerate.train.config_json import (
    first_difference,
    from_plain,
    load_config,
    results_part,
    to_plain,
    write_config,
)
from linerate.train.recipes import RECIPES

SMALL = TrainConfig(recipe="small", bn=ShuffleBN(bn_group=4), optim=Optim(global_batch=16))


def with_bank(**fields: Any) -> TrainConfig:
    return TrainConfig(recipe="x", dictionary=Dictionary(dictionary="memory-bank"), **fields)


def with_micro_batch(size: int, **dictionary: Any) -> TrainConfig:
    return TrainConfig(recipe="x", speed=Speed(micro_batch=size), dictionary=Dictionary(**dictionary))


@pytest.mark.parametrize("name", RECIPES)
def test_a_config_survives_json(name: str, tmp_path: Path) -> None:
    config = RECIPES[name].build()
    write_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_every_field_name_is_one_flag() -> None:
    plain = to_plain(SMALL)
    names = [name for value in plain.values() if isinstance(value, dict) for name in value]
    names += [name for name, value in plain.items() if not isinstance(value, dict)]
    assert len(names) == len(set(names))


def test_speed_and_watch_are_not_results() -> None:
    other = dataclasses.replace(SMALL, speed=Speed(precision="bf16"), watch=Watch(log_steps=1))
    assert first_difference(results_part(SMALL), results_part(other)) is None


def test_the_first_difference_names_the_field_and_both_values() -> None:
    other = dataclasses.replace(SMALL, optim=Optim(global_batch=16, lr=0.5))
    assert first_difference(results_part(SMALL), results_part(other)) == "optim.lr=0.03 (there 0.5)"


def test_views_carry_their_exceptions_into_the_pipelines_recipe() -> None:
    recipe = Views(augmentation="v2", size=32, crop_min=0.08, blur=False).recipe()
    assert recipe.size == 32
    for view in (recipe.query, recipe.key):
        assert view.crop_scale == (0.08, 1.0)
        assert view.blur_probability == 0
        assert view.jitter_probability == 0.8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Views(size=4), "size=4 is too small"),
        (lambda: Views(crop_min=0.0), "crop_min=0.0"),
        (lambda: Model(dim=0), "dim=0 is too small"),
        (lambda: Model(ema_momentum=1.0), "the paper's is 0.999"),
        (lambda: Dictionary(num_keys=0), "num_keys=0 is too small"),
        (lambda: Dictionary(bank_momentum=1.0), "InstDisc's is 0.5"),
        (lambda: Dictionary(bank_loss="nce"), "give --dictionary memory-bank, or --bank-loss infonce"),
        (lambda: with_bank(loss=Loss(symmetric=True)), "symmetric=True needs keys of both views"),
        (lambda: Speed(micro_batch=0), "micro_batch=0 is too small"),
        (lambda: with_micro_batch(40), r"no multiple of bn_group=32.*the nearest that are: 32, 64"),
        (lambda: with_micro_batch(8), r"the nearest that are: 32$"),
        (lambda: with_micro_batch(96).rank_batch(1), "the nearest that do: 64, 128"),
        (lambda: with_micro_batch(64, dictionary="end-to-end"), "the gradient goes through all keys"),
        (lambda: with_micro_batch(64, dictionary="memory-bank", bank_loss="nce"), "Z is estimated from all"),
        (lambda: Loss(temperature=0.0), "temperature=0.0 must be above 0"),
        (lambda: ShuffleBN(bn_group=0), "bn_group=0 is too small"),
        (lambda: Optim(global_batch=1), "global_batch=1 is too small"),
        (lambda: Optim(lr=0.0), "lr=0.0 must be above 0"),
        (lambda: Optim(sgd_momentum=1.0), "sgd_momentum=1.0"),
        (lambda: Optim(weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda: Schedule(epochs=5, iterations=7), "exactly one length"),
        (lambda: Schedule(epochs=None), "exactly one length"),
        (lambda: Schedule(epochs=0), "epochs=0 is too small"),
        (lambda: Schedule(factor=0.0), "factor=0.0"),
        (lambda: Schedule(milestones=(160, 120)), "must rise"),
        (lambda: Speed(prefetch=0), "prefetch=0 is too small"),
        (lambda: Speed(hw_decoder_load=1.2), "hw_decoder_load=1.2 is no share of a batch"),
        (lambda: Watch(log_steps=0), "log_steps=0 is too small"),
        (lambda: Watch(knn_test_share=1.0), "knn_test_share=1.0"),
        (lambda: Watch(knn_temperature=0.0), "knn_temperature=0.0"),
        (lambda: Watch(bad_share=1.0), "bad_share=1.0 is no share of the samples"),
        (lambda: Watch(alarm_top1=1.5), "alarm_top1=1.5 is no share"),
        (lambda: Watch(alarm_steps=0), "alarm_steps=0 is too small"),
        (lambda: Watch(milestone_epochs=-1), "milestone_epochs=-1 is too small"),
        (lambda: Watch(stall_seconds=-1.0), "stall_seconds=-1.0 must not be negative"),
        (lambda: TrainConfig(recipe="x", bn=ShuffleBN(bn_group=24)), "the nearest that do: 16, 32"),
        (lambda: TrainConfig(recipe="x", bn=ShuffleBN(shuffle_block=100)), "the nearest that do: 64, 128"),
        (lambda: TrainConfig(recipe="x", bn=ShuffleBN(shuffle_block=32)), "a bn_group of at most 16"),
        (lambda: TrainConfig(recipe="x", num_lanes=3), "the nearest that do: 2, 4"),
        (lambda: with_bn(sync_bn=True), "give --bn-group 256 --no-shuffle with it"),
        (lambda: with_bn(sync_bn=True, bn_group=256), "shuffle=True have them in groups"),
    ],
)
def test_what_cannot_work_is_refused_with_a_way_out(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        build()


def test_bn_over_all_ranks_fits_on_more_than_one() -> None:
    config = with_bn(sync_bn=True, bn_group=256, shuffle=False)
    assert config.rank_batch(4) == 64
    with pytest.raises(UserError, match="the nearest that do: 1"):
        with_bn(bn_group=256, shuffle=False).rank_batch(4)


def with_bn(**bn: Any) -> TrainConfig:
    return TrainConfig(recipe="x", bn=ShuffleBN(**bn))


def test_chance_is_what_each_dictionary_has() -> None:
    queue = dataclasses.replace(SMALL, dictionary=Dictionary(num_keys=40))
    assert queue.chance_loss == pytest.approx(math.log(41))
    batch = dataclasses.replace(SMALL, dictionary=Dictionary(dictionary="end-to-end"))
    assert (batch.num_negatives, batch.chance_loss) == (15, pytest.approx(math.log(16)))
    assert with_bank().chance_loss == pytest.approx(math.log(65537))


def test_fields_that_do_nothing_are_named() -> None:
    assert SMALL.idle_fields() == []
    changed = dataclasses.replace(SMALL, dictionary=Dictionary(bank_momentum=0.4))
    assert changed.idle_fields() == ["bank_momentum: there is no memory bank"]
    batch = dataclasses.replace(SMALL, dictionary=Dictionary(dictionary="end-to-end"))
    assert [line.partition(":")[0] for line in batch.idle_fields()] == [
        "num_keys",
        "ema_momentum, queue_dtype",
    ]
    assert "shuffle, shuffle_block: no key is encoded" in " ".join(with_bank().idle_fields())


def test_micro_batches_must_divide_what_a_rank_has() -> None:
    assert with_micro_batch(64).rank_batch(2) == 128
    with pytest.raises(UserError, match="micro_batch=64 does not divide the batch of a rank=32"):
        with_micro_batch(64).rank_batch(8)


def test_a_world_size_that_does_not_fit_names_the_nearest() -> None:
    assert [SMALL.rank_batch(world_size) for world_size in (1, 2, 4)] == [16, 8, 4]
    with pytest.raises(UserError, match="does not fit on 3 ranks; the nearest that do: 2, 4"):
        SMALL.rank_batch(3)
    with pytest.raises(UserError, match=r"bn_group=4 on a rank.*the nearest that do: 4$"):
        SMALL.rank_batch(8)
    with pytest.raises(UserError, match="num_lanes=2"):
        dataclasses.replace(SMALL, num_lanes=2).rank_batch(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing"),
        ("{", "holds no config"),
        ('{"recipe": "x"}', "holds no config"),
        ('{"config_version": 99, "recipe": "x"}', "update linerate"),
        ('{"config_version": 1, "recipe": "x", "sed": 1}', "did you mean `seed`"),
        ('{"config_version": 1, "recipe": "x", "optim": 3}', "not a table of fields"),
        ('{"config_version": 1, "recipe": "x", "model": {"head": "mpl"}}', "not one of linear, mlp"),
    ],
)
def test_a_config_that_is_none_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_plain_data_is_json() -> None:
    assert from_plain(json.loads(json.dumps(to_plain(SMALL)))) == SMALL
