"""Neighbours are the nearest others, and the page shows each beside its query."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train.test_feature_file import mean_colour, save_run, source

from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.train.evaluate.feature_file import write_features
from linerate.train.evaluate.neighbours import Neighbours, find_neighbours, pick_queries, same_class_share
from linerate.train.evaluate.neighbours_cli import main


def test_neighbours_are_those_of_the_whole_table_of_cosines():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    queries = np.array([3, 17, 39])
    found = find_neighbours(features, np.arange(100, 140), queries, k=6)
    unit = torch.nn.functional.normalize(features, dim=1)
    table = (unit @ unit.T).fill_diagonal_(-2)
    cosine, row = table[queries].topk(6, dim=1)
    assert found.query.tolist() == [103, 117, 139]
    assert (found.neighbour == 100 + row.numpy()).all()
    assert np.allclose(found.cosine, cosine.numpy(), atol=1e-6)


def test_an_image_is_never_its_own_neighbour_even_among_its_equals():
    found = find_neighbours(torch.ones(5, 2), np.arange(5), np.arange(5), k=3)
    for query, neighbours in zip(found.query, found.neighbour, strict=True):
        assert query not in neighbours
        assert len(set(neighbours)) == 3


@pytest.mark.parametrize("k", [0, 5])
def test_more_neighbours_than_others_are_refused(k: int):
    with pytest.raises(UserError, match="between 1 and 4"):
        find_neighbours(torch.ones(5, 2), np.arange(5), np.arange(1), k=k)


def test_queries_take_one_of_every_class_in_turn():
    label = [0] * 50 + [1] * 3 + [2] * 2
    picked = np.asarray(label)[pick_queries(label, 6, seed=1)]
    assert np.bincount(picked).tolist() == [2, 2, 2]
    assert len(pick_queries(label, 100, seed=1)) == 55


def test_the_share_counts_neighbours_of_the_querys_class(shards: Catalog, unlabelled_shards: Catalog):
    label = np.concatenate([shards.shard_index(s).label for s in range(shards.num_shards)])
    same, other = np.flatnonzero(label == label[0])[1:3], np.flatnonzero(label != label[0])[:2]
    found = Neighbours(
        query=np.array([0]),
        neighbour=np.concatenate([same, other])[None],
        cosine=np.zeros((1, 4), dtype=np.float32),
    )
    assert same_class_share(found, shards) == 0.5
    assert same_class_share(found, unlabelled_shards) is None


def test_the_page_shows_queries_and_neighbours(
    shards: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_run(tmp_path / "run")
    write_features(mean_colour, shards, source(shards), out=tmp_path / "f.parquet")
    for of in ("run", "f.parquet"):
        out = tmp_path / f"{of}.html"
        words = [str(tmp_path / of), "--shards", str(shards.root), "--out", str(out)]
        assert main([*words, "--queries", "3", "--k", "4", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        page = out.read_text()
        assert page.count("<figure") == page.count("<img") == 3 * 5
        assert page.count("class='query'") == 3
        share = page.count("class='same'") / 12
        assert printed["same_class_share"] == pytest.approx(share)
        assert not re.search(r"(src|href)=.?http", page)


def test_wrong_words_are_one_line(shards: Catalog, unlabelled_shards: Catalog, tmp_path: Path):
    write_features(mean_colour, shards, source(shards), out=tmp_path / "f.parquet")
    words = [str(tmp_path / "f.parquet"), "--shards", str(unlabelled_shards.root)]
    with pytest.raises(UserError, match="is of other shards"):
        main([*words, "--out", str(tmp_path / "p.html")])
    with pytest.raises(UserError, match=r"does not end in \.html"):
        main([*words, "--out", str(tmp_path / "p.png")])
    for flag in ("--queries", "--k", "--threads"):
        with pytest.raises(UserError, match=f"{flag} 0 must be at least 1"):
            main([*words, "--out", str(tmp_path / "p.html"), flag, "0"])
    with pytest.raises(UserError, match="--limit 1 leaves no image another to be near"):
        main([*words, "--out", str(tmp_path / "p.html"), "--limit", "1"])
    with pytest.raises(UserError, match=r"f\.npy holds rows alone.*give a \.parquet"):
        main([str(tmp_path / "f.npy"), *words[1:], "--out", str(tmp_path / "p.html")])
    with pytest.raises(UserError, match="its folder /dev/null/x cannot be made"):
        main([*words, "--out", "/dev/null/x/p.html"])
