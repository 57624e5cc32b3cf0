"""Memory for views that goes from batch to batch, and bytes that DALI reads in place."""

import json
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.pipeline.encoded_samples import cut, image_fetch

from linerate.pipeline.dali_views import DaliViews, _Pipeline
from linerate.pipeline.encoded import EncodedBatch
from linerate.pipeline.recipe import find_recipe
from linerate.pipeline.undecodable import UndecodableImages
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


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}


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


def test_an_epoch_left_early_leaves_its_pipeline_for_the_next_but_one_that_failed_does_not(
    jpegs: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[_Pipeline] = []
    init = _Pipeline.__init__

    def spy(pipeline: _Pipeline, **options: Any) -> None:
        built.append(pipeline)
        init(pipeline, **options)

    monkeypatch.setattr(_Pipeline, "__init__", spy)
    views, fetch = backend(), image_fetch(jpegs, 2)
    whole = [batch.query.clone() for batch in views.run(fetch, range(12), epoch=0)]
    for _ in range(3):
        run = views.run(fetch, range(12), epoch=1)
        next(run)
        run.close()
    assert all(map(torch.equal, (one.query for one in views.run(fetch, range(12), epoch=0)), whole))
    assert len(built) == 1
    with pytest.raises(UndecodableImages, match="DALI's decoder refuses it"):
        list(views.run(image_fetch(cut(jpegs, 4), 2), range(12), epoch=0))
    assert all(map(torch.equal, (one.query for one in views.run(fetch, range(12), epoch=0)), whole))
    assert len(built) == 2


def test_the_pools_room_is_addresses_and_no_memory() -> None:
    script = """
import json
from linerate.bench.suites.views_memory import status_bytes
from linerate.pipeline import cpu_kernels
from linerate.pipeline.dali_kernels import make_room
from linerate.pipeline.dali_damage import undecodable_rows
undecodable_rows([])
before = status_bytes("VmSize"), status_bytes("VmRSS")
make_room()
after = status_bytes("VmSize"), status_bytes("VmRSS")
print(json.dumps([now - then for now, then in zip(after, before)] + [cpu_kernels.ROOM_BYTES]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment())
    addresses, memory, room = json.loads(done.stdout)
    assert addresses >= room
    assert memory < room // 16


def test_an_epoch_that_is_open_when_the_process_ends_says_nothing(tmp_path: Path, jpegs: list[bytes]) -> None:
    (tmp_path / "one.jpg").write_bytes(jpegs[0])
    script = """
import sys
from pathlib import Path
from tests.pipeline.encoded_samples import cut, image_fetch
from linerate.pipeline.dali_views import DaliViews
from linerate.pipeline.recipe import find_recipe
fetch = image_fetch([Path(sys.argv[1]).read_bytes()] * 12, 2)
views = DaliViews(recipe=find_recipe("v2", size=8), seed=0, batch=2, device="cpu", num_threads=1, prefetch=2)
run = views.run(fetch, range(6), epoch=0)
next(run)
sys.exit(3)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "one.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (3, "")
