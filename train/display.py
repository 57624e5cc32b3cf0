"""What people see while a run goes on: a live panel on a terminal, one line a log entry elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from linerate.shards.terminal import stderr

Event = Mapping[str, Any]


@contextlib.contextmanager
def show_run(title: str, *, console: Console = stderr) -> Iterator[Callable[[Event], None]]:
    """Yields on_event: give it every event of pretrain(). The panel stays on the screen at its last state."""
    if not console.is_terminal:
        yield lambda event: _print_line(event, console)
        return
    panel = RunPanel(title)
    with Live(panel, console=console, refresh_per_second=4) as live:

        def on_event(event: Event) -> None:
            panel.take(event)
            for line in switch_lines(event):
                live.console.print(Text(line, style="dim"), overflow="fold")
            if event["event"] in ("note", "checkpoint", "alarm"):
                style = "red" if event["event"] == "alarm" else ""
                live.console.print(Text(plain_line(event), style=style), overflow="fold")

        yield on_event


def plain_line(event: Event) -> str:
    """One event in at most 80 columns, paths apart."""
    kind = event["event"]
    if kind == "start":
        return (
            f"{event['total_steps']:,} steps, {event['steps_per_epoch']:,} an epoch; "
            f"chance {event['chance_loss']:.3f}; {event['device']}"
        )
    if kind == "step":
        return (
            f"{event['step']:,}/{event['total_steps']:,} loss {event['loss']:.3f} "
            f"top-1 {percent(event['pretext_top1'])} {event['images_per_s']:,.0f} img/s "
            f"wait {percent(event['data_wait_share'], digits=0)} left {clock(event['left_s'])}"
            f"{_replaced(event)}"
        )
    if kind == "knn":
        return (
            f"epoch {event['epoch']}: kNN {percent(event['knn_top1'])} of {event['num_test']:,} test images"
        )
    if kind == "checkpoint":
        return f"checkpoint at step {event['step']:,}: {event['path']}"
    if kind == "alarm":
        return f"ALARM {event['alarm']}: {event['text']}"
    if kind == "end":
        return f"{'finished' if event['finished'] else 'stopped'} after step {event['step']:,}"
    return str(event["text"])


def switch_lines(event: Event) -> list[str]:
    """What the start of a run tells of its speed switches, each in at most 80 columns."""
    switches = event.get("switches", {}) if event["event"] == "start" else {}
    return [f"{name} {state}" for name, state in switches.items()]


def percent(share: float, *, digits: int = 1) -> str:
    """A share in [0, 1] as `12.3%`."""
    return f"{100 * share:.{digits}f}%"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class RunPanel:
    """The state of a run, as rich draws it."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.start: Event = {}
        self.step: Event = {}
        self.knn: Event = {}
        self.alarms: list[str] = []

    def take(self, event: Event) -> None:
        """Keep the event where the panel shows it."""
        if event["event"] in ("start", "step", "knn"):
            setattr(self, event["event"], dict(event))
        if event["event"] == "alarm":
            self.alarms.append(event["alarm"])

    def __rich__(self) -> RenderableType:
        if not self.start:
            return Panel("opening the shards ...", title=self.title, title_align="left")
        done, total = self.step.get("step", self.start["step"]), self.start["total_steps"]
        head = Table.grid(padding=(0, 2))
        head.add_column()
        head.add_column(no_wrap=True)
        left = f"left {clock(self.step['left_s'])}" if self.step else "first steps"
        head.add_row(ProgressBar(total=total, completed=done, width=24), f"{done:,}/{total:,}  {left}")
        rows: list[RenderableType] = [head, self._numbers()]
        if self.alarms:
            rows.append(Text(f"ALARM  {', '.join(self.alarms)}", style="bold red"))
        return Panel(Group(*rows), title=self.title, title_align="left")

    def _numbers(self) -> Table:
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim")
        rows.add_column(no_wrap=True)
        rows.add_column(style="dim")
        step = self.step
        loss = f"{step['loss']:.3f}" if step else "-"
        rows.add_row("loss", loss, f"chance {self.start['chance_loss']:.3f}")
        if step:
            rows.add_row("pretext", f"top-1 {percent(step['pretext_top1'])}", _top5(step))
            rows.add_row("speed", f"{step['images_per_s']:,.0f} images/s", _wait(step))
            rows.add_row("rate", f"lr {step['lr']:.3g}", f"epoch {step['epoch'] + 1:,}")
            if "queue_fill" in step:
                age = f"oldest key {step['queue_age_steps']:,.0f} steps old"
                rows.add_row("queue", f"{percent(step['queue_fill'])} filled", age)
            if _replaced(step):
                rows.add_row("damage", _replaced(step).strip(), "see bad_samples-rank*.jsonl")
        if self.knn:
            rows.add_row("kNN", percent(self.knn["knn_top1"]), f"after epoch {self.knn['epoch']:,}")
        return rows


def _top5(step: Event) -> str:
    return f"top-5 {percent(step['pretext_top5'])}"


def _wait(step: Event) -> str:
    return f"waiting for data {percent(step['data_wait_share'], digits=0)}"


def _replaced(step: Event) -> str:
    """Empty where no sample had to be replaced; a log from before they were counted does not say."""
    return f" replaced {step['replaced']:,}" if step.get("replaced") else ""


def _print_line(event: Event, console: Console) -> None:
    # soft_wrap: a log line is one line, however narrow the console thinks it is.
    for line in (plain_line(event), *switch_lines(event)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
