import io

import pytest
from rich.console import Console
from rich.text import Text

from linerate.train.display import RunPanel, clock, plain_line, show_run

START = {
    "event": "start",
    "step": 0,
    "total_steps": 1_000_800,
    "steps_per_epoch": 5004,
    "chance_loss": 11.0904,
    "device": "cuda, 8 ranks, bf16",
}
STEP = {
    "event": "step",
    "step": 1_000_750,
    "total_steps": 1_000_800,
    "epoch": 199,
    "loss": 11.0421,
    "pretext_top1": 0.9876,
    "pretext_top5": 0.9987,
    "lr": 0.0003,
    "images_per_s": 12345.6,
    "data_wait_share": 0.034,
    "left_s": 53 * 3600 + 83,
}
KNN = {"event": "knn", "epoch": 200, "step": 1_000_800, "knn_top1": 0.8826, "num_test": 10_000}


def test_plain_lines_fit_into_80_columns() -> None:
    lines = [plain_line(event) for event in (START, STEP, KNN)]
    assert max(len(line) for line in lines) <= 80
    assert lines[1] == ("1,000,750/1,000,800 loss 11.042 top-1 98.8% 12,346 img/s wait 3% left 53:01:23")


def test_replaced_samples_are_told_where_there_are_any() -> None:
    assert plain_line({**STEP, "replaced": 0}) == plain_line(STEP)
    assert plain_line({**STEP, "replaced": 1234}).endswith("left 53:01:23 replaced 1,234")
    panel, console = RunPanel("x"), Console(file=io.StringIO(), width=80, record=True)
    for event in (START, {**STEP, "replaced": 3}):
        panel.take(event)
    console.print(panel)
    assert "replaced 3" in console.export_text()


def test_the_panel_tells_how_far_the_queue_is_filled_and_how_old_it_is() -> None:
    panel, console = RunPanel("x"), Console(file=io.StringIO(), width=80, record=True)
    for event in (START, {**STEP, "queue_fill": 0.5, "queue_age_steps": 1234.0}):
        panel.take(event)
    console.print(panel)
    text = console.export_text()
    assert "50.0% filled" in text
    assert "oldest key 1,234 steps old" in text


def test_off_a_terminal_every_event_is_one_line() -> None:
    out = io.StringIO()
    with show_run("in1m-v1", console=Console(file=out, width=40)) as on_event:
        for event in (START, STEP, KNN, {"event": "note", "text": "[stopping]"}):
            on_event(event)
    assert out.getvalue().splitlines()[1:] == [plain_line(STEP), plain_line(KNN), "[stopping]"]


def test_the_panel_is_readable_at_80_columns() -> None:
    panel = RunPanel("in1m-v1 in runs/in1m-v1")
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(panel)
    for event in (START, STEP, KNN):
        panel.take(event)
        console.print(panel)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) == 80
    for words in ("1,000,750/1,000,800  left 53:01:23", "chance 11.090", "top-1 98.8%", "12,346 images/s"):
        assert words in text
    for words in ("waiting for data 3%", "88.3%", "after epoch 200"):
        assert words in text


def test_a_terminal_gets_the_live_panel() -> None:
    out = io.StringIO()
    with show_run("demo", console=Console(file=out, width=80, force_terminal=True)) as on_event:
        for event in (START, STEP, {"event": "checkpoint", "step": 5, "path": "runs/x"}):
            on_event(event)
    assert "checkpoint at step 5: runs/x" in out.getvalue()
    assert "chance 11.090" in out.getvalue()


@pytest.mark.parametrize("width", [60, 80])
def test_alarms_are_told_above_the_panel_and_named_in_it(width: int) -> None:
    out = io.StringIO()
    alarm = {"event": "alarm", "step": 5, "alarm": "collapse", "text": f"the std is {'very ' * 20}low"}
    with show_run("demo", console=Console(file=out, width=width, force_terminal=True)) as on_event:
        for event in (START, STEP, alarm, {**alarm, "alarm": "data-wait"}):
            on_event(event)
    lines = Text.from_ansi(out.getvalue()).plain.splitlines()
    assert max(len(line) for line in lines) <= width
    assert sum(line.startswith("ALARM collapse: the std is very") for line in lines) == 1
    assert [line for line in lines if "ALARM  collapse, data-wait" in line]


def test_a_clock_shows_hours_minutes_seconds() -> None:
    assert [clock(s) for s in (0, 61, 3600, 360_000.4)] == ["0:00:00", "0:01:01", "1:00:00", "100:00:00"]
