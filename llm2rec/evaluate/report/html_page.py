"""A document as one HTML file: no script, no network, for phones, printers and both colour schemes."""

import re
from html import escape

from llm2rec.evaluate.report.charts import N_COLOURS
from llm2rec.evaluate.report.document import Block, Code, Document, Facts, Figure, Table, Text

__all__ = ["DARK", "LIGHT", "html_page"]

_WIDE, _NARROW = 768, 340  # of drawings, in CSS pixels

LIGHT = {
    "paper": "#ffffff", "card": "#f5f6f8", "ink": "#1b1f24", "soft": "#57606a", "rule": "#d3d8de", "accent": "#005a9c",
    "s0": "#0b61a4", "s1": "#a83a00", "s2": "#12805c", "s3": "#b0559a", "s4": "#a58300", "s5": "#2f95c9",
    "s6": "#5b5f66",
}  # fmt: skip
"""Colours on white: the hues of Okabe and Ito's palette, the light ones darker, so that lines stand out from paper."""
DARK = {
    "paper": "#12151a", "card": "#1b2027", "ink": "#e8eaed", "soft": "#a3abb5", "rule": "#363d47", "accent": "#7cc0f5",
    "s0": "#4b9fe8", "s1": "#f0803c", "s2": "#2fb98a", "s3": "#dd8fc6", "s4": "#e5bd3f", "s5": "#a5d8f3",
    "s6": "#7d848d",
}  # fmt: skip
"""The same on black."""

_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header{max-width:50rem;margin:0 auto;padding:0 1rem}
header{padding-top:2.25rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.01em}
h2{font-size:1.3rem;line-height:1.3;margin:2.75rem 0 .75rem;padding-top:.9rem;border-top:1px solid var(--rule)}
p{margin:.7rem 0}
p,dd,figcaption,h1,h2,table.words td{overflow-wrap:anywhere}
.subtitle,.note,figcaption span,caption{color:var(--soft)}
.note{font-size:.9rem}
section.lead{background:var(--card);border-left:4px solid var(--accent);border-radius:4px;
padding:.5rem 1.1rem;margin:1.4rem 0 0}
section.lead h2{margin:.5rem 0 0;padding:0;border:0;font-size:1.05rem;color:var(--accent)}
section.lead p{font-size:1.06rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:.9rem;margin:1rem 0}
nav a{color:var(--accent)}
table{border-collapse:collapse;width:100%;margin:1rem 0;font-size:.88rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.4rem;font-size:.9rem}
th,td{padding:.42rem .4rem;border-bottom:1px solid var(--rule);vertical-align:top;text-align:right}
th:first-child,td:first-child,table.words th,table.words td{text-align:left}
thead th{border-bottom:2px solid var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:600;overflow-wrap:anywhere;min-width:8.5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.1rem;margin:1rem 0;font-size:.92rem}
dt{color:var(--soft)}
dd{margin:0}
.code{margin:.8rem 0}
.code span{display:block;font-size:.85rem;color:var(--soft)}
.code code{display:block;background:var(--card);border-radius:4px;padding:.45rem .6rem;white-space:pre-wrap;
overflow-wrap:anywhere;font:.82rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
figure{margin:1.4rem 0}
figcaption{margin-bottom:.5rem}
figcaption b{display:block}
figcaption span{font-size:.9rem}
details{font-size:.9rem;margin-top:.3rem}
summary{color:var(--accent);cursor:pointer}
svg{display:block;max-width:100%;height:auto}
svg text{fill:var(--ink);font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
svg text{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
svg .name{font-weight:600}
svg .tick,svg .axis{fill:var(--soft)}
svg .number{font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .zero{stroke:var(--ink);stroke-width:1.2}
svg .mark{fill:var(--c);stroke:var(--paper);stroke-width:1}
svg .whisker{stroke:var(--c);stroke-width:2.4;stroke-linecap:round}
svg .stalk{stroke:var(--c);stroke-width:1.4}
svg .curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
svg .ring{fill:none;stroke:var(--c);stroke-width:1.6}
.small{display:none}
main{padding-bottom:3rem}
@media screen and (max-width:800px){
.large{display:none}
.small{display:block}
header{padding-top:1.4rem}
h1{font-size:1.5rem}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:.55rem}
thead{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
table,caption,tbody,tr,th,td{display:block;width:100%}
tbody tr{padding:.55rem 0;border-bottom:1px solid var(--rule)}
tbody th,tbody td{border:0;padding:.1rem 0}
td{display:flex;justify-content:space-between;gap:1rem}
td:empty{display:none}
td::before{content:attr(data-of);color:var(--soft);text-align:left;flex:none;max-width:50%}
table.words td{display:block}
table.words td::before{display:block;max-width:none;font-size:.85em}
}
@media print{
body{font-size:10.5pt}
main,header{max-width:none}
nav,details{display:none}
figure,tr,section.lead{break-inside:avoid}
h2{break-after:avoid}
}
"""


def html_page(document: Document) -> str:
    """Write a document as an HTML page that needs nothing else.

    Args:
        document: The document; markup in its texts is shown, not followed.

    Returns:
        The page. Its policy forbids scripts, frames and all addresses, so that nothing could leave or come in even if a
        text got past the escaping.
    """
    lead, *others = document.sections
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in others)
    body = "".join(
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>{"".join(map(_block, section.blocks))}</section>'
        for section in others
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(document.title)}</title>\n<style>{_colours()}{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(document.title)}</h1><p class="subtitle">{escape(document.subtitle)}</p></header>\n'
        f'<main><section class="lead" id="{lead.name}"><h2>{escape(lead.title)}</h2>'
        f'{"".join(map(_block, lead.blocks))}</section>\n<nav aria-label="Sections">{links}</nav>\n{body}</main>\n'
        "</body>\n</html>\n"
    )


def _shown(text: str) -> str:
    """A text to read: markup as it is written, numbers on one line with what belongs to them."""
    return escape(re.sub(r"(?<=<) (?=[\d.])| (?=%)", "\u00a0", text))


def _colours() -> str:
    def named(colours: dict[str, str]) -> str:
        return "".join(f"--{name}:{colour};" for name, colour in colours.items())

    slots = "".join(f".s{slot}{{--c:var(--s{slot})}}" for slot in range(N_COLOURS))
    # Paper is white whatever the screen is.
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{named(DARK)}}}}}"
    return f":root{{color-scheme:light dark;{named(LIGHT)}}}{dark}{slots}"


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f'<p class="{"note" if block.is_note else "text"}">{_shown(block.text)}</p>'
    if isinstance(block, Code):
        return f'<div class="code"><span>{escape(block.name)}</span><code>{escape(block.text)}</code></div>'
    if isinstance(block, Facts):
        return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{_shown(value)}</dd>' for name, value in block.pairs)}</dl>"
    if isinstance(block, Figure):
        return _figure(block)
    return _table(block, block.caption)


def _figure(figure: Figure) -> str:
    return (
        f"<figure><figcaption><b>{escape(figure.title)}</b> <span>{_shown(figure.description)}</span></figcaption>"
        f'<div class="large">{figure.draw(_WIDE)}</div><div class="small">{figure.draw(_NARROW)}</div>'
        f"<details><summary>The numbers of this figure</summary>{_table(figure.table, '')}</details></figure>"
    )


def _table(table: Table, caption: str) -> str:
    head = "".join(f'<th scope="col">{_shown(name)}</th>' for name in table.header)
    rows = []
    for first, *cells in table.rows:
        named = zip(table.header[1:], cells, strict=True)
        data = "".join(f'<td data-of="{escape(name)}">{_shown(cell)}</td>' for name, cell in named)
        rows.append(f'<tr><th scope="row">{_shown(first)}</th>{data}</tr>')
    kind = "words" if table.is_text else "numbers"
    told = f"<caption>{_shown(caption)}</caption>" if caption else ""
    return f'<table class="{kind}">{told}<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
