import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from linerate.pipeline.cpu_kernels import finish_view
from linerate.pipeline.draws import Draw, Draws, draw_views
from linerate.pipeline.ffcv_views import beton_path
from linerate.pipeline.loader import open_backend, open_views
from linerate.pipeline.parity import only
from linerate.pipeline.recipe import find_recipe, v2
from linerate.pipeline.torch_views import reference_view
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError

# Its imports and ours of it are full of what Python and numba call deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")
needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None, reason="ffcv is not installed, so its views stay untested"
)


def ffcv_views(catalog, **options):
    settings = {"recipe": v2(size=16), "seed": 1, "global_batch": 8, "num_lanes": 4, "num_threads": 1}
    return open_views(catalog, backend="ffcv", **settings | options)


def ids(batches):
    return [batch.sample_id.tolist() for batch in batches]


@pytest.fixture(scope="module")
def catalog_with_beton(tmp_path_factory, make_sample):
    from linerate.shards.beton import write_beton
    from linerate.shards.pack import pack

    folder = tmp_path_factory.mktemp("ffcv")
    for label in range(3):
        (folder / "in" / f"{label}").mkdir(parents=True)
        for i in range(6):
            (folder / "in" / f"{label}" / f"{i}.jpg").write_bytes(make_sample(10 * label + i).jpeg)
    catalog = pack(folder / "in", folder / "out", num_workers=0)
    write_beton(catalog, beton_path(catalog))
    return catalog


@needs_ffcv
def test_an_epoch_by_ffcv_holds_every_sample_once_with_its_label(catalog_with_beton):
    """In a process of its own: what numba frees there is reported as an error here."""
    worker = Path(__file__).with_name("ffcv_worker.py")
    command = [sys.executable, str(worker), str(catalog_with_beton.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all asserted\n"


@needs_ffcv
def test_without_a_beton_the_command_is_named(catalog):
    with pytest.raises(UserError, match=r"there is no .*test\.beton; write it by `linerate shard beton"):
        next(ffcv_views(catalog).epoch(0))


@needs_ffcv
def test_a_beton_of_other_shards_is_refused(catalog, catalog_with_beton, tmp_path):
    copy = Catalog.load(shutil.copytree(catalog.root, tmp_path / "copy"))
    shutil.copy(beton_path(catalog_with_beton), beton_path(copy))
    with pytest.raises(UserError, match="holds 18 samples, the shards 41; write it anew"):
        next(ffcv_views(copy).epoch(0))


def test_without_ffcv_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs ffcv: apt-get .*pip install 'linerate\[ffcv\]'"):
        open_backend("ffcv", recipe=v2(size=8), seed=0, batch=2, num_threads=1)


def test_what_finishes_a_crop_is_what_torchvision_does(make_sample):
    crop = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    side = np.full(20, 24)
    drawn = draw_views(
        find_recipe("v3", size=24), seed=1, epoch=0, sample_id=np.arange(20), height=side, width=side, view=1
    )
    whole = drawn.array.copy()
    whole[:, Draw.TOP : Draw.RIGHT + 1] = (0, 0, 24, 24)
    for row in (*Draws(whole).array, *only(Draws(whole), "blur").array):
        ours = np.empty_like(crop)
        finish_view(ours, crop, row)
        truth = reference_view(torch.from_numpy(crop).permute(2, 0, 1), row, size=24).numpy()
        assert np.abs(ours.astype(int) - truth).mean() < 0.5
