"""The ledger is complete, says how sure each number is, and claims nothing that was not run."""

import json
import re
from pathlib import Path

import pytest

from linerate.__main__ import COMMANDS
from linerate.shards.errors import UserError
from linerate.train.anchors import ANCHORS
from linerate.train.anchors_cli import main
from linerate.train.recipes import RECIPES

ROOT = Path(__file__).parents[2]


def test_no_row_stands_twice():
    rows = [(a.part, a.what, a.metric) for a in ANCHORS]
    assert len(set(rows)) == len(rows)


def test_a_claim_rests_on_a_committed_file_and_nothing_else_does():
    for anchor in ANCHORS:
        ran = anchor.status in ("reproduced at scale", "at toy scale")
        assert ran == (anchor.result is not None), anchor
        if anchor.result is not None:
            lines = (ROOT / anchor.result).read_text().splitlines()
            assert any(anchor.what in line for line in lines), anchor


def test_every_command_of_the_ledger_exists():
    for anchor in ANCHORS:
        for part in (anchor.command or "").split(";"):
            words = re.sub(r"\(.*\)", "", part).split()
            if not words:
                continue
            assert words[0] == "linerate"
            assert words[1] in COMMANDS, anchor
            if words[1] in ("train", "sweep"):
                assert words[2] in RECIPES, anchor


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "demo"])
def test_what_a_recipe_expects_stands_in_the_ledger(name: str):
    expected = (RECIPES[name].build.__doc__ or "").split("Expected:")[1]
    numbers = [float(n) for n in re.findall(r"\d+\.\d+", expected)]
    values = {anchor.value for anchor in ANCHORS} | {a.spread for a in ANCHORS}
    assert numbers
    assert values >= set(numbers)


def test_what_no_command_here_does_is_marked_as_not_supported():
    names = ("COCO DensePose, ", "LVIS v0.5, ", "Cityscapes instances, ", "Cityscapes semantic, ")
    marked = {a.what for a in ANCHORS if a.status == "not supported"}
    assert marked == {a.what for a in ANCHORS if a.what.startswith(names)}
    assert len(marked) == 12


def test_the_numbers_of_the_paper_stand_as_published():
    def find(what: str, metric: str) -> float:
        (found,) = (a.value for a in ANCHORS if (a.what, a.metric) == (what, metric))
        return found

    assert find("MoCo v1, ResNet-50, 24 M", "linear top-1") == 60.6
    assert find("MoCo, m 0.999, K 4,096", "linear top-1") == 59.0
    assert find("memory bank, NCE, K 4,096", "linear top-1") == 54.3
    assert find("VOC07+12, R50-C4, MoCo IG-1B", "AP75") == 63.7
    assert find("COCO 2x, R50-C4, MoCo IN-1M", "mask AP") == 35.4
    assert find("CIFAR-10, asymmetric loss, 200 epochs", "kNN top-1") == 82.6


def test_a_number_that_was_not_read_in_its_source_is_never_shown_without_that_word(
    capsys: pytest.CaptureFixture[str],
):
    assert main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["anchors"]
    assert len(rows) == len(ANCHORS)
    assert {row["mark"] for row in rows} == {"read", "transcribed", "memory"}
    assert main(["--find", "end-to-end, K 256"]) == 0
    assert "54.9 (memory)" in capsys.readouterr().out
    assert main(["--find", "COCO 2x, R50-C4, MoCo IN-1M"]) == 0
    assert "40.7 (transcribed)" in capsys.readouterr().out


def test_a_text_that_no_row_holds_is_refused():
    with pytest.raises(UserError, match="none of"):
        main(["--find", "no such text"])
