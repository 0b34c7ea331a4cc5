"""Render blocks as one HTML file without server, script or font, readable on a phone, in dark mode and in print."""

import re
from collections.abc import Mapping, Sequence
from html import escape as _escape

from udrl.evaluate.report.blocks import (
    Block,
    Bullets,
    Code,
    Details,
    Heading,
    Paragraph,
    Plot,
    Span,
    Table,
    Text,
    pieces,
    plain,
)
from udrl.evaluate.report.markdown import NOTHING

# The page may load nothing and run nothing, even if a prompt in it holds markup; style attributes are those of the plots.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

LONG = 40  # characters of a cell that may wrap; shorter ones stay on one line

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbf9; --card: #fff; --ink: #1d1d20; --soft: #5d5d66; --line: #d9d9de;
  --head: #f0f0ec; --link: #2b4fc4; --good: #17653a; --bad: #a8211a; --open: #75550a; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #141416; --card: #1d1d21; --ink: #ececf0; --soft: #a6a6b1; --line: #3a3a42; --head: #26262b;
    --link: #9db2ff; --good: #7fd6a4; --bad: #ff9b93; --open: #f0c674; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
.page { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
.page > * { min-width: 0; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.6rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p, ul { max-width: 48rem; }
p { margin: .6rem 0; }
li { margin: .3rem 0; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
nav { font-size: .92rem; margin: 1.4rem 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); }
nav ol { margin: 0; padding: 0; list-style: none; columns: 13rem; }
nav li { margin: 0; padding: .15rem 0; break-inside: avoid; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; border: 1px solid var(--line); background: var(--card);
  max-width: 100%; width: fit-content; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .7rem; color: var(--soft); }
caption span { display: block; position: sticky; left: .7rem; width: fit-content; max-width: min(70rem, 100vw - 4rem); }
th, td { padding: .3rem .55rem; text-align: right; vertical-align: top; white-space: nowrap; border-top: 1px solid var(--line);
  unicode-bidi: isolate; }
thead th { background: var(--head); vertical-align: bottom; white-space: normal; font-weight: 600; }
.whole { white-space: nowrap; }
.pinned th:first-child { position: sticky; left: 0; background: var(--card); }
.pinned thead th:first-child { background: var(--head); }
tbody th { font-weight: 400; }
.word { text-align: left; }
.long { white-space: normal; min-width: 14rem; max-width: 32rem; }
.prose td { min-width: 11rem; white-space: normal; }
code, pre { font: .88em/1.5 ui-monospace, monospace; }
h3 code { font-weight: 700; font-size: 1em; }
pre { overflow-x: auto; padding: .8rem 1rem; margin: .8rem 0; background: var(--card); border: 1px solid var(--line); }
figure { margin: 1rem 0 1.6rem; }
figure > div { background: #fff; border: 1px solid var(--line); padding: .6rem; overflow-x: auto;
  max-width: 100%; width: fit-content; }
figure svg { display: block; height: auto; max-width: 100%; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .4rem; max-width: 48rem; }
@media (max-width: 40rem) { figure svg { min-width: 34rem; } }
details { margin: 1rem 0; border: 1px solid var(--line); padding: .5rem 1rem; background: var(--card); }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; }
.soft { color: var(--soft); }
.good, .bad, .open { font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
@media (min-width: 75rem) {
  .page { display: grid; grid-template-columns: 12rem minmax(0, 1fr); gap: 0 2rem; max-width: 92rem; }
  header { grid-column: 2; }
  nav { grid-row: 1 / span 2; grid-column: 1; align-self: start; margin: 0;
    position: sticky; top: 1rem; max-height: 96vh; overflow-y: auto; }
  nav ol { columns: auto; }
}
@media print {
  nav { display: none; } .scroll { overflow: visible; border: 0; }
  h2, h3 { break-after: avoid; } figure { break-inside: avoid; }
}
""".strip()


def render_html(blocks: Sequence[Block], plots: Mapping[str, str]) -> str:
    """Return the blocks as a whole page. ``plots``: name -> SVG; a plot block without its SVG is left out."""
    names = _anchors(blocks)
    title = next((plain(block.text) for block in blocks if isinstance(block, Heading)), "Report")
    first = next((i for i, block in enumerate(blocks) if id(block) in names), len(blocks))
    contents = "\n".join(
        f'<li><a href="#{names[id(block)]}">{escape_html(plain(block.text))}</a></li>'
        for block in blocks
        if isinstance(block, Heading) and id(block) in names
    )
    body, opened = [], False
    for block in blocks[first:]:
        if id(block) in names:
            body += ["</section>"] * opened
            body.append(f'<section aria-labeledby="{names[id(block)]}">')
            opened = True
        body.append(_block(block, plots, names))
    body += ["</section>"] * opened
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape_html(title)}</title>",
            '<link rel="icon" href="data:,">',
            f"<style>\n{STYLE}\n</style>",
            "</head>",
            '<body><div class="page">',
            "<header>",
            *(_block(block, plots, names) for block in blocks[:first]),
            "</header>",
            f'<nav aria-label="Contents"><ol>\n{contents}\n</ol></nav>',
            "<main>",
            *body,
            "</main>",
            "</div></body>",
            "</html>",
            "",
        ]
    )


def escape_html(text: object) -> str:
    """Escape a text; control characters, which HTML must not hold, become the replacement character."""
    return _escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", str(text)))


def inline_html(text: Text) -> str:
    """Return a text, escaped, with its spans marked."""
    return "".join(_piece(piece) for piece in pieces(text))


def _piece(piece: str | Span) -> str:
    if isinstance(piece, str):
        return escape_html(piece)
    text = escape_html(piece.text)
    match piece.style:
        case "code" | "strong":
            return f"<{piece.style}>{text}</{piece.style}>"
        case _:
            return f'<span class="{piece.style}">{text}</span>'


def _anchors(blocks: Sequence[Block]) -> dict[int, str]:
    """Return the ids of the sections' headings by the identity of the block: two headings may have the same text."""
    names: dict[int, str] = {}
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            slug = re.sub(r"[^a-z0-9]+", "-", plain(block.text).lower()).strip("-") or "section"
            names[id(block)] = slug if slug not in names.values() else f"{slug}-{len(names)}"
    return names


def _block(block: Block, plots: Mapping[str, str], names: Mapping[int, str]) -> str:
    match block:
        case Heading(level, text):
            anchor = f' id="{names[id(block)]}"' if id(block) in names else ""
            return f"<h{level}{anchor}>{inline_html(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{inline_html(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{inline_html(item)}</li>" for item in items) + "\n</ul>"
        case Table():
            return _table(block)
        case Plot(name, read, alt):
            return _figure(plots[name], read, alt) if name in plots else ""
        case Code(text):
            return f"<pre><code>{escape_html(text.strip())}</code></pre>"
        case Details(summary, inner):
            content = "\n".join(_block(one, plots, names) for one in inner)
            return f"<details>\n<summary>{escape_html(summary)}</summary>\n{content}\n</details>"


def _table(block: Table) -> str:
    if not block.lines:
        return f'<p class="soft">{NOTHING}</p>'
    words = [block.prose or i < block.left for i in range(len(block.heads))]
    heads = "".join(_header_cell(head, word) for head, word in zip(block.heads, words, strict=True))
    rows = []
    for line in block.lines:
        row = _cell('th scope="row"', line[0], True)
        row += "".join(_cell("td", cell, word) for cell, word in zip(line[1:], words[1:], strict=True))
        rows.append(f"<tr>{row}</tr>")
    caption = f"<caption><span>{escape_html(block.caption)}</span></caption>\n" if block.caption else ""
    label = escape_html(block.caption or ", ".join(filter(None, block.heads)))
    # A narrow first column stays visible while the rest scrolls.
    pinned = all(len(plain(line[0])) <= LONG // 2 for line in block.lines)
    names = " ".join(["prose"] * block.prose + ["pinned"] * pinned)
    # A box that scrolls must be reachable by keyboard, and then it needs a name.
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table class="{names}">\n{caption}'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table></div>"
    )


def _header_cell(head: str, word: bool) -> str:
    """Return a column's head, which wraps only between words, not at a hyphen."""
    text = re.sub(r"\S+-\S+", r'<span class="whole">\g<0></span>', escape_html(head))
    return f'<th scope="col" class="word">{text}</th>' if word else f'<th scope="col">{text}</th>'


def _cell(tag: str, text: Text, word: bool) -> str:
    """Return one cell: words are aligned left, numbers right."""
    names = ["word"] * word + ["long"] * (len(plain(text)) > LONG)
    looks = f' class="{" ".join(names)}"' if names else ""
    return f"<{tag}{looks}>{inline_html(text)}</{tag.split()[0]}>"


def _figure(svg: str, read: str, alt: str) -> str:
    labeled = svg.replace("<svg ", f'<svg role="img" aria-label="{escape_html(alt)}" ', 1)
    return f"<figure>\n<div>{labeled}</div>\n<figcaption>{escape_html(read)}</figcaption>\n</figure>"
