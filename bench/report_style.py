"""The look of the report: light and dark, on paper, and 400 pixels wide."""

from __future__ import annotations

from linerate.shards.html_page import THEME

STYLE = (
    THEME
    + """
:root { --met: light-dark(#1a7f4b, #3fb97a); --unmet: light-dark(#c0392b, #ef7d6f);
  --amber: light-dark(#9a6700, #e0b252); --grey: light-dark(#8a93a0, #7d8794);
  --track: light-dark(#e8ebef, #2c3138) }
body { margin: 0 auto; max-width: 1180px; padding: 0 24px 60px; background: var(--ground); color: var(--ink);
  font: 14px/1.45 system-ui, sans-serif; print-color-adjust: exact; -webkit-print-color-adjust: exact }
header { padding: 26px 0 6px }
h1 { font-size: 24px; margin: 0; letter-spacing: -.01em }
h2 { font-size: 18px; margin: 42px 0 4px; padding-top: 14px; border-top: 1px solid var(--line) }
h3 { font-size: 14.5px; margin: 22px 0 8px }
p { margin: 2px 0 12px; max-width: 80ch }
small, .faint { color: var(--faint); font-weight: normal }
small { font-size: 12px }
.whole { white-space: nowrap }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0 0 }
a { color: var(--accent); text-decoration: none }
a:hover { text-decoration: underline }
.tally { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0 4px }
.tally div { background: var(--card); border: 1px solid var(--line); border-radius: 9px; padding: 8px 14px;
  min-width: 92px }
.tally b { display: block; font-size: 22px; line-height: 1.2; font-variant-numeric: tabular-nums }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 14px;
  align-items: start }
.columns { columns: 3 340px; column-gap: 14px } .columns .card { margin-bottom: 14px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 9px; padding: 12px 16px;
  break-inside: avoid; min-width: 0 }
.card h3 { margin: 0 0 6px; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: fit-content(48%) minmax(0, 1fr); gap: 2px 12px; margin: 0 }
dt { color: var(--faint) } dd { margin: 0; overflow-wrap: anywhere }
.chip { display: inline-block; font-size: 12px; line-height: 1.5; padding: 0 8px; border-radius: 9px;
  white-space: nowrap; border: 1px solid currentColor; color: var(--grey) }
.chip.met { color: var(--met) } .chip.unmet { color: var(--unmet) } .chip.noisy { color: var(--amber) }
.row { display: grid; gap: 2px 18px; padding: 9px 0; border-top: 1px solid var(--line); break-inside: avoid;
  grid-template-columns: minmax(0, 2.2fr) 112px minmax(0, 1.6fr) minmax(0, 1.3fr) 96px }
.row > * { min-width: 0; overflow-wrap: anywhere }
.row.top { color: var(--faint); font-size: 12px; border: 0; padding: 0 0 4px }
.rate { text-align: right; font-variant-numeric: tabular-nums }
.rate .theirs { display: block }
.verdicts { display: flex; flex-direction: column; align-items: flex-end; gap: 3px }
.track { position: relative; height: 10px; margin: 6px 0 4px; border-radius: 3px; background: var(--track) }
.track i { position: absolute; top: 0; bottom: 0 }
.track .fill { left: 0; border-radius: 3px; background: var(--grey) }
.track .fill.met { background: var(--met) } .track .fill.unmet { background: var(--unmet) }
.track .fill.ceiling { background: var(--accent) }
.track .fill.over { clip-path: polygon(0 0, calc(100% - 6px) 0, 100% 50%, calc(100% - 6px) 100%, 0 100%) }
.track .span { top: 4px; bottom: 4px; background: var(--ink) }
.track .tick { left: 50%; top: -4px; bottom: -4px; width: 2px; margin-left: -1px; background: var(--ink) }
.track .tick.peer { background: none; border-left: 2px dotted var(--faint) }
.stack { display: flex; height: 34px; border-radius: 5px; overflow: hidden; margin: 8px 0 10px; gap: 1px }
.stack span { min-width: 1px; overflow: hidden; white-space: nowrap; color: #fff; font-size: 12px;
  line-height: 34px; padding-left: 7px }
.stack .unnamed { font-size: 0; padding: 0 }
.legend { display: grid; grid-template-columns: repeat(auto-fill, minmax(235px, 1fr)); gap: 1px 22px;
  margin: 0; padding: 0; list-style: none }
.legend li { display: flex; align-items: baseline; gap: 7px }
.legend li span { margin-left: auto; font-variant-numeric: tabular-nums; white-space: nowrap }
.legend i { width: 10px; height: 10px; border-radius: 2px; flex: none }
.verdict { font-size: 15.5px; margin: 4px 0 8px; border-left: 3px solid var(--accent); padding-left: 10px }
.chart { display: block; width: 100%; max-width: 420px; height: auto; font-size: 11px }
.chart text { fill: var(--faint) }
.chart .grid { stroke: var(--line); stroke-width: 1 }
.chart polyline { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round }
.chart polyline.ideal { stroke: var(--grey); stroke-width: 1.2; stroke-dasharray: 2 3 }
.chart polyline.projected { stroke-dasharray: 7 4 }
.chart .mark { fill: var(--accent); stroke: var(--card); stroke-width: 1.5 }
.chart .mark.hollow { fill: var(--card); stroke: var(--accent); stroke-width: 2 }
.chart .whisker { fill: none; stroke: var(--accent); stroke-width: 1.3 }
.wide { overflow-x: auto; margin: 6px 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th { text-align: left; font-weight: 500; color: var(--faint); font-size: 12px; vertical-align: bottom }
td, th { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; white-space: nowrap }
tr.chosen td { font-weight: 600 }
tr.old { color: var(--faint) }
.cost { min-width: 760px }
.lines { font-size: 12px; line-height: 1.4 } .lines td.work { min-width: 250px }
.lines td { overflow-wrap: anywhere } .lines td.code { white-space: nowrap }
.lines td.short { min-width: 82px }
.versions { font-size: 12px; overflow-wrap: anywhere }
@media screen and (max-width: 820px) {
  body { padding: 0 14px 40px }
  .row.top { display: none } .stack .named-wide { font-size: 0; padding: 0 }
  .row { grid-template-columns: minmax(0, 1fr) auto;
    grid-template-areas: "what verdicts" "rate rate" "bar bar" "ceiling ceiling" }
  .what { grid-area: what } .rate { grid-area: rate; text-align: left }
  .rate .theirs { display: inline } .rate .theirs::before { content: ", " }
  .bar { grid-area: bar } .ceiling { grid-area: ceiling } .verdicts { grid-area: verdicts }
}
@media print {
  :root { color-scheme: light; --ground: #fff; --card: #fff }
  body { max-width: none; padding: 0; font-size: 11px } small, th, .row.top, .chip { font-size: 9.5px }
  nav { display: none } h2, h3 { break-after: avoid } tr { break-inside: avoid }
  .wide { overflow: visible } .lines { font-size: 8px }
  .lines small, .lines .chip { font-size: inherit } .lines td { padding-right: 6px }
  .lines td.work, .lines td.short, .cost { min-width: 0 } .lines td.code { white-space: normal }
}
@page { size: landscape; margin: 12mm }
"""
)
