"""A run that is done in a second or two, for the tests of the loop."""

import dataclasses
from typing import Any

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

SMALL = TrainConfig(
    recipe="small",
    views=Views(augmentation="v2", size=16, blur=False, backend="torch"),
    model=Model(encoder="tiny-resnet-w4", stem="cifar", dim=8, ema_momentum=0.9),
    dictionary=Dictionary(num_keys=40),
    loss=Loss(temperature=0.2),
    bn=ShuffleBN(bn_group=4),
    optim=Optim(global_batch=16, lr=0.05),
    schedule=Schedule(decay="cosine", epochs=3, cosine_per="step"),
    speed=Speed(loader_threads=1, prefetch=1),
    watch=Watch(log_steps=1, checkpoint_steps=5, keep_checkpoints=2),
)


def small(**watch: Any) -> TrainConfig:
    """SMALL with other `watch` fields."""
    return dataclasses.replace(SMALL, watch=dataclasses.replace(SMALL.watch, **watch))
