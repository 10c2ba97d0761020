"""How published sets write down who said what, told by the shape of each record.

  OpenAI      {"messages": [{"role": "user", "content": "Hi" or [{"type": "text", "text": "Hi"}]}, ...]}
  ShareGPT    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
  Alpaca      {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["Hi", "Hello."]]}
  TRL         {"prompt": "text" or [messages], "completion": "text" or [messages]}, and pairs of answers
An assistant's call of a tool becomes text, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, in a
message that ends with it; what the tool says is a message of the role `tool`. Of several calls at once each
is followed by its own result, for that is what a model will see that stops after each call. Tools that a
record describes are told to the model in its system message. What the assistant says in a message with
`"weight": 0` is read and not imitated.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

Record = dict[str, Any]
"""A line of a file."""

Turn = tuple[Role, str] | tuple[Role, str, Literal[0]]
"""Who speaks, and what is said; and 0 where the assistant says it and is not to be imitated."""

CALL, CALLED = "<tool_call>", "</tool_call>"
"""Around a call in what an assistant says: text like any other, which the model learns to write."""

LISTS = ("messages", "conversations", "conversation")
"""Keys of a whole conversation."""

NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
"""Who speaks, by the names that published sets have for them."""


@dataclass(frozen=True, slots=True)
class _Said:
    """A message as a record has it: its calls are not yet part of its text."""

    role: Role
    text: str
    calls: list[tuple[str, str]] = field(default_factory=list)
    """The id of each call, if it has one, and its text."""
    answers: str = ""
    """The id of the call that a tool's message answers, if it has one."""
    imitated: bool = True
    """Whether it is trained on, should the assistant say it."""

    def turn(self, text: str) -> Turn:
        """Its role with a text."""
        return (self.role, text) if self.imitated else (self.role, text, 0)


def is_call(role: str, text: str) -> bool:
    """Whether this is a message with which the assistant calls a tool."""
    return role == "assistant" and CALL in text and text.rstrip().endswith(CALLED)


def conversation(record: Record) -> list[Turn]:
    """A whole conversation in any of the shapes."""
    for key in LISTS:
        if key in record:
            return turns(record, key)
    if "instruction" in record:
        return [*instruction(record), ("assistant", text(record, "output"))]
    if "completion" in record:
        return [*turns(record, "prompt"), *answer(record, "completion")]
    if "chosen" in record:
        raise ValueError(
            'this is a preference ("chosen"), which `rm` and `dpo` read; nothing says to imitate it'
        )
    if "prompt" in record:
        raise ValueError('a "prompt" without a "completion" holds nothing to imitate; `ppo` reads it')
    if "text" in record:
        raise ValueError('"text" does not say who speaks; `clean` reads it, for `pretrain`')
    return turns(record, "messages")


def prompt(record: Record) -> list[Turn]:
    """What is to be answered, in any of the shapes."""
    if "prompt" not in record and "instruction" in record:
        return instruction(record)
    return turns(record, next((key for key in LISTS if key in record), "prompt"))


def preference(record: Record) -> tuple[list[Turn], str, str]:
    """A prompt, the better answer and the worse one.

    Either answer may be a whole conversation, which ends with it; what comes before is then the same in both,
    and the record needs no prompt.
    """
    chosen, rejected = answer(record, "chosen"), answer(record, "rejected")
    if chosen[:-1] != rejected[:-1]:
        same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        raise ValueError(
            f"chosen and rejected, of {len(chosen)} and {len(rejected)} messages, differ from message "
            f"{same + 1} on; only the last may differ: it is the answer that is compared"
        )
    if before := chosen[:-1]:
        if "prompt" in record:
            _must_end_with(before, turns(record, "prompt", alone=True))
        asked = _with_system(record, before)
    elif "prompt" in record or "instruction" in record or isinstance(record["chosen"], list):
        asked = prompt(record)
    else:
        raise ValueError(
            'expected "prompt": "a question", or [{"role": ..., "content": ...}, ...]: of two texts alone '
            "nobody can say where the question ends"
        )
    return asked, chosen[-1][1], rejected[-1][1]


def _must_end_with(before: list[Turn], asked: list[Turn]) -> None:
    if [turn[1].strip() for turn in before[-len(asked) :]] != [turn[1].strip() for turn in asked]:
        raise ValueError(
            f"the prompt is {asked[-1][1]!r:.80}, but what comes before the last message of chosen and "
            f"rejected ends with {before[-1][1]!r:.80}"
        )


def instruction(record: Record) -> list[Turn]:
    """Alpaca's question: the earlier turns, then the instruction with its input below it."""
    said: list[Turn] = []
    history = record.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise ValueError(f'expected "history": [["a question", "its answer"], ...], got {history!r:.80}')
    for question, reply in history:
        said += [("user", text({"history": question}, "history"))]
        said += [("assistant", text({"history": reply}, "history"))]
    parts = [text(record, key) for key in ("instruction", "input") if record.get(key) or key == "instruction"]
    return _with_system(record, [*said, ("user", "\n".join(parts))])


def answer(record: Record, key: str) -> list[Turn]:
    """An answer: a text, or messages that end with the assistant's."""
    if not isinstance(record.get(key), list):
        return [("assistant", text(record, key))]
    said = turns(record, key, alone=True)
    if said[-1][0] != "assistant":
        raise ValueError(
            f'"{key}" ends with a message of the {said[-1][0]}; it should end with the assistant\'s'
        )
    return said


def turns(record: Record, key: str, alone: bool = False) -> list[Turn]:
    """The messages under a key: a list of them, or a text, which is then the user's.

    With `alone`, without the system message and the tools that the record has beside them.
    """
    value = record.get(key)
    if isinstance(value, str):
        return _with_system(record, [("user", text(record, key))])
    if not isinstance(value, list) or not value:
        keys = ", ".join(map(str, record)) or "nothing"
        raise ValueError(
            f'expected "{key}": "a question", or [{{"role": ..., "content": ...}}, ...], '
            + (f"got {value!r:.80}" if key in record else f"and the line has {keys}")
        )
    said = _in_order([_read(item) for item in value])
    return said if alone else _with_system(record, said)


def text(record: Record, key: str) -> str:
    """The text under a key, which may be a list of parts."""
    value = record.get(key)
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        other = next((part for part in value if part.get("type", "text") != "text"), None)
        if other is not None:
            raise ValueError(f'"{key}" has a part of the type {other["type"]!r:.40}; only text can be read')
        return "".join(text(part, "text") for part in value)
    if not isinstance(value, str):
        raise ValueError(f'expected "{key}": "text", got {value!r:.80}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(f'"{key}" holds half a surrogate pair, {half!r}, which is no character') from None
    return value


def call(value: object) -> str:
    """A call as the model writes it: its name and arguments on one line."""
    value = _parsed(value)
    inner = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError(f'expected a call {{"name": "add", "arguments": {{...}}}}, got {value!r:.80}')
    arguments = _parsed(inner.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise ValueError(
            f'expected the arguments of {inner["name"]!r} as {{"a": 1, ...}}, got {arguments!r:.80}'
        )
    said = json.dumps({"name": inner["name"], "arguments": arguments}, ensure_ascii=False)
    return f"{CALL}{text({'call': said}, 'call')}{CALLED}"


def _read(item: object) -> _Said:
    """One message in OpenAI's keys or ShareGPT's."""
    known = isinstance(item, dict) and (item.get("role") or item.get("from"))
    if not isinstance(item, dict) or not isinstance(known, str) or known not in NAMES:
        raise ValueError(
            f'expected a message {{"role": "user", "content": "..."}}, got {item!r:.80}; '
            f"a role is one of {', '.join(NAMES)}"
        )
    role, key = NAMES[known], "content" if "content" in item or "role" in item else "value"
    imitated = _imitated(item, role)
    if known == "function_call":
        value = _parsed(item.get(key))
        called = [("", call(one)) for one in (value if isinstance(value, list) else [value])]
        return _Said(role, "", called, imitated=imitated)
    calls = item.get("tool_calls") or ([item["function_call"]] if item.get("function_call") else [])
    if not calls:
        return _Said(role, text(item, key), [], str(item.get("tool_call_id") or ""), imitated)
    if role != "assistant" or not isinstance(calls, list):
        raise ValueError(f'expected "tool_calls": [...] in a message of the assistant, got {item!r:.80}')
    ids = [str(one.get("id") or "") if isinstance(one, dict) else "" for one in calls]
    said = text(item, key) if item.get(key) else ""
    return _Said(role, said, [(own, call(one)) for own, one in zip(ids, calls, strict=True)], "", imitated)


def _imitated(item: dict[str, Any], role: Role) -> bool:
    """Whether a message is trained on if it is the assistant's: its `weight` is 1, or it has none."""
    weight = item.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f'expected "weight": 0 (not trained on) or 1, got {weight!r:.80}')
    if role != "assistant" and weight:
        raise ValueError(
            f'"weight": 1 in a message of the role {role}, which is never trained on; leave it out there'
        )
    return bool(weight) or role != "assistant"


def _in_order(messages: Sequence[_Said]) -> list[Turn]:
    """Turns, in which each call is a message of its own, and followed by its own result if there is one."""
    said: list[Turn] = []
    start = 0
    while start < len(messages):
        one = messages[start]
        results = (
            list(takewhile(lambda item: item.role == "tool", messages[start + 1 :])) if one.calls else []
        )
        start += 1 + len(results)
        if not one.calls:
            said.append(one.turn(one.text))
            continue
        ids = [own for own, _ in one.calls]
        unknown = next(
            (item.answers for item in results if item.answers and any(ids) and item.answers not in ids), ""
        )
        if unknown:
            raise ValueError(f"a tool answers the call {unknown!r:.60}; the calls are {', '.join(ids)}")
        if all(item.answers for item in results) and all(ids):
            results.sort(key=lambda item: ids.index(item.answers))
        calls = [own for _, own in one.calls]
        calls[0] = f"{one.text}\n{calls[0]}" if one.text else calls[0]
        if len(results) == len(calls):
            for own, result in zip(calls, results, strict=True):
                said += [one.turn(own), result.turn(result.text)]
        else:
            said += [one.turn(own) for own in calls] + [result.turn(result.text) for result in results]
    return said


def _with_system(record: Record, said: list[Turn]) -> list[Turn]:
    """With what a record says beside its messages: a system message, and the tools there are."""
    told = [text(record, "system")] if record.get("system") else []
    if said[0][0] == "system":
        if told and told != [said[0][1]]:
            raise ValueError('the record has a "system" of its own, and another in its messages; keep one')
        told, said = [said[0][1]], said[1:]
    if record.get("tools"):
        tools = _parsed(record["tools"])
        if not isinstance(tools, list):
            raise ValueError(f'expected "tools": [{{"name": ...}}, ...], got {tools!r:.80}')
        inner = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools]
        lines = [json.dumps(tool, ensure_ascii=False) for tool in inner]
        told = ["\n\n".join([*told, "\n".join(["Tools:", *lines])])]
    return [*((("system", told[0]),) if told else ()), *said]


def told(said: Sequence[Turn], tools: Sequence[Record]) -> list[Turn]:
    """The same turns where the system message also tells of tools, as it does of a record that has them.

    One that tells of them already stays as it is.
    """
    record = {"tools": [*tools]}
    block = _with_system(record, [("user", "")])[0][1]
    if said[0][0] == "system" and said[0][1].endswith(block):
        return [*said]
    return _with_system(record, [*said])


def _parsed(value: object) -> object:
    """What a text holds as JSON, or the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError(f"expected JSON, got {value!r:.80}") from None
