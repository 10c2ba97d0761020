"""The report's section on data: what cleaning removed and why, what it took for copies, what is left, and the
tokens it became.

Made from `clean/report.json`, of which any part may be missing, and from what `encode` tells: what is missing
is not shown.
"""

from collections import Counter
from typing import Any

from megachat.evals.markup import Html, clipped, element, join, note, plural, section, size, table

Facts = dict[str, Any]

LISTED = 200
"""Lines of a table that can have any number; report.json has them all."""


def removals(facts: Facts) -> Html | None:
    """All that is told of the data."""
    clean, shards, encoding = (facts.get(name, {}) for name in ("clean", "encode", "encoding"))
    if not (clean or shards.get("shards")):
        return None
    about = None
    if "documents" in clean:
        about = f"Cleaning kept {clean['documents']:,} documents, {size(clean.get('bytes', 0))}."
    parts = (steps, funnel, kept, lengths, clusters, hot_buckets, contamination, quarantine)
    return section("Data", about, *[part(clean) for part in parts], tokens(shards), encoders(encoding))


def steps(clean: Facts) -> Html | None:
    """What each step removed, with examples."""
    if not clean.get("rows"):
        return None
    rows = []
    for row in clean["rows"]:
        examples = [element("pre", clipped(example)) for example in row.get("examples", ())]
        summary = element("summary", plural(len(examples), "example"))
        shown = element("details", summary, *examples) if examples else None
        title = join([element("strong", row["step"]), note(row.get("reason", "")), shown])
        rows.append([title, *counts(row), size(row.get("bytes_removed", 0))])
    head = ["Step", "Documents in", "Removed", "Share", "Bytes removed"]
    return join([element("h3", "What each step removed"), table(head, rows, numeric=(1, 2, 3, 4))])


def counts(row: Facts) -> list[str]:
    """Documents that came, those removed, and their share."""
    came, removed = row.get("documents_in", 0), row.get("documents_removed", 0)
    return [f"{came:,}", f"{removed:,}", f"{100 * removed / max(came, 1):.1f} %"]


def funnel(clean: Facts) -> Html | None:
    """How many documents were left after each step, drawn: of the whole corpus, and of each source."""
    entries = clean.get("funnel")
    if not entries:
        return None
    sources: dict[str, list[Facts]] = {}
    whole: dict[str, Counter[str]] = {}
    for entry in entries:
        sources.setdefault(entry["source"], []).append(entry)
        numbers = {name: value for name, value in entry.items() if name not in ("step", "source")}
        whole.setdefault(entry["step"], Counter()).update(numbers)
    lost = {name: sum(row.get("documents_removed", 0) for row in rows) for name, rows in sources.items()}
    rows, folded = [], []
    for name, of in sorted(sources.items(), key=lambda item: -share(lost[item[0]], first(item[1]))):
        bar = stacked(first(of) - lost[name], lost[name], first(of))
        counted = {"documents_in": first(of), "documents_removed": lost[name]}
        rows.append([name, *counts(counted), bar])
        folded.append(element("details", element("summary", name, ", step by step"), narrowing(of)))
    total = [{"step": step, **numbers} for step, numbers in whole.items()]
    by_source = [
        element("h3", "By source"),
        note("Those that lost the largest share come first."),
        table(["Source", "Documents in", "Removed", "Share", ""], rows, numeric=(1, 2, 3), bars=(4,)),
        *folded,
    ]
    return join(
        [
            element("h3", "Funnel"),
            note("Documents that came to each step: those that stayed, and those removed."),
            narrowing(total),
            *(by_source if len(sources) > 1 else []),
        ]
    )


def narrowing(rows: list[Facts]) -> Html:
    """The steps of a funnel, each with a bar; the widest is what came first."""
    drawn = []
    for row in rows:
        removed = row.get("documents_removed", 0)
        bar = stacked(row.get("documents_in", 0) - removed, removed, first(rows))
        drawn.append([row["step"], *counts(row), size(row.get("bytes_removed", 0)), bar])
    head = ["Step", "Documents in", "Removed", "Share", "Bytes removed", ""]
    return table(head, drawn, numeric=(1, 2, 3, 4), bars=(5,))


def first(rows: list[Facts]) -> int:
    """The documents that came to a funnel."""
    return max(row.get("documents_in", 0) for row in rows)


def share(part: int | float, whole: int | float) -> float:
    """A part of a whole that may be nothing."""
    return part / whole if whole else 0.0


def stacked(stayed: int, removed: int, whole: int) -> Html:
    """A bar of those that stayed and those removed."""
    return element(
        "div",
        element("div", class_="stayed", style=f"width:{100 * share(stayed, whole):.2f}%"),
        element("div", class_="removed", style=f"width:{100 * share(removed, whole):.2f}%"),
        class_="funnel",
    )


def kept(clean: Facts) -> Html | None:
    """The languages and the sources of what was kept."""
    tables = []
    for group in ("languages", "sources"):
        if not clean.get(group):
            continue
        most = max(of["bytes"] for of in clean[group].values())
        rows = [
            [
                name,
                f"{of['documents']:,}",
                size(of["bytes"]),
                element("div", class_="bar", style=f"width:{100 * share(of['bytes'], most):.2f}%"),
            ]
            for name, of in clean[group].items()
        ]
        head = [group.capitalize(), "Documents", "Bytes", ""]
        tables.append(table(head, rows, numeric=(1, 2), bars=(3,)))
    if not tables:
        return None
    return join([element("h3", "What was kept"), element("div", *tables, class_="grid half")])


def lengths(clean: Facts) -> Html | None:
    """How long the documents of each language are."""
    found = {name: of for name, of in clean.get("lengths", {}).items() if any(of["counts"])}
    if not found:
        return None
    cards = [
        element(
            "figure",
            element("figcaption", element("strong", name), f", {plural(sum(of['counts']), 'document')}"),
            histogram(of["edges"], of["counts"]),
            class_="card",
        )
        for name, of in found.items()
    ]
    about = note("Documents by their bytes; the pointer on a bar shows its numbers.")
    return join([element("h3", "Lengths"), about, element("div", *cards, class_="grid wide")])


def histogram(edges: list[int] | list[float], counts: list[int]) -> Html:
    """Bars of one width each, in a picture 300 by 110 units: the edges of lengths grow by factors."""
    width, highest = 300 / len(counts), max(counts)
    bars = []
    for number, count in enumerate(counts):
        height = 80 * count / highest
        between = f"{size(edges[number])} to {size(edges[number + 1])}: {plural(count, 'document')}"
        place = {"x": f"{number * width:.2f}", "y": f"{90 - height:.2f}"}
        extent = {"width": f"{0.9 * width:.2f}", "height": f"{height:.2f}"}
        bars.append(element("rect", element("title", between), **place, **extent, class_="column"))
    marks = [
        element("text", size(edges[edge]), x=f"{edge * width:.2f}", y="104", class_=anchor)
        for edge, anchor in ((0, "start"), (len(counts) // 2, "middle"), (len(counts), "end"))
    ]
    return element("svg", *bars, *marks, class_="histogram", viewBox="0 0 300 110", role="img")


def clusters(clean: Facts) -> Html | None:
    """The largest groups of copies: the one that stays, and some of those removed."""
    if not clean.get("clusters"):
        return None
    shown = []
    for cluster in clean["clusters"]:
        summary = element("strong", plural(cluster["size"], "document"))
        stays = cluster.get("kept")
        inside = [sample(f"kept: {stays['id']} of {stays['source']}", stays["text"])] if stays else []
        for copy in cluster.get("samples", ()):
            agreed = f", {100 * copy['agreement']:.0f} % alike" if "agreement" in copy else ""
            inside.append(sample(f"removed: {copy['id']}{agreed}", copy.get("text", "")))
        shown.append(element("details", element("summary", summary), *inside))
    about = "Of each the document that stays, and some of the copies removed in its favour."
    if pairs := clean.get("pairs"):
        about += (
            f" {pairs['alike']:,} of the {plural(pairs['compared'], 'pair')} that share a band are alike."
        )
    return join([element("h3", "Largest clusters of copies"), note(about), *shown])


def sample(title: str, text: str) -> Html:
    """A text under its name."""
    return join([note(title), element("pre", clipped(text), class_="text")])


def hot_buckets(clean: Facts) -> Html | None:
    """Bands that so many documents share that they say nothing."""
    rows = [
        [of.get("band", ""), f"{of['documents']:,}", sample(of["sample"]["id"], of["sample"]["text"])]
        for of in clean.get("hot_buckets", ())
    ]
    return listed(
        "Hot buckets",
        "Too many documents share these bands; they were not joined, so that boilerplate merges nothing.",
        ["Band", "Documents", "One of them"],
        rows,
        numeric=(0, 1),
    )


def contamination(clean: Facts) -> Html | None:
    """Documents that hold what a benchmark asks."""
    rows = [
        [
            of["benchmark"],
            of.get("item", ""),
            f"{100 * of['share']:.0f} %" if "share" in of else "",
            of.get("document", ""),
            element("pre", clipped(of.get("ngram", ""))),
        ]
        for of in clean.get("contamination", ())
    ]
    found = [f"{name}: {plural(count, 'document')}" for name, count in clean.get("contaminated", {}).items()]
    return listed(
        "Contamination",
        "Items of benchmarks found in the corpus, with the share of their n-grams that is there; the largest "
        f"shares. Something of {'; '.join(found) or 'a benchmark: no document'}.",
        ["Benchmark", "Item", "Share", "Document", "For example"],
        rows,
        numeric=(2,),
    )


def quarantine(clean: Facts) -> Html | None:
    """Input that could not be read."""
    found = clean.get("quarantine", {})
    if not found.get("count"):
        return None
    rows = [[of["place"], clipped(of.get("why", ""))] for of in found.get("first", ())]
    about = f"{plural(found['count'], 'piece')} of the input could not be used and was set aside."
    return listed("Quarantine", about, ["Place", "Why"], rows, always=True)


def tokens(shards: Facts) -> Html | None:
    """The tokens of each source."""
    sources: dict[str, Counter[str]] = {}
    for entry in shards.get("shards", {}).values():
        own = sources.setdefault(entry["source"], Counter())
        own.update({unit: entry[unit] for unit in ("documents", "bytes", "tokens")})
        own[entry["split"]] += entry["tokens"]
    most = max((of["tokens"] for of in sources.values()), default=0)
    rows: list[list[object]] = []
    for name, of in sources.items():
        bar = element("div", class_="bar", style=f"width:{100 * share(of['tokens'], most):.2f}%")
        told = [f"{of[unit]:,}" for unit in ("documents", "tokens", "validation")]
        rows.append([name, *told, f"{share(of['bytes'], of['tokens']):.2f}", bar])
    if not rows:
        return None
    head = ["Source", "Documents", "Tokens", "For validation", "Bytes per token", ""]
    return join([element("h3", "Tokens by source"), table(head, rows, numeric=(1, 2, 3, 4), bars=(5,))])


def encoders(encoding: Facts) -> Html | None:
    """Who encoded the text, and where gigatoken was not trusted."""
    files = encoding.get("encoders", {})
    if not files:
        return None
    by = ", ".join(f"{name} {plural(count, 'file')} of text" for name, count in files.items())
    both = f"; {plural(encoding['compared'], 'document')} by both" if encoding.get("compared") else ""
    rows: list[list[object]] = [[clipped(mistake)] for mistake in encoding.get("mistakes", ())]
    about = "These files of text were encoded by sentencepiece, for gigatoken was wrong."
    return join([note(f"Encoded by {by}{both}."), listed("Encoder fallbacks", about, ["Why"], rows)])


def listed(
    title: str,
    about: str,
    head: list[str],
    rows: list[list[object]],
    numeric: tuple[int, ...] = (),
    always: bool = False,
) -> Html | None:
    """A table of at most `LISTED` lines, folded if it is long; nothing, if it has no line."""
    if not rows and not always:
        return None
    shown = table(head, rows[:LISTED], numeric=numeric) if rows else None
    if len(rows) > 10:
        cut = f"the first {LISTED} of " if len(rows) > LISTED else ""
        shown = element("details", element("summary", f"{cut}{plural(len(rows), 'line')}"), shown)
    return join([element("h3", title), note(about), shown])
