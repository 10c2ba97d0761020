"""HTML that cannot be broken by what is put into it: a string becomes text, escaped, unless it is an `Html`.

Only `element`, `join` and `plots.draw` make an `Html`. The page is one file and fetches nothing.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("page.css")
VOID = {"meta"}


class Html(str):
    """Markup that goes onto the page as it is."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Html:
    """One HTML element; `class_` is the attribute `class`, and children that are None are left out.

    Example: element("td", "a < b", class_="n") -> '<td class="n">a &lt; b</td>'
    """
    named = "".join(
        f' {name.rstrip("_")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{named}>" + ("" if tag in VOID else f"{join(children)}</{tag}>"))


def join(children: Sequence[object]) -> Html:
    """Children one after the other, escaped where they are text."""
    parts = [
        child if isinstance(child, Html) else html.escape(str(child))
        for child in children
        if child is not None
    ]
    return Html("".join(parts))


def table(
    head: Sequence[object],
    rows: Sequence[Sequence[object]],
    numeric: Sequence[int] = (),
    bars: Sequence[int] = (),
) -> Html:
    """A table; the columns in `numeric` are right-aligned, those in `bars` take the width that is left."""
    kinds = dict.fromkeys(numeric, "n") | dict.fromkeys(bars, "bars")

    def line(tag: str, row: Sequence[object]) -> Html:
        return element("tr", *[element(tag, cell, class_=kinds.get(i)) for i, cell in enumerate(row)])

    body = [line("td", row) for row in rows]
    return element(
        "div",
        element("table", element("thead", line("th", head)), element("tbody", *body)),
        class_="scroll",
    )


def document(title: str, *children: object) -> str:
    """The whole page."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    return (
        "<!doctype html>\n"
        + element("html", head, element("body", element("main", *children)), lang="en")
        + "\n"
    )


def section(title: str, about: str | None, *children: object) -> Html:
    """A heading, a line about what follows, and what follows."""
    return element("section", element("h2", title), note(about) if about else None, *children)


def note(text: str) -> Html:
    """A line in small, quiet letters."""
    return element("div", text, class_="quiet")


def clipped(text: Any, longest: int = 600) -> str:
    """A text, cut where it is longer than anyone reads."""
    whole = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, indent=1)
    return whole if len(whole) <= longest else f"{whole[:longest]} \u2026"


def plural(count: int, noun: str) -> str:
    """Example: plural(1, "step") -> "1 step"; plural(2, "step") -> "2 steps"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size(count: int | float) -> str:
    """Example: size(2_500_000) -> "2.5 MB"."""
    if count < 1000:
        return f"{count:,.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} TB"


def duration(seconds: int | float) -> str:
    """Example: duration(75) -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
