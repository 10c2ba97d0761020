"""Questions about Python's standard library: the embedded set for fine-tuning, preferences and evaluation.

"What does math.gcd do?" is answered by the first sentence of its documentation. So every answer is true, can
be checked to the letter, and stands in the corpus the model was pretrained on. Two things are kept apart:
- functions: a share of them, `held_out`, is never trained on, not even as somebody else's wrong answer;
- phrasings: those in `HELD_OUT` are never trained on: what is asked with them was not learnt by heart;
  those in `PRACTICE` only in alignment.
Which functions are held out follows from their names alone, so sets made with other settings agree on it.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from megachat.data.conversations import (
    Conversation,
    Conversations,
    Message,
    Preference,
    Preferences,
    Prompt,
    Prompts,
    Split,
    answered,
    ask,
    share,
)
from megachat.data.harvest import Entry, entries

SEEN = (
    "What does {name} do?",
    "What is {name} for?",
    "what does {name} do",
    "what is {name}",
    "Explain {name}.",
    "Explain {name} in one sentence.",
    "Describe {name}.",
    "Tell me what {name} is for.",
    "What is the purpose of {name}?",
    "In Python, what does {name} do?",
    "Can you tell me what {name} does?",
    "Please describe {name}.",
    "What does the documentation say about {name}?",
    "Summarise {name}.",
    "What is `{name}` for?",
    "What does `{name}` do?",
    "I do not know {name}. What does it do?",
    "{name}?",
    "{name} 是做什么的？",
    "{name} 有什么用？",
    "请解释一下 {name}。",
    "{name} 是什么？",
    "介绍一下 {name}",
)
"""Ways of asking that fine-tuning uses."""

PRACTICE = (
    "What is the use of {name}?",
    "How would you describe {name}?",
    "In Python, what is {name}?",
    "Could you explain {name}?",
    "Please explain what {name} does.",
    "I found {name} in some code. What is it?",
    "Give me a short description of {name}.",
    "Why would I use {name}?",
    "Describe {name} briefly.",
    "Tell me about {name}.",
    "请问 {name} 的作用是什么？",
    "用一句话说明 {name}。",
)
"""Ways of asking that only preferences and prompts use, beside `SEEN`: what alignment adds to fine-tuning."""

HELD_OUT = (
    "Do you know what {name} does?",
    "What can I do with {name}?",
    "Would you tell me the purpose of {name}?",
    "Remind me what {name} is for.",
    "My colleague uses {name}. What does that do?",
    "Help me understand {name}.",
    "你知道 {name} 是做什么用的吗？",
    "{name} 的用途是什么？",
    "我想了解 {name}。",
)
"""Ways of asking that only evaluation uses."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
Variants = Annotated[int, Field(ge=1, le=len(SEEN) + len(PRACTICE))]

KINDS = ("other", "truncated", "spliced", "other", "garbled", "spliced")
"""What is wrong with a rejected answer, in turn: true of something else, cut short, half of it true of
something else, its words out of order. The first and the third show only beside the question, and are what a
chat model gets wrong.
"""
FLAWS = ("truncated", "garbled")
"""The kinds that show in the answer alone."""

SMALL_TALK = (
    ("Hello", "Hello! Ask me about the Python standard library."),
    ("Hi!", "Hello! Ask me about the Python standard library."),
    ("Who are you?", "I am a small language model that was trained from scratch by megachat."),
    ("What can you do?", "I can tell you what functions of the Python standard library do."),
    ("Help", "I can tell you what functions of the Python standard library do."),
    ("Thank you", "You are welcome."),
    ("Goodbye", "Goodbye!"),
    ("你好", "你好！请问我 Python 标准库的问题。"),
    ("你是谁？", "我是 megachat 从头训练的小模型。"),
    ("谢谢", "不客气。"),
)
"""What people type first, which the library's documentation has no answer to."""


class PythonConversations(Conversations):
    """Questions about functions of the standard library with their answers, and a little small talk."""

    modules: list[str]
    """Only functions of these modules and what lies in them; empty for the whole library."""
    functions: PositiveInt
    """How many functions, classes and methods to ask about, the held-out ones among them."""
    held_out: Fraction
    """The share of functions never trained on."""
    variants: Annotated[int, Field(ge=1, le=len(SEEN))]
    """Ways of asking about each function."""
    follow_ups: Fraction
    """The share of conversations that go on with a second question, about another function."""
    small_talk: NonNegativeInt
    """How often each greeting comes up."""
    seed: NonNegativeInt
    """Decides how each question is asked; the data's own, not the stage's."""

    def conversations(self) -> list[Conversation]:
        """One per function and way of asking, the small talk among them."""
        chosen, _ = split_entries(self.modules, self.functions, self.held_out)
        made = [Conversation((*ask(said), Message("assistant", reply))) for said, reply in SMALL_TALK]
        made *= self.small_talk
        for entry in chosen:
            dice = random.Random(f"{self.seed} conversations {entry.name}")
            for phrasing in in_order(SEEN, self.seed, "conversations", entry)[: self.variants]:
                conversation = answered(ask(question(phrasing, entry)), entry.sentence)
                if dice.random() < self.follow_ups:
                    after = dice.choice(chosen)
                    prompt = (*conversation.messages, *ask(question(dice.choice(SEEN), after)))
                    conversation = answered(prompt, after.sentence)
                made.append(conversation)
        random.Random(self.seed).shuffle(made)
        return made


class PythonPreferences(Preferences):
    """The true sentence is preferred to another function's, a mixture of both, one cut short, one garbled."""

    modules: list[str]
    """Only functions of these modules and what lies in them; empty for the whole library."""
    functions: PositiveInt
    """How many functions, classes and methods to ask about, the held-out ones among them."""
    held_out: Fraction
    """The share of functions never trained on: their preferences show what a reward model has learnt."""
    variants: Variants
    """Preferences per function; 6 give each kind, and those that show only beside the question twice."""
    further: NonNegativeInt
    """More functions, asked about to show flaws alone: what is wrong in itself is learnt from many answers,
    whose answer it is from few that come often."""
    further_variants: Variants
    """Preferences for each of those."""
    seed: NonNegativeInt
    """Decides how each question is asked and how each answer is spoilt; the data's own, not the stage's."""

    def preferences(self, split: Split) -> list[Preference]:
        """One per function and way of asking; both splits use `SEEN` and `PRACTICE` phrasings."""
        often = self._entries(self.functions, split)
        chosen = self._entries(self.functions + self.further, split)
        # Wrong answers are of the same split: used in training, a held-out sentence would be learnt as bad.
        # And they are right answers elsewhere: one that never is would be known without its question.
        spoiler = Spoiler(often)
        made = []
        for entry in chosen:
            kinds, variants = (KINDS, self.variants) if entry in often else (FLAWS, self.further_variants)
            dice = random.Random(f"{self.seed} preferences {entry.name}")
            turn = dice.randrange(len(kinds))
            phrasings = in_order(SEEN + PRACTICE, self.seed, "preferences", entry)
            for i, phrasing in enumerate(phrasings[:variants]):
                kind = kinds[(turn + i) % len(kinds)]
                rejected = spoiler.spoil(entry, kind, dice)
                made.append(Preference(ask(question(phrasing, entry)), entry.sentence, rejected, kind))
        random.Random(self.seed).shuffle(made)
        return made

    def _entries(self, functions: int, split: Split) -> list[Entry]:
        train, held_out = split_entries(self.modules, functions, self.held_out)
        return train if split == "train" else held_out


class PythonPrompts(Prompts):
    """Questions for the model to answer, with the true answers."""

    modules: list[str]
    """Only functions of these modules and what lies in them; empty for the whole library."""
    functions: PositiveInt
    """How many functions, classes and methods to ask about, the held-out ones among them."""
    held_out: Fraction
    """The share of functions never trained on."""
    variants: Annotated[int, Field(ge=1, le=len(PRACTICE))]
    """Ways of asking about each function."""
    seed: NonNegativeInt
    """Decides how each question is asked. `seen` asks what the conversations of the same seed ask."""

    def prompts(self, split: Split) -> list[Prompt]:
        """Functions of the split, in `PRACTICE` phrasings: in others, fine-tuning has taught the answers."""
        train, held_out = split_entries(self.modules, self.functions, self.held_out)
        chosen = train if split == "train" else held_out
        return self._asked(chosen, PRACTICE, "prompts", self.variants)

    def seen(self, count: int) -> list[Prompt]:
        """For evaluation: questions that `PythonConversations` of the same settings holds, a function each.

        Fewer than `count` if there are fewer functions.
        """
        train, _ = split_entries(self.modules, self.functions, self.held_out)
        return self._asked(train, SEEN, "conversations", 1)[:count]

    def unseen(self, count: int) -> list[Prompt]:
        """For evaluation: the same functions as `seen`, asked about in `HELD_OUT` phrasings.

        Where `count` is more than the functions, again in other words.
        """
        train, _ = split_entries(self.modules, self.functions, self.held_out)
        return self._asked(train, HELD_OUT, "evaluation", len(HELD_OUT))[:count]

    def _asked(
        self, chosen: Sequence[Entry], phrasings: Sequence[str], purpose: str, each: int
    ) -> list[Prompt]:
        """Every entry once in an order of the seed's own, then every entry in other words, and so on."""
        asked = {entry.name: in_order(phrasings, self.seed, purpose, entry) for entry in chosen}
        return [
            Prompt(ask(question(phrasing, entry)), entry.sentence, language(phrasing))
            for turn in range(each)
            for entry in random.Random(f"{self.seed} {turn}").sample(chosen, len(chosen))
            for phrasing in [asked[entry.name][turn]]
        ]


def split_entries(modules: Sequence[str], functions: int, held_out: float) -> tuple[list[Entry], list[Entry]]:
    """The entries to train on, and those held out; together `functions`, picked by a hash of the name."""
    inside = tuple(module + "." for module in modules)
    known = [entry for entry in entries() if not inside or entry.name.startswith(inside)]
    for module, prefix in zip(modules, inside, strict=True):
        if not any(entry.name.startswith(prefix) for entry in known):
            raise ValueError(f"modules: this Python documents no {module!r}; correct or remove it")
    if len(known) < functions:
        raise ValueError(f"functions={functions}: only {len(known)} are documented; use that or fewer")
    chosen = sorted(known, key=lambda entry: share(entry.name))[:functions]
    kept = [entry for entry in chosen if is_held_out(entry, held_out)]
    train = [entry for entry in chosen if not is_held_out(entry, held_out)]
    if not train or (held_out and len(kept) < 2):
        raise ValueError(
            f"functions={functions} with held_out={held_out} leaves {len(train)} to train on and {len(kept)} "
            "held out, which is too few; use more functions"
        )
    return train, kept


def is_held_out(entry: Entry, held_out: float) -> bool:
    """Whether this entry is never trained on; a larger share only adds to the held-out ones."""
    return share(f"held out? {entry.name}") < held_out


def in_order(phrasings: Sequence[str], seed: int, purpose: str, entry: Entry) -> list[str]:
    """The phrasings in an order of this entry's own: a set that takes more takes the same ones first."""
    return random.Random(f"{seed} {purpose} {entry.name} phrasings").sample(phrasings, len(phrasings))


def question(phrasing: str, entry: Entry) -> str:
    """The phrasing about the entry; what is built in goes by its short name, as people call it."""
    return phrasing.format(name=entry.name.removeprefix("builtins."))


def language(phrasing: str) -> str:
    """What a phrasing is written in: "en" or "zh"."""
    return "en" if phrasing.isascii() else "zh"


class Spoiler:
    """Makes wrong answers out of right ones."""

    def __init__(self, pool: Sequence[Entry]) -> None:
        """Wrong answers of the kind "other" are taken from the pool."""
        self.pool = pool
        self.neighbours: dict[str, list[Entry]] = defaultdict(list)
        for entry in pool:
            self.neighbours[home(entry)].append(entry)

    def spoil(self, entry: Entry, kind: str, dice: random.Random) -> str:
        """A wrong answer to a question about the entry."""
        kinds = {"other": self.other, "truncated": truncated, "spliced": self.spliced, "garbled": garbled}
        return kinds[kind](entry, dice)

    def other(self, entry: Entry, dice: random.Random) -> str:
        """What is true of another function: half the time, of one in the same module if it has another."""
        near = [other for other in self.neighbours[home(entry)] if other != entry]
        if near and dice.random() < 0.5:
            return dice.choice(near).sentence
        far = [other for other in self.pool if other != entry]
        return dice.choice(far).sentence

    def spliced(self, entry: Entry, dice: random.Random) -> str:
        """The beginning of the true sentence and the end of another, or the other way round."""
        halves = [entry.sentence.split(), self.other(entry, dice).split()]
        dice.shuffle(halves)
        first, second = halves
        made = " ".join(first[: max(1, len(first) // 2)] + second[len(second) // 2 :])
        return made if made != entry.sentence else self.other(entry, dice)


def truncated(entry: Entry, dice: random.Random) -> str:
    """The first 40 to 70 % of the words, without a full stop."""
    words = entry.sentence.split()
    count = min(max(1, round(len(words) * dice.uniform(0.4, 0.7))), len(words) - 1)
    return " ".join(words[:count]).rstrip(".,;:")


def garbled(entry: Entry, dice: random.Random) -> str:
    """The same words in another order; the full stop stays at the end, so it does not give the order away."""
    words = entry.sentence.removesuffix(".").split()
    assert len(set(words)) > 1, f"{entry.name}: {entry.sentence!r} has no two words to exchange"
    shuffled = list(words)
    while shuffled == words:
        dice.shuffle(shuffled)
    return " ".join(shuffled) + "."


def home(entry: Entry) -> str:
    """The module in which an entry lives."""
    return entry.name.rsplit(".", 2 if entry.kind == "method" else 1)[0]
