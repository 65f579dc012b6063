"""The style of the report: readable in a narrow window, on paper, and without a mouse."""

STYLE = """
:root { color-scheme: light; --ink: #1d2330; --soft: #5b6472; --line: #d9dde4; --blue: #2166ac; --orange: #c2570c; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 60px; color: var(--ink); background: #fff; font: 15px/1.5
  system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 24px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 8px; }
h3 { font-size: 15px; margin: 24px 0 6px; }
p { margin: 6px 0; max-width: 76ch; }
.soft, figcaption { color: var(--soft); }
.soft { overflow-wrap: anywhere; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: #f3f5f8; padding: 2px 6px;
  border-radius: 4px; overflow-wrap: anywhere; }
code span { display: inline-block; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 18px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 23px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { display: block; color: var(--soft); font-size: 13px; }
.warn { border-left: 4px solid var(--orange); background: #fdf4ec; padding: 8px 12px; margin: 8px 0; max-width: 90ch;
  }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 28px 32px;
  margin-top: 24px; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figcaption { font-size: 13.5px; }
svg { width: 100%; height: auto; display: block; }
details { margin-top: 6px; }
summary { cursor: pointer; color: var(--blue); font-size: 13.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
td.n { text-align: right; }
text { font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--ink); }
.tick { fill: #5b6472; }
.label { font-size: 12px; }
.note { fill: #5b6472; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
.ring { fill: #fff; stroke-width: 1.8; }
.cell { font-size: 10.5px; }
.cell.dark { fill: #fff; }
.cell.light { fill: #1d2330; }
.grid { stroke: #e8ebf0; }
.zero, .axis { stroke: #8a93a1; }
polyline { fill: none; stroke-linejoin: round; }
.path { stroke-width: 1.8; }
.faint { stroke: #c3c9d3; stroke-width: 1.2; }
.merge { stroke: #2166ac; }
.fit { stroke: #1d2330; stroke-width: 1.4; stroke-dasharray: 5 3; }
.single { fill: #fff; stroke: #5b6472; stroke-width: 1.5; }
.merged { fill: #2166ac; }
.annealed { fill: #1a7f4b; }
.band { fill: #f3b27a; fill-opacity: .65; }
.center { stroke: #c2570c; stroke-width: 2.5; }
.best { fill: #c2570c; }
.harm { fill: #f7ebe6; }
.bar { fill: #4393c3; }
.v0 { stroke: #053061; }
.v1 { stroke: #2f79b5; }
.v2 { stroke: #62aed0; }
.v3 { stroke: #9fcde2; }
.w0 { fill: #053061; }
.w1 { fill: #2f79b5; }
.w2 { fill: #3d8fb6; }
.w3 { fill: #5b9db5; }
.dot0 { fill: #053061; }
.dot1 { fill: #2f79b5; }
.dot2 { fill: #62aed0; }
.dot3 { fill: #9fcde2; }
@media (max-width: 560px) { body { padding: 16px 12px 40px; } h1 { font-size: 20px; } text { font-size: 13.5px; }
  .label { font-size: 14px; } .cell { font-size: 11.5px; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .card, .warn { break-inside: avoid; }
  .cards { grid-template-columns: repeat(3, 1fr); } .panels { grid-template-columns: 1fr 1fr; gap: 18px 22px; }
  summary { display: none; } }
"""
