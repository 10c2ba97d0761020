"""The report's page, section by section in the order they stand on it, made from report.json alone.

Each section is None where its stages have not finished.
"""

from dataclasses import dataclass
from typing import Any, Literal

from megachat.evals.corpus import removals
from megachat.evals.markup import (
    Html,
    clipped,
    document,
    duration,
    element,
    join,
    note,
    plural,
    section,
    size,
    table,
)
from megachat.evals.plots import Line, Plot, draw

Facts = dict[str, Any]
"""The contents of report.json."""


@dataclass(frozen=True, slots=True)
class Measure:
    """How a score is named and written."""

    title: str
    meaning: str
    form: Literal["share", "number", "gain"]
    chance: float | None = None
    """What a model that has learnt nothing, or is no better than the one it is compared with, gets."""

    def write(self, value: int | float) -> str:
        """The value as it is read: a share in percent, a gain with its sign."""
        text = {"share": f"{100 * value:.1f} %", "number": f"{value:.3f}", "gain": f"{value:+.3f}"}[self.form]
        return text.replace("-", "\u2212")


MEASURES = {
    "recall_seen": Measure(
        "Recall, familiar phrasing",
        "SFT's likeliest answers that are the true sentence to the letter",
        "share",
    ),
    "recall_unseen": Measure(
        "Recall, new phrasing",
        "The same functions, asked about in words that no stage was trained on",
        "share",
    ),
    "rm_accuracy": Measure(
        "Reward model's accuracy",
        "Pairs of answers about functions it was not trained on that it puts in the right order",
        "share",
        0.5,
    ),
    "bits_per_byte": Measure(
        "Bits per byte",
        "Base model, on text it was not trained on; lower is better",
        "number",
    ),
    "ppo_win_rate": Measure(
        "PPO against SFT",
        "Questions on which its answer is closer to the true sentence; ties count half",
        "share",
        0.5,
    ),
    "dpo_win_rate": Measure(
        "DPO against SFT",
        "Questions on which its answer is closer to the true sentence; ties count half",
        "share",
        0.5,
    ),
    "ppo_reward_gain": Measure("PPO's gain in reward", "Mean over its answers minus that over SFT's", "gain"),
    "ppo_kl": Measure("PPO's distance from SFT", "KL divergence, nats per answer", "number"),
    "bits_per_byte_sft": Measure("Bits per byte after SFT", "What SFT made it forget of the text", "number"),
    "dpo_reward_gain": Measure("DPO's gain in reward", "Mean over its answers minus that over SFT's", "gain"),
    "dpo_kl": Measure("DPO's distance from SFT", "KL divergence, nats per answer", "number"),
    "ppo_win_rate_by_reward_model": Measure(
        "PPO against SFT, by the reward model",
        "Not proof of quality: pleasing this judge is what it was trained for",
        "share",
        0.5,
    ),
    "dpo_win_rate_by_reward_model": Measure(
        "DPO against SFT, by the reward model",
        "A judge that learnt from the same preferences as DPO",
        "share",
        0.5,
    ),
    "grpo_win_rate": Measure(
        "GRPO against SFT",
        "Questions on which its answer is closer to the true sentence; ties count half",
        "share",
        0.5,
    ),
    "grpo_reward_gain": Measure(
        "GRPO's gain in reward", "Mean over its answers minus that over SFT's", "gain"
    ),
    "grpo_kl": Measure("GRPO's distance from SFT", "KL divergence, nats per answer", "number"),
}
HEADLINES = 8
"""The first so many of `MEASURES` are shown large."""


def page(facts: Facts) -> str:
    """The report as one HTML file."""
    sections = (headline, scores, durations, curves, samples, answers, removals, tokens, settings)
    return document(f"megachat: {facts['run']}", *[section(facts) for section in sections])


def headline(facts: Facts) -> Html:
    """The run's name, and in one sentence what it is."""
    amounts = []
    if "bytes" in facts["clean"]:
        amounts.append(f"{size(facts['clean']['bytes'])} of text")
    if train := facts["encode"].get("train"):
        amounts.append(f"{train['tokens']:,} tokens")
    amounts.append(plural(len(facts["stages"]), "finished stage"))
    took = f" in {duration(facts['seconds'])}" if facts["seconds"] else ""
    over = element("div", "megachat run report", class_="over")
    what = "From raw text to a chat model" if "sft" in facts["stages"] else "Finished"
    lead = element("p", f"{what}{took}: {', '.join(amounts)}.", class_="lead")
    return join([over, element("h1", facts["run"]), lead])


def scores(facts: Facts) -> Html | None:
    """The headline scores as cards, the others in a table."""
    found = facts["evaluation"]
    if not found:
        return None
    large = [name for name in list(MEASURES)[:HEADLINES] if name in found]
    rest = [name for name in MEASURES if name in found and name not in large]
    rows = []
    for name in rest + sorted(set(found) - set(MEASURES)):
        measure, score = measure_of(name), found[name]
        title = join([element("strong", measure.title), note(measure.meaning)])
        rows.append([title, measure.write(score["value"]), interval(measure, score), f"{score['n']:,}"])
    head = ["Score", "Value", "95 % interval", "Items"]
    return section(
        "Scores",
        "Each with its 95 % interval (bootstrap) and the number of items it is the mean of.",
        element("div", *[card(measure_of(name), found[name]) for name in large], class_="grid"),
        table(head, rows, numeric=(1, 2, 3)) if rows else None,
    )


def measure_of(name: str) -> Measure:
    """How to show a score, also one that this file has not heard of."""
    if name.startswith("rm_accuracy_"):
        kind = name.removeprefix("rm_accuracy_")
        return Measure(f"Reward model, {kind}", f"The pairs whose worse answer is {kind}", "share", 0.5)
    return MEASURES.get(name) or Measure(name.replace("_", " "), "", "number")


def card(measure: Measure, score: Facts) -> Html:
    """One score, large, with its interval drawn where the scale has two ends."""
    strip = None
    if measure.form == "share":
        low, high, value = (100 * score[key] for key in ("low", "high", "value"))
        marks = [element("span", class_="interval", style=f"left:{low:.2f}%;width:{high - low:.2f}%")]
        if measure.chance is not None:
            left = f"left:{100 * measure.chance:g}%"
            marks.append(element("span", class_="chance", style=left, title="no better than chance"))
        marks.append(element("span", class_="point", style=f"left:{value:.2f}%"))
        strip = element("div", *marks, class_="strip")
    return element(
        "div",
        element("div", measure.title, class_="name"),
        element("div", measure.write(score["value"]), class_="big"),
        strip,
        note(f"{interval(measure, score)}, n = {score['n']:,}"),
        note(f"{measure.meaning}."),
        class_="card",
    )


def interval(measure: Measure, score: Facts) -> str:
    """The interval as text."""
    low, high = measure.write(score["low"]), measure.write(score["high"])
    return f"{low.removesuffix(' %')} to {high}"


def durations(facts: Facts) -> Html | None:
    """How long each stage took when it last ran."""
    if not facts["stages"]:
        return None
    longest = max(stage["seconds"] for stage in facts["stages"].values()) or 1.0
    rows: list[list[object]] = []
    for name, stage in facts["stages"].items():
        bar = element("div", class_="bar", style=f"width:{100 * stage['seconds'] / longest:.2f}%")
        rows.append([element("code", name), duration(stage["seconds"]), bar])
    rows.append([element("strong", "total"), element("strong", duration(facts["seconds"])), ""])
    return section(
        "Time",
        "Of the real execution: a stage that was skipped because nothing had changed keeps its time.",
        table(["Stage", "Time", ""], rows, numeric=(1,), bars=(2,)),
    )


def curves(facts: Facts) -> Html | None:
    """What each stage logged, drawn."""
    parts = []
    for stage, told in facts["training"].items():
        drawn = []
        for name, curve in told["curves"].items():
            plot = Plot(curve["title"], curve["unit"], [Line(**line) for line in curve["lines"]])
            svg = draw(plot, f"{stage}-{name.replace('/', '-')}")
            drawn.append(element("figure", svg, class_="card"))
        parts.append(element("h3", element("code", stage), f", {plural(told['last']['step'], 'step')}"))
        parts.append(element("div", *drawn, class_="grid wide"))
    return section("Training", None, *parts) if parts else None


def samples(facts: Facts) -> Html | None:
    """A small dialogue with each stage's model, all asked the same."""
    if not facts["samples"]:
        return None
    cards = []
    for dialogue in facts["samples"]:
        turns: list[Html] = []
        for turn in dialogue["turns"]:
            said = turn["text"].strip()
            kind = turn["role"] if said else f"{turn['role']} empty"
            turns.append(element("div", said or "(nothing)", class_=f"turn {kind}"))
            if truth := turn.get("truth", "").strip():
                verdict, kind = (
                    ("\u2713 the true sentence", "right") if said == truth else (f"\u2717 {truth}", "wrong")
                )
                turns.append(element("div", verdict, class_=f"verdict {kind}"))
        title = element("h3", element("code", dialogue["stage"]))
        cards.append(element("div", title, element("div", *turns, class_="chat"), class_="card"))
    return section(
        "Samples",
        "The likeliest answer of each model to the same questions; the base model continues a text.",
        element("div", *cards, class_="grid wide"),
    )


def answers(facts: Facts) -> Html | None:
    """What the stages that sample answered last, and what each answer was worth."""
    if not facts["answers"]:
        return None
    parts: list[Html] = []
    for stage, rows in facts["answers"].items():
        worth = [name for name in rows[0] if name.split("/")[0] == "reward"]
        lines = [
            [*(clipped(row[name], 300) for name in ("prompt", "answer", "truth")), f"{row['tokens']:,}"]
            + [f"{row.get(name, 0.0):.3g}" for name in worth]
            for row in rows
        ]
        parts.append(element("h3", element("code", stage), f", step {rows[0]['step']:,}"))
        head = ["Prompt", "Answer", "Truth", "Tokens", *worth]
        parts.append(table(head, lines, numeric=tuple(range(3, len(head)))))
    return section("Answers", "Sampled while training; answers.jsonl of the stage holds more.", *parts)


def tokens(facts: Facts) -> Html | None:
    """The tokenizer and the token shards, in numbers."""
    tokenizer, shards = facts["tokenizer"], facts["encode"]
    tables = []
    if tokenizer:
        rows = [
            ["Vocabulary", f"{tokenizer['vocab']:,}"],
            ["Texts that came back as they went in", f"{tokenizer['round_trips']:,}"],
            ["Sample it was learnt from", size(tokenizer["sample"]["bytes"])],
            ["Fingerprint", tokenizer["sha256"][:12]],
        ]
        tables.append(table(["Tokenizer", ""], rows, numeric=(1,)))
        tables.append(fertility(tokenizer))
    if shards:
        splits = [(split, shards[split]) for split in ("train", "validation")]
        rows = [
            [split, f"{of['documents']:,}", f"{of['tokens']:,}", size(of["bytes"])] for split, of in splits
        ]
        tables.append(table(["Shard", "Documents", "Tokens", "Bytes"], rows, numeric=(1, 2, 3)))
    return section("Tokens", None, element("div", *tables, class_="grid half")) if tables else None


def fertility(tokenizer: Facts) -> Html:
    """How much text of each language a token holds."""
    characters = tokenizer.get("characters_per_token", {})
    most = max(tokenizer["bytes_per_token"].values(), default=0.0) or 1.0
    rows: list[list[object]] = []
    for name, rate in tokenizer["bytes_per_token"].items():
        bar = element("div", class_="bar", style=f"width:{100 * rate / most:.2f}%")
        counted = f"{characters[name]:.2f}" if name in characters else ""
        rows.append([name, f"{rate:.2f}", counted, bar])
    head = ["Language", "Bytes per token", "Characters" if characters else "", ""]
    return table(head, rows, numeric=(1, 2), bars=(3,))


def settings(facts: Facts) -> Html:
    """Versions, and every stage's settings as they were composed."""
    composed = []
    for stage, config in facts["configs"].items():
        composed.append(
            element("details", element("summary", element("code", stage)), element("pre", config))
        )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return section(
        "Settings and versions",
        None,
        *composed,
        note(f"Written {facts['written']} with {versions}. Every number of this page is in report.json."),
    )
