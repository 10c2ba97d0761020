"""Conversations, preferences between answers, and prompts: what fine-tuning reads, from JSON lines.

JSON lines in the shapes that most published sets have, plain or compressed (`.gz`, `.zst`):
  conversation  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
  preference    {"prompt": [...messages...] or "text", "chosen": "text", "rejected": "text"}
  prompt        {"messages": [...] or "prompt": "text", "answer": "text, may be missing"}
A line that cannot be read stops the stage and says which line of which file it is: a corpus that silently
lost its second half trains without complaint.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from megachat.config import Config
from megachat.data.document import matching, read_lines

Role = Literal["system", "user", "assistant"]
ROLES = ("system", "user", "assistant")

Split = Literal["train", "held_out"]
"""`held_out` is never trained on."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order: perhaps a system message, then user and assistant by turns."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        """Refuses an order of roles that no chat has."""
        turns = [message.role for message in self.messages]
        if turns[:1] == ["system"]:
            turns = turns[1:]
        if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
            said = ", ".join(message.role for message in self.messages) or "nothing"
            raise ValueError(
                "a conversation is user, assistant, user, ... by turns, after at most one system message; "
                f"this one is {said}"
            )


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to a prompt, of which `chosen` is the better."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    kind: str
    """What is wrong with `rejected`, where that is known."""


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
    """Conversations from JSON lines: `{"messages": [{"role": ..., "content": ...}, ...]}`."""

    path: str
    """The file, or a glob of files; `.gz` and `.zst` are unpacked."""

    def conversations(self) -> list[Conversation]:
        """One per line; each must hold at least one answer to imitate."""

        def read(record: dict[str, Any]) -> Conversation:
            conversation = Conversation(messages_of(record, "messages"))
            if not any(message.role == "assistant" for message in conversation.messages):
                raise ValueError("nothing is said by the assistant, so there is nothing to imitate")
            return conversation

        return read_json_lines(self.path, read)


class JsonPreferences(Preferences):
    """Preferences from JSON lines: `{"prompt": ..., "chosen": ..., "rejected": ...}`."""

    path: str
    """The file, or a glob of files; `.gz` and `.zst` are unpacked."""
    held_out: Annotated[float, Field(ge=0, lt=1)]
    """The share of prompts kept from training, chosen by a hash of the prompt; no prompt is in both."""

    def preferences(self, split: Split) -> list[Preference]:
        """Those lines whose prompt belongs to the split."""

        def read(record: dict[str, Any]) -> Preference:
            prompt = Conversation(messages_of(record, "prompt")).messages
            must_ask(prompt)
            chosen, rejected = text_of(record, "chosen"), text_of(record, "rejected")
            if chosen == rejected:
                raise ValueError(f"chosen and rejected are the same text, {chosen[:60]!r}")
            return Preference(prompt, chosen, rejected, str(record.get("kind", "")))

        return of_split(read_json_lines(self.path, read), split, self.held_out, lambda item: item.prompt)


class JsonPrompts(Prompts):
    """Prompts from JSON lines: `{"messages": [...]}` or `{"prompt": "text"}`, and perhaps an `answer`."""

    path: str
    """The file, or a glob of files; `.gz` and `.zst` are unpacked."""
    held_out: Annotated[float, Field(ge=0, lt=1)]
    """The share of prompts kept from training, chosen by a hash of the prompt."""

    def prompts(self, split: Split) -> list[Prompt]:
        """Those lines whose prompt belongs to the split."""

        def read(record: dict[str, Any]) -> Prompt:
            key = "messages" if "messages" in record else "prompt"
            prompt = Conversation(messages_of(record, key)).messages
            must_ask(prompt)
            answer = text_of(record, "answer") if "answer" in record else ""
            return Prompt(prompt, answer, str(record.get("kind", "")))

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


def messages_of(record: dict[str, Any], key: str) -> tuple[Message, ...]:
    """The messages under a key: a list of `{"role", "content"}`, or a text, which is then the user's."""
    value = record.get(key)
    if isinstance(value, str):
        return ask(text_of(record, key))
    if not isinstance(value, list) or not value:
        keys = ", ".join(map(str, record)) or "nothing"
        raise ValueError(
            f'expected "{key}": "a question", or [{{"role": ..., "content": ...}}, ...], '
            + (f"got {value!r:.80}" if key in record else f"and the line has {keys}")
        )
    messages = []
    for item in value:
        if not isinstance(item, dict) or item.get("role") not in ROLES:
            raise ValueError(
                f'expected a message {{"role": "user", "content": "..."}}, got {item!r:.80}; '
                f"a role is one of {', '.join(ROLES)}"
            )
        messages.append(Message(item["role"], text_of(item, "content")))
    return tuple(messages)


def text_of(record: dict[str, Any], key: str) -> str:
    """The text under a key."""
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f'expected "{key}": "text", got {value!r:.80}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(f'"{key}" holds half a surrogate pair, {half!r}, which is no character') from None
    return value


def must_ask(prompt: tuple[Message, ...]) -> None:
    """Refuses a prompt that already has its answer."""
    if prompt[-1].role == "assistant":
        raise ValueError("the prompt ends with the assistant's own message; it should end with the user's")


def read_json_lines(pattern: str, read: Callable[[dict[str, Any]], T]) -> list[T]:
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
