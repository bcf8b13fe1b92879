"""One HTML page that opens from disk: its style, its one script, and the sections in their order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from reporting import panels, tables
from reporting.runs import Run

STYLE = """
:root { --ink:#1b1f24; --soft:#667080; --rule:#e3e6ea; --paper:#ffffff; --tint:#f6f7f9;
  --r0:#0b6bcb; --r1:#d1570a; --r2:#1a8a5a; --r3:#a3319b; --r4:#8a6d00; --r5:#c2273d; --r6:#3d7f8f; --r7:#5b5fc7; }
@media (prefers-color-scheme: dark) { :root { --ink:#e4e7eb; --soft:#98a2b0; --rule:#2e343c; --paper:#14171b;
  --tint:#1c2026; --r0:#5aa9f5; --r1:#f59453; --r2:#4ec58f; --r3:#d985d3; --r4:#d0b13f; --r5:#f27585; --r6:#74bccc;
  --r7:#9ea2f2; } }
* { box-sizing:border-box; }
body { margin:0 auto; max-width:1100px; padding:28px 24px 80px; background:var(--paper); color:var(--ink);
  font:15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size:24px; font-weight:600; margin:0 0 2px; }
h2 { font-size:18px; font-weight:600; margin:44px 0 2px; padding-top:14px; border-top:1px solid var(--rule); }
h3 { font-size:14px; font-weight:600; margin:0 0 4px; }
p { margin:4px 0 10px; max-width:75ch; }
.soft, .gap, figcaption { color:var(--soft); font-size:13px; }
.gap { border-left:3px solid var(--rule); padding-left:10px; }
.key { font-weight:600; white-space:nowrap; }
.key::before { content:""; display:inline-block; width:10px; height:10px; border-radius:5px; margin-right:6px;
  background:currentColor; }
.c0 { color:var(--r0); } .c1 { color:var(--r1); } .c2 { color:var(--r2); } .c3 { color:var(--r3); }
.c4 { color:var(--r4); } .c5 { color:var(--r5); } .c6 { color:var(--r6); } .c7 { color:var(--r7); }
.wide { overflow-x:auto; }
table { border-collapse:collapse; font-size:13px; font-variant-numeric:tabular-nums; margin:6px 0 12px; }
th, td { text-align:left; padding:4px 14px 4px 0; border-bottom:1px solid var(--rule); vertical-align:top; }
th { color:var(--soft); font-weight:500; white-space:nowrap; }
td.n, th.n { text-align:right; white-space:nowrap; }
.grid2 { display:grid; grid-template-columns:repeat(auto-fill, minmax(400px, 1fr)); gap:20px 28px; }
@media (max-width:460px) { .grid2 { grid-template-columns:1fr; } }
figure { margin:0; min-width:0; }
svg { width:100%; height:auto; display:block; font-size:11px; }
svg text { fill:var(--soft); } svg text.label { fill:currentColor; font-weight:600; }
.grid { stroke:var(--rule); stroke-width:1; }
.line { fill:none; stroke:currentColor; stroke-width:1.6; stroke-linejoin:round; }
.faint { stroke-width:1; opacity:.5; stroke-dasharray:3 3; }
.band { fill:currentColor; opacity:.14; }
.full { fill:currentColor; } .hollow { fill:var(--paper); stroke:currentColor; stroke-width:1.3; }
.hit { fill:currentColor; opacity:0; } .hit:hover { opacity:.55; }
.pictures { display:flex; flex-wrap:wrap; gap:16px; }
.pictures img { max-width:100%; max-height:420px; background:#fff; border-radius:4px; }
code, pre { font:12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { background:var(--tint); padding:10px 12px; overflow-x:auto; border-radius:4px; margin:4px 0 10px; }
details summary { cursor:pointer; color:var(--soft); font-size:13px; }
#tip { position:fixed; pointer-events:none; display:none; background:var(--ink); color:var(--paper); font-size:12px;
  padding:3px 8px; border-radius:4px; max-width:340px; z-index:2; }
"""

# Shows the title of what the pointer is on at once; without it the browser shows it after a moment.
SCRIPT = """
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const title = event.target.classList.contains("hit") ? event.target.querySelector("title") : null;
  tip.style.display = title ? "block" : "none";
  if (!title) return;
  tip.textContent = title.textContent;
  tip.style.left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = event.clientY + 14 + "px";
});
"""


def page(runs: Sequence[Run], title: str) -> str:
    """The whole page. Everything that comes from a run is escaped; nothing is loaded from elsewhere."""
    keys = " · ".join(tables.key(run, i) for i, run in enumerate(runs))
    made = time.strftime("%Y-%m-%d %H:%M")
    sections = [*tables.summary(runs), *panels.sections(runs), *tables.origins(runs)]
    body = "\n".join(f"<section><h2>{escape(name)}</h2>\n{content}</section>" for name, content in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="soft">{keys}<br>Made {made} from the files of the runs alone. Point at a line for its values.</p>
{body}
<div id="tip"></div>
<script>{SCRIPT}</script>
</body>
</html>
"""
