"""What each recipe plans, as files under tests/golden: a change of schedule or memory is seen in a diff."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from linerate.__main__ import main
from linerate.train.recipes import RECIPES

GOLDEN = Path(__file__).parents[1] / "golden"
WRITE = 'LINERATE_GOLDEN=write make test PYTEST="tests/train/test_golden.py"'
# The others are for whatever shards they are given.
NAMES = [name for name, recipe in RECIPES.items() if recipe.num_images is not None]


def planned(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The part of a dry run that is the same on every machine."""
    capsys.readouterr()
    assert main(["train", name, "--dry-run", "--json", "--precision", "bf16"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = found["plan"]
    del plan["shares"]
    # The last digits of a cosine are the machine's.
    plan["lr_boundaries"] = [[step, float(f"{lr:.12g}")] for step, lr in plan["lr_boundaries"]]
    plan["lr_last"] = float(f"{plan['lr_last']:.12g}")
    config = {part: fields for part, fields in found["config"].items() if part not in ("speed", "watch")}
    return {
        "plan": plan,
        "memory_bytes": found["memory_bytes"],
        "chance_loss": float(f"{found['chance_loss']:.12g}"),
        "idle_fields": found["idle_fields"],
        "config": config,
    }


def show(plan: dict[str, Any]) -> str:
    """JSON with each boundary on a line of its own."""
    text = json.dumps(plan, indent=1)
    return re.sub(r"\[\s+([\d.e-]+),\s+([\d.e-]+)\s+\]", r"[\1, \2]", text) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_plans_what_its_golden_file_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, found = GOLDEN / f"{name}.json", show(planned(name, capsys))
    if os.environ.get("LINERATE_GOLDEN") == "write":
        path.write_text(found, encoding="utf-8")
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    assert found == expected, f"if the change is meant, write the files anew: {WRITE}"


def test_every_golden_file_is_of_a_recipe() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == sorted(NAMES)


def test_the_golden_files_have_the_papers_schedules() -> None:
    """Of them all, what the paper gives in numbers: a file that was written anew must still have these."""
    plans = {name: json.loads((GOLDEN / f"{name}.json").read_text())["plan"] for name in NAMES}
    ig = plans["ig1b-v1"]
    assert (ig["total_steps"], len(ig["lr_boundaries"])) == (1_250_000, 1 + 19)
    assert ig["lr_boundaries"][0] == [0, 0.12]
    assert ig["lr_boundaries"][1:] == [
        [62_500 * turn, pytest.approx(0.12 * 0.9**turn)] for turn in range(1, 20)
    ]
    assert ig["lr_last"] == pytest.approx(0.01621, abs=5e-6)
    v1, v2 = plans["in1m-v1"], plans["in1m-v2"]
    assert (v1["steps_per_epoch"], v1["total_steps"]) == (5004, 1_000_800)
    assert v1["lr_boundaries"] == [
        [0, 0.03],
        [120 * 5004, pytest.approx(0.003)],
        [160 * 5004, pytest.approx(0.0003)],
    ]
    assert (v2["total_steps"], len(v2["lr_boundaries"])) == (1_000_800, 200)
