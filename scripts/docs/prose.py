"""Docstrings and tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

EQUATION = re.compile(r"^[A-Za-z]\w*(\([^)]*\))?\s*(=|<-)\s")
CONTINUED = re.compile(r"^[-+*/=(]")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
CODE = re.compile(r"``(.+?)``|`([^`]+)`")


def text(plain: str) -> str:
    """A docstring's words as Markdown: code stays code, everything else is literal, arXiv numbers become links."""
    made, end = [], 0
    for found in CODE.finditer(plain):
        made += [_literal(plain[end : found.start()]), code(found[1] or found[2])]
        end = found.end()
    return "".join([*made, _literal(plain[end:])])


def _literal(plain: str) -> str:
    escaped = re.sub(r"([\\*_\[\]|])", r"\\\1", plain.replace("&", "&amp;").replace("<", "&lt;"))
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", escaped)


def code(plain: str) -> str:
    """Literal text in a fixed-width font."""
    return f"`{plain}`"


def docstring(doc: str) -> str:
    """A docstring's paragraphs: lines that define a symbol in a block of their own, lists, and prose."""
    blocks: list[tuple[str, list[str]]] = []
    for line in doc.strip().splitlines():
        stripped, last = line.strip(), blocks[-1] if blocks else ("blank", [""])
        if not stripped:
            blocks.append(("blank", []))
            continue
        kind = _kind(stripped, *last)
        if kind == last[0]:
            last[1].append(stripped)
        else:
            blocks.append((kind, [stripped]))
    return "\n\n".join(_block(kind, lines) for kind, lines in blocks if lines)


def _kind(line: str, before: str, lines: Sequence[str]) -> str:
    if EQUATION.match(line):
        return "equation"
    if line.startswith("- "):
        return "list"
    if before == "list":
        return "list"
    open_ended = before == "equation" and lines[-1][-1] not in ".;:"
    return "equation" if open_ended and CONTINUED.match(line) and "`" not in line else "prose"


def _block(kind: str, lines: Sequence[str]) -> str:
    if kind == "equation":
        body = "\n".join(line.replace("``", "") for line in lines)
        return f"```text\n{body}\n```"
    if kind == "list":
        return "\n".join(f"- {text(line[2:])}" if line.startswith("- ") else f"    {text(line)}" for line in lines)
    return text(" ".join(lines))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in row) + " |" for row in lines)


def anchor(heading: str) -> str:
    """The fragment by which a heading is linked."""
    plain = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)
