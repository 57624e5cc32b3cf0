import dataclasses

import pytest
import torch
from tests.train.small import SMALL

from linerate.shards.errors import UserError
from linerate.train.config import Speed
from linerate.train.encoder import build_encoder
from linerate.train.memory import activation_bytes, estimate_memory
from linerate.train.recipes import RECIPES


def test_activations_counted_on_shapes_are_those_of_a_real_forward() -> None:
    encoder = build_encoder("tiny-resnet-w4", dim=8, stem="cifar")
    weights = {parameter.data_ptr() for parameter in encoder.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(torch.zeros(2, 3, 16, 16))
    real = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) // 2
    with torch.device("meta"):
        counted = activation_bytes(build_encoder("tiny-resnet-w4", dim=8, stem="cifar"), size=16)
    # Some kernels of a CPU keep a few vectors more than the shapes alone know of.
    assert abs(counted - real) / real < 0.02


def test_parts_are_what_the_formulas_say() -> None:
    config = RECIPES["in1m-v1"].build()
    memory = estimate_memory(config, rank_batch=32)
    assert memory["queue"] == 65536 * 128 * 4
    assert memory["parameters of both encoders"] == 2 * 23_770_304 * 4
    assert memory["views"] == 2 * 32 * 3 * 224 * 224
    # Two buffers, a sixteenth of the logits at most: nothing grows with N x K.
    assert memory["logits"] <= 32 * 65536 * 4 // 16
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")


def test_every_dictionary_has_its_own_bytes() -> None:
    names = ("in1m-v1", "in1m-v1-end-to-end", "in1m-v1-memory-bank")
    queue, batch, bank = (
        estimate_memory(RECIPES[name].build(), rank_batch=32, num_samples=1_281_167) for name in names
    )
    assert batch["parameters"] * 2 == bank["parameters"] * 2 == queue["parameters of both encoders"]
    assert (batch["keys"], batch["logits"]) == (1024 * 128 * 4, 32 * 1024 * 4)
    assert batch["activations"] == 2 * queue["activations"]
    # 8 ranks: an eighth of 656 MB, and the row of zeros.
    assert bank["memory bank"] == (-(-1_281_167 // 8) + 1) * 128 * 4
    assert bank["rows drawn"] == (256 + 65536) * 128 * 4
    with pytest.raises(UserError, match="name the data set with --shards"):
        estimate_memory(RECIPES["in1m-v1-memory-bank"].build(), rank_batch=32)


def test_micro_batches_and_a_bf16_queue_take_less() -> None:
    config = RECIPES["in1m-v1"].build()
    whole = estimate_memory(config, rank_batch=256)
    speed = dataclasses.replace(config.speed, micro_batch=64)
    narrow = dataclasses.replace(config.dictionary, queue_dtype="bf16")
    less = estimate_memory(dataclasses.replace(config, speed=speed, dictionary=narrow), rank_batch=256)
    assert less["activations"] * 4 == whole["activations"]
    assert less["queue"] * 2 == whole["queue"]


def test_bf16_halves_the_activations() -> None:
    wide, narrow = (
        estimate_memory(dataclasses.replace(SMALL, speed=Speed(precision=precision)), rank_batch=16)
        for precision in ("fp32", "bf16")
    )
    assert narrow["activations"] * 2 == wide["activations"]
    assert narrow["queue"] == wide["queue"]
