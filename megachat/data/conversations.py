"""Conversations, preferences between answers, and prompts: what fine-tuning reads, from JSON lines.

JSON lines in the shapes that published sets have (`formats.py`), plain or compressed (`.gz`, `.zst`):
  conversation  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
  preference    {"prompt": [...messages...] or "text", "chosen": "text", "rejected": "text", "margin": 1.0}
                (the margin may be missing)
  unpaired      {"prompt": ..., "completion": "text", "label": true}
  ranking       {"prompt": ..., "answers": ["the best", "the second", ...]}
  prompt        {"messages": [...] or "prompt": "text", "answer": "text, may be missing"}
A line that cannot be read stops the stage and says which line of which file it is: a corpus that silently
lost its second half trains without complaint.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from megachat.config import Config
from megachat.data import formats
from megachat.data.document import matching, read_lines
from megachat.data.formats import Record, Role, Turn, is_call, text

Split = Literal["train", "held_out"]
"""`held_out` is never trained on."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says."""

    role: Role
    content: str
    weight: Literal[0, 1] = 1
    """0: what the assistant says here is not imitated."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order: perhaps a system message, then user and assistant by turns.

    The assistant may call tools before it answers; each call is a message, and so is what a tool says to it.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        """Refuses an order of roles that no chat has."""
        turns = list(self.messages)
        if turns and turns[0].role == "system":
            turns = turns[1:]
        before: Message | None = None
        for message in turns:
            if message.role not in follows(before):
                break
            before = message
        else:
            if turns:
                return
        said = ", ".join(message.role for message in self.messages) or "nothing"
        raise ValueError(
            "a conversation is user, assistant, user, ... by turns, after at most one system message; a tool "
            f"speaks after a call of the assistant's; this one is {said}"
        )


def follows(message: Message | None) -> tuple[Role, ...]:
    """Who may speak after a message, or first."""
    if message is None:
        return ("user",)
    if message.role == "assistant":
        return ("tool", "assistant") if is_call(message.role, message.content) else ("user",)
    return ("tool", "assistant") if message.role == "tool" else ("assistant",)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to a prompt, of which `chosen` is the better."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    kind: str
    """What is wrong with `rejected`, where that is known."""
    margin: float = 0.0
    """By how much `chosen` is better, where that is known: the reward model is to tell them apart by it."""


@dataclass(frozen=True, slots=True)
class Unpaired:
    """An answer to a prompt that somebody found good or bad, compared with no other."""

    prompt: tuple[Message, ...]
    answer: str
    good: bool
    kind: str = ""
    """What is wrong with a bad one, where that is known."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Several answers to a prompt, the best first."""

    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    margin: float = 0.0
    """By how much each is better than the next, where that is known."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer."""

    messages: tuple[Message, ...]
    answer: str
    """The true answer, or "" where there is none."""
    kind: str = ""


class Conversations(Config):
    """A set of conversations to imitate."""

    def conversations(self) -> list[Conversation]:
        """All of them, in a fixed order."""
        raise NotImplementedError


class Preferences(Config):
    """A set of preferences between answers."""

    def preferences(self, split: Split) -> list[Preference]:
        """Those of one split, in a fixed order."""
        raise NotImplementedError


class UnpairedPreferences(Config):
    """A set of answers that are good or bad."""

    def unpaired(self, split: Split) -> list[Unpaired]:
        """Those of one split, in a fixed order."""
        raise NotImplementedError


class Rankings(Preferences):
    """A set of prompts with several answers each, from the best to the worst."""

    def rankings(self, split: Split) -> list[Ranking]:
        """Those of one split, in a fixed order."""
        raise NotImplementedError

    def preferences(self, split: Split) -> list[Preference]:
        """Every answer of a ranking is preferred to each that comes after it."""
        return [
            Preference(one.prompt, better, worse, "", one.margin)
            for one in self.rankings(split)
            for better, worse in combinations(one.answers, 2)
        ]


class Prompts(Config):
    """A set of prompts for the model to answer."""

    def prompts(self, split: Split) -> list[Prompt]:
        """Those of one split, in a fixed order."""
        raise NotImplementedError

    def seen(self, count: int) -> list[Prompt]:
        """For evaluation: at most `count` prompts that fine-tuning reads word for word, if that is known."""
        return []

    def unseen(self, count: int) -> list[Prompt]:
        """For evaluation: at most `count` prompts that are never trained on."""
        return self.prompts("held_out")[:count]


class Encoded(Conversations):
    """Those that `megachat encode_chat` has written as shards: for sets that take long to render, or that no
    rank has room for. They are split into training and validation as they were there."""

    def conversations(self) -> list[Conversation]:
        raise ValueError("conversations=encoded is what `encode_chat` writes; name those it is to encode")


class JsonConversations(Conversations):
    """Conversations from JSON lines, as OpenAI, ShareGPT, Alpaca or TRL write them."""

    path: str
    """The file, or a glob of files; `.gz` and `.zst` are unpacked."""

    def conversations(self) -> list[Conversation]:
        """One per line; each must hold at least one answer to imitate."""

        def read(record: Record) -> Conversation:
            conversation = Conversation(messages_of(formats.conversation(record)))
            said = [message for message in conversation.messages if message.role == "assistant"]
            if not said:
                raise ValueError("nothing is said by the assistant, so there is nothing to imitate")
            if not any(message.weight for message in said):
                raise ValueError(
                    'all that the assistant says has "weight": 0, so there is nothing to imitate'
                )
            return conversation

        return read_json_lines(self.path, read)


class JsonPreferences(Preferences):
    """Preferences from JSON lines: `{"prompt": ..., "chosen": ..., "rejected": ...}`.

    The answers are texts, messages, or whole conversations that differ in their last message.
    """

    path: str
    """The file, or a glob of files; `.gz` and `.zst` are unpacked."""
    held_out: Annotated[float, Field(ge=0, lt=1)]
    """The share of prompts kept from training, chosen by a hash of the prompt; no prompt is in both."""

    def preferences(self, split: Split) -> list[Preference]:
        """Those lines whose prompt belongs to the split."""
        return of_split(
            read_json_lines(self.path, preference_of), split, self.held_out, lambda item: item.prompt
        )


class JsonUnpaired(UnpairedPreferences):
    """Answers from JSON lines: `{"prompt": ..., "completion": ..., "label": true or false}`.

    A preference is a good answer and a bad one.
    """

    path: str
    """The file, or a glob of files; `.gz` and `.zst` are unpacked."""
    held_out: Annotated[float, Field(ge=0, lt=1)]
    """The share of prompts kept from training, chosen by a hash of the prompt; no prompt is in both."""

    def unpaired(self, split: Split) -> list[Unpaired]:
        """The answers to prompts that belong to the split."""

        def read(record: Record) -> list[Unpaired]:
            if "chosen" in record:
                return unpair(preference_of(record))
            prompt = asking(formats.prompt(record))
            if not isinstance(record.get("label"), bool | int) or record["label"] not in (0, 1):
                raise ValueError(f'expected "label": true or false, got {record.get("label")!r:.80}')
            answer = only_answer(formats.answer(record, "completion"), "completion")
            return [Unpaired(prompt, answer, bool(record["label"]), str(record.get("kind", "")))]

        found = [item for items in read_json_lines(self.path, read) for item in items]
        return of_split(found, split, self.held_out, lambda item: item.prompt)


class FromPairs(UnpairedPreferences):
    """The answers of preferences: each that was preferred is good, each that was not is bad."""

    preferences: Preferences
    """Which of two answers is better."""

    def unpaired(self, split: Split) -> list[Unpaired]:
        """Both answers of each preference of the split; one that is chosen twice is there twice."""
        return [one for pair in self.preferences.preferences(split) for one in unpair(pair)]


class JsonRankings(Rankings):
    """Rankings from JSON lines: `{"prompt": ..., "answers": ["the best", ..., "the worst"]}`.

    A preference is a ranking of two.
    """

    path: str
    """The file, or a glob of files; `.gz` and `.zst` are unpacked."""
    held_out: Annotated[float, Field(ge=0, lt=1)]
    """The share of prompts kept from training, chosen by a hash of the prompt; no prompt is in both."""

    def rankings(self, split: Split) -> list[Ranking]:
        """Those lines whose prompt belongs to the split."""

        def read(record: Record) -> Ranking:
            if "chosen" in record:
                pair = preference_of(record)
                return Ranking(pair.prompt, (pair.chosen, pair.rejected), pair.margin)
            prompt, listed = asking(formats.prompt(record)), record.get("answers")
            if not isinstance(listed, list) or len(listed) < 2:
                raise ValueError(
                    f'expected "answers": ["the best", ..., "the worst"], two or more, got {listed!r:.80}'
                )
            answers = [only_answer(formats.answer({"answers": one}, "answers"), "answers") for one in listed]
            twice = next((one for one in answers if answers.count(one) > 1), None)
            if twice is not None:
                raise ValueError(f"one answer has two places in the ranking, {twice[:60]!r}")
            return Ranking(prompt, tuple(answers))

        return of_split(read_json_lines(self.path, read), split, self.held_out, lambda item: item.prompt)


class JsonPrompts(Prompts):
    """Prompts from JSON lines: `{"messages": [...]}` or `{"prompt": "text"}`, and perhaps an `answer`.

    Of a whole conversation, as `sft` reads it, the prompt is what ends with the user's last message; what the
    assistant says at its end is the true answer where the line has no other.
    """

    path: str
    """The file, or a glob of files; `.gz` and `.zst` are unpacked."""
    held_out: Annotated[float, Field(ge=0, lt=1)]
    """The share of prompts kept from training, chosen by a hash of the prompt."""

    def prompts(self, split: Split) -> list[Prompt]:
        """Those lines whose prompt belongs to the split."""

        def read(record: Record) -> Prompt:
            turns, answer = formats.prompt(record), ""
            users = [place for place, turn in enumerate(turns) if turn[0] == "user"]
            if turns[-1][0] == "assistant" and users:
                answer = Conversation(messages_of(turns)).messages[-1].content
                turns = turns[: users[-1] + 1]
            answer = text(record, "answer") if "answer" in record else answer
            return Prompt(asking(turns), answer, str(record.get("kind", "")))

        return of_split(read_json_lines(self.path, read), split, self.held_out, lambda item: item.messages)


def ask(question: str) -> tuple[Message, ...]:
    """A prompt of one question."""
    return (Message("user", question),)


def answered(prompt: tuple[Message, ...], answer: str) -> Conversation:
    """The conversation in which the prompt gets this answer."""
    return Conversation((*prompt, Message("assistant", answer)))


def opening(conversation: Conversation) -> str:
    """What decides whether a conversation is held out: the first thing the user says."""
    return next(message.content for message in conversation.messages if message.role == "user")


def share(text: str) -> float:
    """A number in [0, 1) that follows from the text alone, evenly spread: where to cut a set in two for good.

    A text added to the set later moves no other across the cut, as a shuffle would.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def of_split(
    items: list[T], split: Split, held_out: float, prompt: Callable[[T], tuple[Message, ...]]
) -> list[T]:
    """The items of one split; items with the same prompt fall on the same side."""

    def held(item: T) -> bool:
        return share("\n".join(f"{message.role}: {message.content}" for message in prompt(item))) < held_out

    return [item for item in items if held(item) == (split == "held_out")]


def messages_of(turns: list[Turn]) -> tuple[Message, ...]:
    """Turns as messages."""
    return tuple(Message(*turn) for turn in turns)


def asking(turns: list[Turn]) -> tuple[Message, ...]:
    """The messages of a prompt, which is a conversation that has yet to be answered."""
    prompt = Conversation(messages_of(turns)).messages
    if prompt[-1].role == "assistant":
        raise ValueError("the prompt ends with the assistant's own message; it should end with the user's")
    return prompt


def only_answer(turns: list[Turn], key: str) -> str:
    """The text of an answer of one message."""
    if len(turns) > 1:
        said = ", ".join(turn[0] for turn in turns)
        raise ValueError(
            f'"{key}" holds {len(turns)} messages ({said}); one answer of the assistant\'s can be judged'
        )
    return turns[0][1]


def preference_of(record: Record) -> Preference:
    """The preference that a record holds."""
    turns, chosen, rejected = formats.preference(record)
    prompt = asking(turns)
    if chosen == rejected:
        raise ValueError(f"chosen and rejected are the same text, {chosen[:60]!r}")
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f'expected "margin": a number, got {margin!r:.80}')
    return Preference(prompt, chosen, rejected, str(record.get("kind", "")), float(margin))


def unpair(pair: Preference) -> list[Unpaired]:
    """Both answers, each by itself."""
    return [
        Unpaired(pair.prompt, pair.chosen, True),
        Unpaired(pair.prompt, pair.rejected, False, pair.kind),
    ]


def read_json_lines(pattern: str, read: Callable[[Record], T]) -> list[T]:
    """Every line of the files through `read`; what it finds wrong is reported as `path:line: what`."""
    paths = matching(pattern, "*.jsonl")
    if not paths:
        raise ValueError(f"path: no file matches {pattern!r}; paths are relative to {Path.cwd()}")
    items = []
    for path in paths:
        for number, line in read_lines(path):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"expected an object {{...}}, got {line[:60]!r}")
                items.append(read(record))
            except (ValueError, RecursionError) as error:  # a JSONDecodeError is a ValueError
                raise ValueError(f"{path}:{number}: {error}; correct or delete this line") from None
    if not items:
        raise ValueError(f"path: {pattern!r} holds no lines to read")
    return items
