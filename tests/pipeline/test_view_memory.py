"""Memory for views that goes from batch to batch, and bytes that DALI reads in place."""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.pipeline.encoded_samples import image_fetch

from linerate.pipeline.dali_views import DaliViews
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.recipe import find_recipe
from linerate.pipeline.view_memory import ViewMemory, as_tensor, places

SIZE = 24


def test_memory_is_lent_again_when_no_tensor_of_it_is_left() -> None:
    memory = ViewMemory(batch=2, size=4, num_kept=8)
    first, second = memory.lend(2), memory.lend(2)
    address = first.ctypes.data
    assert second.ctypes.data != address
    row = as_tensor(first)[1]
    del first
    third = memory.lend(1)
    assert third.ctypes.data not in (address, second.ctypes.data)
    del row
    assert memory.lend(1).ctypes.data == address


def test_no_more_is_kept_than_was_said_and_nothing_after_clear() -> None:
    memory = ViewMemory(batch=1, size=4, num_kept=1)
    lent = [memory.lend(1) for _ in range(3)]
    blocks = [weakref.ref(one.base) for one in lent if one.base is not None]
    assert len(blocks) == 3
    del lent
    assert sum(block() is not None for block in blocks) == 1
    memory.clear()
    assert [block() for block in blocks] == [None] * 3


def test_a_tensor_is_the_memory_itself_channels_last() -> None:
    lent = ViewMemory(batch=3, size=4, num_kept=1).lend(2)
    tensor = as_tensor(lent)
    lent[1, 2, 3, 0] = 77
    assert (tensor.shape, int(tensor[1, 0, 2, 3])) == ((2, 3, 4, 4), 77)
    assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_places_are_the_addresses_of_the_views() -> None:
    views = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert places(views).tolist() == [[view.ctypes.data, 4] for view in views]


@dataclass(frozen=True)
class _Passing:
    """JPEGs whose memory is wiped as soon as nobody has them."""

    jpegs: list[bytes]
    batch: int

    def __call__(self, step: int) -> EncodedBatch:
        whole = image_fetch(self.jpegs, self.batch)(step)
        passing = []
        for jpeg in whole.jpegs:
            block = np.array(jpeg)
            seen = block[:]
            weakref.finalize(seen, block.fill, 0)
            passing.append(seen)
        return replace(whole, jpegs=passing)


@pytest.fixture(scope="module")
def jpegs(make_sample: Any) -> list[bytes]:
    return [make_sample(i, height=200 + 3 * i, width=290 - 2 * i).jpeg for i in range(24)]


def backend() -> DaliViews:
    recipe = find_recipe("v2", size=SIZE)
    return DaliViews(recipe=recipe, seed=5, batch=2, device="cpu", num_threads=2, prefetch=3)


def test_jpegs_live_until_their_batch_has_come_out(jpegs: list[bytes]) -> None:
    kept = [batch.query.clone() for batch in backend().run(image_fetch(jpegs, 2), range(12), epoch=0)]
    passing = [batch.query.clone() for batch in backend().run(_Passing(jpegs, 2), range(12), epoch=0)]
    assert len(kept) == 12
    assert all(map(torch.equal, passing, kept))


def test_what_is_in_the_making_is_over_before_its_memory_is_let_go(
    make_sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = [make_sample(i, height=1200, width=1600).jpeg for i in range(2)] * 6
    let_go: list[npt.NDArray[np.uint8]] = []

    def keep(_: ViewMemory, block: npt.NDArray[np.uint8]) -> None:
        block.fill(123)
        let_go.append(block)

    monkeypatch.setattr(ViewMemory, "_take_back", keep)
    views = backend()
    run = views.run(image_fetch(large, 2), range(6), epoch=0)
    next(run)
    run.close()
    assert len(let_go) == 2 * 3  # the batch that came out, and two behind it
    list(views.run(image_fetch(large, 2), range(2), epoch=0))
    assert all((block == 123).all() for block in let_go[:6])
