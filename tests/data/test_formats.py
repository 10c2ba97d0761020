"""Published shapes of conversations, preferences and prompts, and what none of them can be."""

import json
import random

import pytest

from megachat.data.conversations import (
    Conversation,
    JsonConversations,
    JsonPreferences,
    JsonPrompts,
    JsonRankings,
    JsonUnpaired,
    Message,
    Preference,
    Prompt,
    Ranking,
    Unpaired,
    ask,
)
from megachat.data.formats import call, conversation, preference, prompt

HELLO = [("user", "Hi"), ("assistant", "你好")]
ADD = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool(content, **more):
    return {"role": "tool", "content": content, **more}


def called(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [user("Hi"), assistant("你好")]},
        {
            "messages": [
                user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
                assistant("你好"),
            ]
        },
        {"conversation": [user("Hi"), assistant("你好")]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "你好"}]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "你好"}]},
        {"instruction": "Hi", "input": "", "output": "你好"},
        {"prompt": "Hi", "completion": "你好"},
        {"prompt": [user("Hi")], "completion": [assistant("你好")]},
        {"messages": [user("Hi"), assistant("你好", tool_calls=None, name=None)], "tools": None, "id": 7},
    ],
    ids=lambda record: ",".join(record),
)
def test_one_exchange_in_every_shape(record):
    assert conversation(record) == HELLO


def test_alpacas_input_stands_below_its_instruction_and_its_history_before_it():
    record = {"system": "Be brief.", "instruction": "Add.", "input": "1 and 2", "output": "3"}
    record["history"] = [["Hi", "Hello."], ["Well?", ""]]
    assert conversation(record) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Well?"),
        ("assistant", ""),
        ("user", "Add.\n1 and 2"),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [assistant(None, tool_calls=[called("add", '{"a": 1}')]), tool("3"), assistant("It is 3.")],
        [assistant("", tool_calls=[called("add", {"a": 1})]), tool("3"), assistant("It is 3.")],
        [{"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
         {"role": "function", "name": "add", "content": "3"}, assistant("It is 3.")],
        [{"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
         {"from": "observation", "value": "3"}, {"from": "gpt", "value": "It is 3."}],
        [{"from": "gpt", "value": ADD}, {"from": "tool", "value": "3"}, assistant("It is 3.")],
    ],
)  # fmt: skip
def test_a_call_and_its_result_in_every_shape(messages):
    turns = conversation({"messages": [user("1 + 2?"), *messages]})
    assert turns == [("user", "1 + 2?"), ("assistant", ADD), ("tool", "3"), ("assistant", "It is 3.")]
    Conversation(tuple(Message(role, said) for role, said in turns))


def test_a_weight_of_0_stays_with_every_call_of_its_message():
    said = [user("Hi"), assistant("", tool_calls=[called("f", {}), called("g", {})], weight=0)]
    calls = [f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in "fg"]
    read = [("assistant", one, 0) for one in calls]
    assert conversation({"messages": said})[1:] == read
    results = conversation({"messages": [*said, tool("1"), tool("2")]})
    assert results[1:] == [read[0], ("tool", "1"), read[1], ("tool", "2")]


def test_a_conversation_of_which_nothing_is_imitated_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [user("Hi"), assistant("a", weight=0)]}))
    with pytest.raises(ValueError, match='jsonl:1: all that the assistant says has "weight": 0'):
        JsonConversations(path=str(path)).conversations()


def test_of_several_calls_each_is_followed_by_its_own_result():
    calls = [called("add", {"a": 1}, id="x"), called("now", "{}", id="y")]
    messages = [user("?"), assistant("I look.", tool_calls=calls),
                tool("noon", tool_call_id="y"), tool("3", tool_call_id="x")]  # fmt: skip
    assert conversation({"messages": messages})[1:] == [
        ("assistant", f"I look.\n{ADD}"), ("tool", "3"), ("assistant", NOW), ("tool", "noon"),
    ]  # fmt: skip


def test_calls_that_nothing_has_answered_end_a_conversation_and_are_imitated(tmp_path):
    value = [{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]
    said = [{"from": "human", "value": "?"}, {"from": "function_call", "value": json.dumps(value)}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": said}))
    (only,) = JsonConversations(path=str(path)).conversations()
    assert only == Conversation((Message("user", "?"), Message("assistant", ADD), Message("assistant", NOW)))


def test_one_result_for_two_calls_comes_after_both():
    value = [{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]
    said = [user("?"), {"from": "function_call", "value": value}, {"from": "observation", "value": "3, noon"}]
    assert [role for role, _ in conversation({"conversations": said})] == ["user", *["assistant"] * 2, "tool"]


@pytest.mark.parametrize("tools", [[{"type": "function", "function": {"name": "now"}}], '[{"name": "now"}]'])
def test_tools_are_told_in_the_system_message(tools):
    told = 'Tools:\n{"name": "now"}'
    assert conversation({"messages": [user("Hi"), assistant("你好")], "tools": tools}) == [
        ("system", told), *HELLO,
    ]  # fmt: skip
    record = {"messages": [{"role": "system", "content": "Be brief."}, user("Hi")], "tools": tools}
    assert prompt(record) == [("system", f"Be brief.\n\n{told}"), ("user", "Hi")]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "this is a preference .*`rm` and `dpo`"),
        ({"prompt": "Hi"}, 'a "prompt" without a "completion" holds nothing to imitate'),
        ({"text": "Hi"}, '"text" does not say who speaks'),
        ({"instruction": "Hi"}, 'expected "output": "text", got None'),
        ({"instruction": "Hi", "output": "a", "history": ["b"]}, 'expected "history": '),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "one of system, user, assistant, tool, "),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "a role is one of"),
        ({"messages": [user([{"type": "image_url", "image_url": "x"}])]}, "a part of the type 'image_url'"),
        ({"messages": [user("Hi"), assistant("", tool_calls=[{"name": 3}])]}, "expected a call .* got .*3"),
        ({"messages": [user("Hi"), assistant("", tool_calls=[called("f", "a=1")])]}, "JSON, got 'a=1'"),
        ({"messages": [user("Hi"), assistant("", tool_calls=[called("f", "[1]")])]}, "the arguments of 'f'"),
        ({"messages": [user("Hi"), {**user("x"), "tool_calls": [called("f", {})]}]}, "of the assistant"),
        ({"messages": [user("Hi"), assistant("", tool_calls=[called("f", {}, id="x")]),
                       tool("1", tool_call_id="z")]}, "answers the call 'z'; the calls are x"),
        ({"messages": [user("Hi"), assistant(None)]}, 'expected "content": "text", got None'),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, user("Hi")]}, "keep one"),
        *(({"messages": [user("Hi"), assistant("a", weight=weight)]}, f'"weight": 0 .* or 1, got {got}')
          for weight, got in ((2, "2"), (0.5, "0.5"), (True, "True"), ("0", "'0'"), ([0], r"\[0\]"))),
        ({"messages": [{**user("Hi"), "weight": 1}]}, "of the role user, which is never trained on"),
        ({"messages": [user("Hi")], "tools": "f"}, "expected JSON, got 'f'"),
        ({"messages": [user("Hi")], "tools": {}, "system": 3}, 'expected "system": "text", got 3'),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told_apart(record, why):
    with pytest.raises(ValueError, match=why):
        conversation(record)


@pytest.mark.parametrize(
    ("roles", "ends"),
    [
        (["user", "tool"], "user, tool"),
        (["user", "assistant", "tool"], "user, assistant, tool"),
        (["user", "assistant", "assistant"], "user, assistant, assistant"),
        (["tool"], "tool"),
        (["user", "call", "user"], "user, assistant, user"),
        (["user", "call", "tool", "user"], "user, assistant, tool, user"),
    ],
)
def test_a_tool_speaks_after_a_call_alone(roles, ends):
    said = [Message("assistant", ADD) if role == "call" else Message(role, "x") for role in roles]
    with pytest.raises(ValueError, match=f"this one is {ends}$"):
        Conversation(tuple(said))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [user("2 + 2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"chosen": [user("2 + 2?"), assistant("4")], "rejected": [user("2 + 2?"), assistant("5")]},
        {"prompt": " 2 + 2? ", "chosen": [user("2 + 2?"), assistant("4")],
         "rejected": [user("2 + 2?"), assistant("5")]},
        {"instruction": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": [{"from": "gpt", "value": "4"}],
         "rejected": [{"from": "gpt", "value": "5"}]},
    ],
)  # fmt: skip
def test_a_preference_in_every_shape(record):
    assert preference(record) == ([("user", "2 + 2?")], "4", "5")


def test_what_two_conversations_share_is_the_prompt_and_the_system_message_stays():
    shared = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yes?"), user("2 + 2?")]
    record = {"chosen": [*shared, assistant("4")], "rejected": [*shared, assistant("5")]}
    turns, *answers = preference(record)
    assert [role for role, _ in turns] == ["system", "user", "assistant", "user"]
    assert answers == ["4", "5"]
    assert preference({"prompt": "2 + 2?", **record})[0] == turns


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "where the question ends"),
        ({"chosen": [user("a"), assistant("4")], "rejected": [user("b"), assistant("5")]},
         "of 2 and 2 messages, differ from message 1 on; only the last may differ"),
        ({"chosen": [user("a"), assistant("4"), user("c"), assistant("d")],
          "rejected": [user("a"), assistant("5")]}, "of 4 and 2 messages, differ from message 2 on"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, '"chosen" ends with a message of the user'),
        ({"prompt": "Hi", "chosen": [user("a"), assistant("4")], "rejected": [user("a"), assistant("5")]},
         "the prompt is 'Hi', but .* ends with 'a'"),
        ({"chosen": [assistant("4")], "rejected": [assistant("5")]}, 'expected "prompt"'),
        ({"prompt": "Hi", "chosen": "a"}, 'expected "rejected": "text", got None'),
    ],
)  # fmt: skip
def test_preferences_that_cannot_be_compared_are_told_apart(record, why):
    with pytest.raises(ValueError, match=why):
        preference(record)


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {"path": str(path), "held_out": 0.0}


def test_whole_conversations_become_preferences(tmp_path):
    record = {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")], "kind": "k"}
    read = JsonPreferences(**written(tmp_path / "a.jsonl", record)).preferences("train")
    assert read == [Preference(ask("Hi"), "a", "b", "k")]


def test_an_unpaired_answer_is_good_or_bad_and_a_preference_is_one_of_each(tmp_path):
    source = written(
        tmp_path / "a.jsonl",
        {"prompt": "Hi", "completion": "Hello", "label": True},
        {"prompt": [user("Hi")], "completion": [assistant("No")], "label": 0, "kind": "rude"},
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "kind": "k"},
    )
    assert JsonUnpaired(**source).unpaired("train") == [
        Unpaired(ask("Hi"), "Hello", True),
        Unpaired(ask("Hi"), "No", False, "rude"),
        Unpaired(ask("Hi"), "a", True),
        Unpaired(ask("Hi"), "b", False, "k"),
    ]


@pytest.mark.parametrize("label", ["good", None, 2, 0.5])
def test_a_label_is_true_or_false(tmp_path, label):
    source = written(tmp_path / "a.jsonl", {"prompt": "Hi", "completion": "Hello", "label": label})
    with pytest.raises(ValueError, match=rf'a\.jsonl:1: expected "label": true or false, got {label!r}'):
        JsonUnpaired(**source).unpaired("train")


def test_an_answer_of_several_messages_cannot_be_judged(tmp_path):
    said = [assistant("a"), user("b"), assistant("c")]
    source = written(tmp_path / "a.jsonl", {"prompt": "Hi", "completion": said, "label": True})
    with pytest.raises(ValueError, match=r'"completion" holds 3 messages \(assistant, user, assistant\)'):
        JsonUnpaired(**source).unpaired("train")


def test_a_ranking_has_the_best_answer_first(tmp_path):
    source = written(
        tmp_path / "a.jsonl",
        {"prompt": "Hi", "answers": ["a", [assistant("b")], "c"]},
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
    )
    assert JsonRankings(**source).rankings("train") == [
        Ranking(ask("Hi"), ("a", "b", "c")),
        Ranking(ask("Hi"), ("a", "b")),
    ]


@pytest.mark.parametrize(
    ("answers", "why"), [(["a"], "two or more, got"), (["a", "b", "a"], "two places in the ranking, 'a'")]
)
def test_a_ranking_that_ranks_nothing_is_refused(tmp_path, answers, why):
    source = written(tmp_path / "a.jsonl", {"prompt": "Hi", "answers": answers})
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{why}"):
        JsonRankings(**source).rankings("train")


def test_splits_of_unpaired_answers_and_rankings_share_no_prompt(tmp_path):
    records = [{"prompt": f"{i % 50}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(200)]
    source = {**written(tmp_path / "a.jsonl", *records), "held_out": 0.3}
    for read in (JsonUnpaired(**source).unpaired, JsonRankings(**source).rankings):
        train, held_out = ({one.prompt for one in read(split)} for split in ("train", "held_out"))
        assert train | held_out == {ask(f"{i}?") for i in range(50)}
        assert train
        assert held_out
        assert not train & held_out


def test_a_prompt_may_end_with_what_a_tool_says(tmp_path):
    messages = [user("1 + 2?"), assistant(None, tool_calls=[called("add", {"a": 1})]), tool("3")]
    read = JsonPrompts(**written(tmp_path / "a.jsonl", {"messages": messages}, {"instruction": "Hi"}))
    assert read.prompts("train") == [
        Prompt((*ask("1 + 2?"), Message("assistant", ADD), Message("tool", "3")), ""),
        Prompt(ask("Hi"), ""),
    ]


def test_no_value_in_any_place_of_a_record_is_more_than_a_mistake():
    records = [
        {"messages": [user("a"), assistant("b", tool_calls=[called("f", {}, id="x")]), tool("c")]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]},
        {
            "system": "s",
            "instruction": "a",
            "input": "b",
            "history": [["c", "d"]],
            "output": "e",
            "tools": [],
        },
        {"prompt": [user("a")], "completion": [assistant("b")]},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], "prompt": "a"},
    ]
    values = [None, 0, 1.5, True, "", "x", "{}", "[]", [], {}, [[]], [{}], [None], {"role": "user"}, "\ud800"]
    dice = random.Random(0)

    def spoil(node):
        if dice.random() < 0.15:
            return dice.choice(values)
        if isinstance(node, dict):
            return {key: spoil(value) for key, value in node.items() if dice.random() > 0.05}
        return [spoil(value) for value in node] if isinstance(node, list) else node

    refused = 0
    for _ in range(3000):
        record = spoil(dice.choice(records))
        for read in (conversation, prompt, preference):
            try:
                if isinstance(record, dict):
                    read(record)
            except ValueError:
                refused += 1
    assert 1000 < refused < 9000


def test_a_call_is_one_line_in_its_own_letters():
    said = call({"name": "天气", "arguments": '{"城市": "北京\\n"}'})
    assert said == '<tool_call>{"name": "天气", "arguments": {"城市": "北京\\n"}}</tool_call>'
