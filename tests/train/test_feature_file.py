"""The feature file holds every sample's features in order, whole or not at all, and a killed run goes on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.train.small import SMALL
from torch import Tensor

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.checkpoint import Checkpoint, save_checkpoint
from linerate.train.evaluate import features_cli
from linerate.train.evaluate.feature_file import (
    FeatureSource,
    load_features,
    require_writable,
    write_features,
)
from linerate.train.evaluate.features import LabelledSet, extract_features
from linerate.train.learner import build_moco


def source(catalog: Catalog, **changes: object) -> FeatureSource:
    about = FeatureSource(
        checkpoint="step-000000001.pt",
        weights_xxh3="00",
        plan_id=catalog.plan_id,
        num_samples=catalog.num_samples,
        features="backbone",
        size=16,
        dtype="float32",
    )
    return dataclasses.replace(about, **changes)  # type: ignore[arg-type]


def mean_colour(images: Tensor) -> Tensor:
    return images.float().mean(dim=(2, 3))


def expected(catalog: Catalog) -> np.ndarray:
    everything = LabelledSet(catalog, np.arange(catalog.num_samples))
    return extract_features(mean_colour, everything, size=16)[0].numpy()


@pytest.mark.parametrize("part_rows", [7, 24, 1000])
def test_both_kinds_of_file_hold_all_rows_in_order(shards: Catalog, tmp_path: Path, part_rows: int):
    for name in ("f.npy", "f.parquet"):
        dim = write_features(
            mean_colour,
            shards,
            source(shards),
            out=tmp_path / "new" / name,
            part_rows=part_rows,
            num_threads=1,
        )
        assert dim == 3
    wanted = expected(shards)
    assert np.array_equal(np.load(tmp_path / "new" / "f.npy"), wanted)
    stored, about = load_features(tmp_path / "new" / "f.parquet")
    assert np.array_equal(stored, wanted)
    assert about["plan_id"] == shards.plan_id
    table = pq.read_table(tmp_path / "new" / "f.parquet")
    indexes = [shards.shard_index(shard) for shard in range(shards.num_shards)]
    assert table.column("sample_id").to_pylist() == np.concatenate([i.sample_id for i in indexes]).tolist()
    assert table.column("label").to_pylist() == np.concatenate([i.label for i in indexes]).tolist()
    assert table.column("key").to_pylist() == [k for s in range(shards.num_shards) for k in shards.keys(s)]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["f.npy", "f.parquet"]


def test_half_precision_is_stored_as_such(shards: Catalog, tmp_path: Path):
    write_features(mean_colour, shards, source(shards, dtype="float16"), out=tmp_path / "f.parquet")
    stored, _ = load_features(tmp_path / "f.parquet")
    assert stored.dtype == np.float16
    assert np.allclose(stored, expected(shards), rtol=1e-3)


def test_a_killed_run_goes_on_from_its_parts(shards: Catalog, tmp_path: Path):
    out = tmp_path / "f.npy"
    seen = []

    def stops(images: Tensor) -> Tensor:
        seen.append(len(images))
        if sum(seen) > 40:
            raise KeyboardInterrupt
        return mean_colour(images)

    with pytest.raises(KeyboardInterrupt):
        write_features(stops, shards, source(shards), out=out, part_rows=16)
    assert not out.exists()
    done: list[int] = []

    def counts(images: Tensor) -> Tensor:
        done.append(len(images))
        return mean_colour(images)

    told: list[float] = []
    write_features(counts, shards, source(shards), out=out, part_rows=16, advance=told.append)
    assert sum(done) == shards.num_samples - 32
    assert sum(told) == shards.num_samples
    assert np.array_equal(np.load(out), expected(shards))
    assert list(tmp_path.iterdir()) == [out]


def test_parts_of_other_weights_are_refused(shards: Catalog, tmp_path: Path):
    def stops(images: Tensor) -> Tensor:
        raise KeyboardInterrupt

    out = tmp_path / "f.npy"
    with pytest.raises(KeyboardInterrupt):
        write_features(stops, shards, source(shards), out=out)
    with pytest.raises(UserError, match=r"weights_xxh3 00 \(now 11\)"):
        write_features(mean_colour, shards, source(shards, weights_xxh3="11"), out=out)


def test_a_file_that_is_there_or_has_an_unknown_ending_is_refused(tmp_path: Path):
    (tmp_path / "f.npy").touch()
    with pytest.raises(UserError, match="is there already"):
        require_writable(tmp_path / "f.npy")
    with pytest.raises(UserError, match=r"neither \.parquet nor \.npy"):
        require_writable(tmp_path / "f.csv")


def test_a_disk_that_is_full_is_one_line_and_leaves_the_parts(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("linerate.train.evaluate.feature_file._join_npy", full)
    with pytest.raises(UserError, match=r"No space left on device.*goes on from the parts"):
        write_features(mean_colour, shards, source(shards), out=tmp_path / "f.npy")
    monkeypatch.undo()
    seen: list[int] = []
    write_features(lambda x: seen.append(1) or mean_colour(x), shards, source(shards), out=tmp_path / "f.npy")
    assert seen == []


def test_what_a_kill_leaves_during_the_join_is_gone_after_the_next_run(
    shards: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(path: Path, *_: object) -> None:
        path.write_bytes(b"half a file")
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
        raise KeyboardInterrupt

    monkeypatch.setattr("linerate.train.evaluate.feature_file._join_npy", killed)
    with pytest.raises(KeyboardInterrupt):
        write_features(mean_colour, shards, source(shards), out=tmp_path / "f.npy")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [".f.npy.parts"]
    write_features(mean_colour, shards, source(shards), out=tmp_path / "f.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["f.npy"]
    assert np.array_equal(np.load(tmp_path / "f.npy"), expected(shards))


def test_where_nothing_can_be_written_is_told_before_any_image_is_read(shards: Catalog):
    with pytest.raises(UserError, match=r"--out /proc/f\.npy cannot be written .*name another"):
        write_features(mean_colour, shards, source(shards), out=Path("/proc/f.npy"))


@pytest.mark.parametrize("flag", ["--threads", "--size", "--batch"])
def test_a_count_of_nothing_is_refused(shards: Catalog, tmp_path: Path, flag: str):
    words = [str(tmp_path), "--shards", str(shards.root), "--out", str(tmp_path / "f.npy"), flag, "0"]
    with pytest.raises(UserError, match=f"{flag} 0 must be at least 1"):
        features_cli.main(words)


def test_what_is_no_feature_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is not there"):
        load_features(tmp_path / "none.parquet")
    (tmp_path / "odd.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is no feature file"):
        load_features(tmp_path / "odd.parquet")


def test_the_command_writes_the_queries_of_a_run(
    shards: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_run(tmp_path / "run")
    words = [str(tmp_path / "run"), "--shards", str(shards.root), "--out", str(tmp_path / "f.parquet")]
    assert features_cli.main([*words, "--features", "projection", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["dim"], printed["features"]) == (SMALL.model.dim, "projection")
    stored, _ = load_features(tmp_path / "f.parquet")
    moco = build_moco(SMALL)
    everything = LabelledSet(shards, np.arange(shards.num_samples))
    wanted, _ = extract_features(moco.query_encoder.eval(), everything, size=16)
    assert np.allclose(stored, wanted.numpy(), atol=1e-5)


def save_run(run: Path) -> None:
    checkpoint = Checkpoint(
        step=1,
        epoch=0,
        images=16,
        config=SMALL,
        trained_on=None,
        moco=build_moco(SMALL).state_dict(),
        optimizer={},
        rng={"cpu": torch.get_rng_state()},
    )
    save_checkpoint(run / "checkpoints", checkpoint, keep=1)
