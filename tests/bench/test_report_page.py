import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.bench.made_records import DESK, HOSTILE, NODE, made, scaled, versus

from linerate.bench.findings import find
from linerate.bench.fleet import load_files
from linerate.bench.line_chart import HEIGHT, TOP, Line, Point, line_chart, log_ticks, ticks
from linerate.bench.record import Record, latest
from linerate.bench.record_table import number
from linerate.bench.report_page import write_report
from linerate.shards.terminal import visible

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results" / "2026-11-25_epyc-2c.jsonl"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """The page as a browser takes it: tags with attributes, and the text inside each element of a class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.of_class: dict[str, list[str]] = {}
        self.feed(text)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.handle_data(" ")
        if tag not in VOID:
            self._open.append(found.get("class") or "")
            self.of_class.setdefault(self._open[-1], []).append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open:
            self._open.pop()
        self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        for name in dict.fromkeys(self._open):
            self.of_class[name][-1] += data


def page(tmp_path: Path, records: list[Record], **prices: float) -> str:
    out = tmp_path / "report.html"
    write_report(out, find(records, prices), sources=["results.jsonl"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return out.read_text(encoding="utf-8")


def texts(html: str, name: str) -> list[str]:
    return [" ".join(text.split()) for text in Page(html).of_class.get(name, [])]


def widths(html: str, name: str) -> list[float]:
    return [
        float((attrs["style"] or "").removeprefix("width:").removesuffix("%"))
        for tag, attrs in Page(html).tags
        if tag == "i" and (attrs.get("class") or "").split()[:2] == ["fill", name]
    ]


def test_the_page_shows_the_numbers_that_the_files_hold(tmp_path: Path):
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    newest = {(line["name"], line["peer"], line["work"], line["unit"]): line for line in lines}
    rows = texts(page(tmp_path, load_files([RESULTS])), "row")
    held = [line for line in newest.values() if line["peer"]]
    assert len(rows) == len(held)
    for line in held:
        row = [row for row in rows if line["work"] in row and f"against {line['peer']}" in row]
        row = [one for one in row if f"{number(line['ours'])} {line['unit']}" in one]
        assert row, line
        if line["ratio"] is not None and line["ratio"] < 100:
            assert f"{line['ratio']:.2f}x" in row[0]
        if line["kind"] == "time" and line["ratio"] is not None:
            assert f"({line['ratio_low']:.2f} to {line['ratio_high']:.2f})" in row[0]
        if line["ceiling_share"] is not None:
            assert f"{100 * line['ours'] / line['ceiling_rate']:.0f} % of {line['ceiling']}" in row[0]
        assert (line["missing"] or "") in row[0]
        stands = {True: "\u2713 met", False: "\u2717 not met", None: ""}[line["met"]]
        assert stands in row[0]


def test_a_bar_is_as_long_as_its_share(tmp_path: Path):
    records = [
        versus(100.0, 3.0, bar=4.0, work="a"),
        versus(100.0, 5.0, bar=4.0, work="b", ceiling="copy", ceiling_rate=400.0, ceiling_share=0.25),
        versus(100.0, 60.0, bar=4.0, work="c"),
    ]
    html = page(tmp_path, records)
    # The bar of bars is in the middle.
    assert widths(html, "unmet") == [37.5]
    assert widths(html, "met") == [62.5, 100.0]
    assert widths(html, "ceiling") == [25.0]


def test_missing_peers_and_refusals_are_named(tmp_path: Path):
    records = [
        made(100.0, name="pack", work="a", peer="img2dataset", missing="img2dataset is not installed"),
        made(None, name="sgd-ema", work="b", peer="fused", refused="weights differ by 3e-3"),
    ]
    rows = texts(page(tmp_path, records), "row")
    assert "pack against img2dataset" in rows[0]
    assert "img2dataset is not installed" in rows[0]
    assert "not measured" in rows[0]
    assert "refused: weights differ by 3e-3" in rows[1]


def test_ceilings_stand_with_their_machine_also_those_that_could_not_be_measured(tmp_path: Path):
    copy = made(43.6, name="ceilings", work="memory copy, one core: 64 MB", unit="GB/s")
    missing = made(
        None, name="ceilings", work="host to GPU: 64 MB", unit="GB/s", missing="there is no CUDA device"
    )
    html = page(tmp_path, [copy, missing, made(1.0)])
    text = Page(html[: html.index('id="bars"')]).text
    assert "Ceilings of H200, 16 of 192 cores memory copy, one core 43.6 GB/s 64 MB" in text
    assert "host to GPU there is no CUDA device" in text


def hostile() -> Record:
    record = versus(100.0, 2.0, bar=4.0)
    words = ("name", "peer", "work", "unit", "equal", "ceiling", "missing", "note", "verdict", "bar_reads")
    machine = {**NODE, "cpu": HOSTILE, "gpu": {"name": HOSTILE}, HOSTILE: HOSTILE, "python": HOSTILE}
    machine |= {"libraries": {HOSTILE: HOSTILE}, "code": {"commit": HOSTILE}}
    texts = dict.fromkeys(words, HOSTILE)
    more = {"machine": machine, "ceiling_share": 0.5, "stages": {HOSTILE: 1.0}, "measured_at": HOSTILE}
    return dataclasses.replace(record, **texts, **more)


def all_kinds() -> list[Record]:
    """A record for every part of the page."""
    old = made(4000.0, measured_at="2026-11-01T10:00:00+00:00")
    return [
        hostile(),
        dataclasses.replace(hostile(), ours=90.0),
        dataclasses.replace(hostile(), ours=None, refused=HOSTILE),
        old,
        made(4700.0, machine={**NODE, "noise": {"noisy": True, "spread": 0.2, "others_cores": 3.0}}),
        made(4310.0, name="ceilings", work="memory copy", unit="GB/s"),
        made(2900.0, name="pipeline", work="loader and step: resnet50", stages={"read": 0.1}, verdict="v"),
        scaled("strong", 1, 100.0),
        scaled("strong", 64, 5000.0, note="projection: by bytes"),
    ]


def test_no_text_of_a_record_becomes_markup(tmp_path: Path):
    found = Page(page(tmp_path, all_kinds()))
    assert {tag for tag, _ in found.tags} & {"script", "img", "iframe", "object", "form", "link"} == set()
    assert all(not name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert "<script>alert(1)</script>" in found.text
    assert "\x1b" not in found.text
    # The name, in the bars and the lines, comes as it was.
    assert found.text.count(visible(HOSTILE)) > 10


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path):
    html = page(tmp_path, all_kinds())
    found = Page(html)
    links = [
        attrs[name] for _, attrs in found.tags for name in ("href", "src", "data", "action") if name in attrs
    ]
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert links == [f"#{place}" for place in ids]
    assert len(links) == 7
    assert "url(" not in html
    assert "@import" not in html
    policies = [attrs["content"] or "" for _, attrs in found.tags if attrs.get("http-equiv")]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert "script-src 'none'" in policies[0]


def test_every_line_is_in_the_last_table_and_replaced_ones_are_faint(tmp_path: Path):
    records = [made(100.0 + day, measured_at=f"2026-11-0{day}T10:00:00+00:00") for day in (1, 2, 3)]
    html = page(tmp_path, [*records, made(7.0, machine=DESK)])
    table = html[html.index('id="lines"') :]
    assert table.count("<tr><td") + table.count("<tr class=old><td") == 4
    assert table.count("<tr class=old><td") == 2
    assert "aabbccddeeff" in table
    assert "torch 2.15.0" in table
    assert "driver 580.65, CUDA 13.0" in table


def test_history_runs_from_the_oldest_to_the_newest_with_commits(tmp_path: Path):
    def at(day: int, rate: float) -> Record:
        machine = {**NODE, "code": {"commit": f"{day}" * 12}}
        return made(rate, measured_at=f"2026-11-0{day}T10:00:00+00:00", machine=machine)

    html = page(tmp_path, sorted([at(3, 300.0), at(1, 100.0), at(2, 200.0)], key=lambda r: r.measured))
    history = " ".join(Page(html[html.index('id="history"') : html.index('id="lines"')]).text.split())
    assert "100 1111111 \u2192 200 2222222 \u2192 300 3333333" in history
    assert "11-01 11-02 11-03" in history


def test_scaling_marks_projections_and_gives_efficiency(tmp_path: Path):
    records = [scaled("weak", 1, 100.0), scaled("weak", 2, 180.0)]
    records.append(scaled("weak", 16, 1200.0, note="projection: gradients over 400 Gb/s", ours_p10=None))
    html = page(tmp_path, records)
    text = Page(html[html.index('id="scaling"') : html.index('id="cost"')]).text
    assert "2 180 200 90 % measured" in text
    assert "16 1,200 1,600 75 % projected" in text
    assert "projection: gradients over 400 Gb/s" in text
    assert html.count('<polyline class="projected"') == 1
    assert html.count('<polyline class="ideal"') == 1


def test_the_stack_names_stages_shares_and_verdict(tmp_path: Path):
    stages = {"read": 0.1, "decode": 0.3}
    verdict = "decode-bound: 2,900 of 4,700 pairs/s"
    (card,) = texts(page(tmp_path, [made(100.0, name="pipeline", stages=stages, verdict=verdict)]), "legend")
    assert card == "read 100.0 ms 25.0 % decode 300.0 ms 75.0 %"
    html = (tmp_path / "report.html").read_text()
    assert texts(html, "verdict") == [verdict]
    assert 'style="flex:0.7500 0 0;' in html


def test_costs_stand_on_the_page_as_worked_out_by_hand(tmp_path: Path):
    html = page(tmp_path, [made(2000.0)], **{"H200, 16 of 192 cores": 3.0})
    text = Page(html[html.index('id="cost"') : html.index('id="history"')]).text
    # As in test_cost: 2.4 M images a dollar, 35.588 h and 106.76 dollars, 177.778 h and 533.33 dollars.
    assert "2,000 3.00 2,400,000 35.6 107 178 533" in text


def test_a_page_of_one_plain_record_says_what_is_not_there(tmp_path: Path):
    html = page(tmp_path, [made(1.0, name="read")])
    assert html.count("These files hold no record") == 5


def test_a_machine_that_says_odd_things_is_shown_all_the_same(tmp_path: Path):
    odd = {"cpu": 3, "cores": "many", "gpu": "big", "noise": "loud", "libraries": [], "code": 1}
    odd |= {"disk": {"read_mb_per_s": 5}}
    text = Page(page(tmp_path, [made(1.0, machine=odd)])).text
    assert "disk read 5 MB/s" in text


def test_the_newest_of_the_real_file_are_as_many_as_the_page_says(tmp_path: Path):
    records = load_files([RESULTS])
    text = Page(page(tmp_path, records)).text
    assert f"{len(latest(records))} benchmarks of {len(records)} lines" in text


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (9.3, [0, 2, 4, 6, 8, 10]),
        (100, [0, 20, 40, 60, 80, 100]),
        (0.07, [0, 0.02, 0.04, 0.06, 0.08]),
        (0, [0, 1]),
    ],
)
def test_ticks_are_round_and_reach_the_top(top: float, expected: list[float]):
    assert ticks(top) == pytest.approx(expected)


def test_log_ticks_enclose_the_values():
    assert log_ticks(90, 1100) == [50, 100, 200, 500, 1000, 2000]
    assert log_ticks(3, 4e6)[0] == 1
    assert log_ticks(3, 4e6)[-1] == 1e7


def test_a_chart_puts_twice_the_value_twice_as_high():
    svg = line_chart(
        [Line(points=[Point(x=0, y=50), Point(x=1, y=100)])], x_ticks=[], y_title="y", caption=""
    )
    marks = [attrs for tag, attrs in Page(svg).tags if tag == "circle"]
    bottom = HEIGHT - 24
    heights = [bottom - float(attrs["cy"] or 0) for attrs in marks]
    assert heights == pytest.approx([(bottom - TOP) / 2, bottom - TOP], abs=0.1)
