"""JSON lines in their shapes, every mistake with its line, and splits that share no prompt."""

import gzip
import json

import pytest
import zstandard

from megachat.data.conversations import (
    Conversation,
    JsonConversations,
    JsonPreferences,
    JsonPrompts,
    Message,
    Preference,
    Prompt,
    ask,
    share,
)

HELLO = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "你好"}]}


def written(path, *records):
    """A file of JSON lines; a text is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_conversation_is_read(tmp_path):
    path = written(tmp_path / "a.jsonl", HELLO, "", HELLO)
    expected = Conversation((Message("user", "Hi"), Message("assistant", "你好")))
    assert JsonConversations(path=path).conversations() == [expected, expected]


def test_packed_files_are_unpacked_and_read_in_the_order_of_their_names(tmp_path):
    for number, pack in enumerate((gzip.compress, zstandard.compress, bytes)):
        record = {
            "messages": [{"role": "user", "content": str(number)}, {"role": "assistant", "content": "ok"}]
        }
        ending = (".gz", ".zst", "")[number]
        (tmp_path / f"{number}.jsonl{ending}").write_bytes(pack(json.dumps(record).encode()))
    read = JsonConversations(path=str(tmp_path / "*.jsonl*")).conversations()
    assert [one.messages[0].content for one in read] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ([], "nothing"),
        (["assistant"], "assistant"),
        (["user", "user"], "user, user"),
        (["user", "assistant", "system"], "user, assistant, system"),
        (["system"], "system"),
        (["system", "system", "user"], "system, system, user"),
    ],
)
def test_turns_out_of_order_are_refused(roles, said):
    with pytest.raises(ValueError, match=f"this one is {said}$"):
        Conversation(tuple(Message(role, "x") for role in roles))


def test_turns_in_order_are_not():
    for roles in (
        ["user"],
        ["system", "user"],
        ["user", "assistant", "user"],
        ["system", "user", "assistant"],
    ):
        Conversation(tuple(Message(role, "x") for role in roles))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"messages": [', "Expecting value"),
        ("[1]", r"expected an object \{...\}, got '\[1\]'"),
        ("{}", 'expected "messages": .*, and the line has nothing'),
        ('{"question": "Hi", "id": 3}', 'expected "messages": .*, and the line has question, id'),
        ('{"messages": []}', r'expected "messages": .* got \[\]'),
        ('{"messages": ["Hi"]}', "expected a message .* got 'Hi'"),
        ('{"messages": [{"role": "bot", "content": "Hi"}]}', "a role is one of system, user, assistant"),
        ('{"messages": [{"role": "user", "content": 1}]}', 'expected "content": "text", got 1'),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "nothing is said by the assistant"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_with_what_is_wrong(tmp_path, line, why):
    path = written(tmp_path / "a.jsonl", HELLO, line, HELLO)
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{why}.*; correct or delete this line"):
        JsonConversations(path=path).conversations()


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(HELLO).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not UTF-8"):
        JsonConversations(path=str(tmp_path / "a.jsonl")).conversations()


def test_a_packed_file_that_ends_early_is_not_taken_for_whole(tmp_path):
    whole = gzip.compress((json.dumps(HELLO) + "\n").encode() * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:\d+: "):
        JsonConversations(path=str(tmp_path / "a.jsonl.gz")).conversations()


def test_no_file_and_no_lines_are_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"path: no file matches '.*none\*'"):
        JsonConversations(path=str(tmp_path / "none*")).conversations()
    path = written(tmp_path / "empty.jsonl", "", " ")
    with pytest.raises(ValueError, match=r"path: '.*empty.jsonl' holds no lines"):
        JsonConversations(path=path).conversations()


def test_a_preference_is_read_from_a_text_or_messages(tmp_path):
    pair = {"chosen": "4", "rejected": "5"}
    path = written(tmp_path / "a.jsonl", {"prompt": "2 + 2?", **pair},
                   {"prompt": [{"role": "user", "content": "2 + 2?"}], "kind": "sum", **pair})  # fmt: skip
    read = JsonPreferences(path=path, held_out=0.0).preferences("train")
    assert read == [Preference(ask("2 + 2?"), "4", "5", kind) for kind in ("", "sum")]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": "Hi", "chosen": "a"}, 'expected "rejected": "text", got None'),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same text, 'a'"),
        ({"chosen": "a", "rejected": "b"}, 'expected "prompt"'),
        (
            {"prompt": HELLO["messages"], "chosen": "a", "rejected": "b"},
            "the prompt ends with the assistant's own",
        ),
    ],
)
def test_a_preference_that_prefers_nothing_is_refused(tmp_path, record, why):
    path = written(tmp_path / "a.jsonl", record)
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: {why}"):
        JsonPreferences(path=path, held_out=0.0).preferences("train")


def test_a_prompt_may_have_an_answer(tmp_path):
    path = written(
        tmp_path / "a.jsonl", {"prompt": "Hi"}, {"messages": HELLO["messages"][:1], "answer": "Hello"}
    )
    prompts = JsonPrompts(path=path, held_out=0.0)
    assert prompts.prompts("train") == [Prompt(ask("Hi"), ""), Prompt(ask("Hi"), "Hello")]


def test_a_whole_conversation_is_a_prompt_and_its_answer(tmp_path):
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    sums = [*earlier, {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "It is 3."}]
    records = {"messages": sums}, {"messages": sums, "answer": "3"}, {"messages": earlier}
    asked = Conversation(tuple(Message(**message) for message in sums[:3])).messages
    assert JsonPrompts(path=written(tmp_path / "a.jsonl", *records), held_out=0.0).prompts("train") == [
        Prompt(asked, "It is 3."),
        Prompt(asked, "3"),
        Prompt(ask("Hi"), "Hello."),
    ]


def test_nobody_knows_which_prompts_of_a_file_were_fine_tuned_on(tmp_path):
    prompts = JsonPrompts(
        path=written(tmp_path / "a.jsonl", *({"prompt": f"{i}?"} for i in range(40))), held_out=0.5
    )
    assert prompts.seen(40) == []
    assert prompts.unseen(40) == prompts.prompts("held_out")
    assert len(prompts.unseen(3)) == 3


def test_the_same_prompt_is_never_in_both_splits(tmp_path):
    records = [{"prompt": f"{i % 200}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(400)]
    source = JsonPreferences(path=written(tmp_path / "a.jsonl", *records), held_out=0.25)
    train, held_out = ({one.prompt for one in source.preferences(split)} for split in ("train", "held_out"))
    assert train | held_out == {ask(f"{i}?") for i in range(200)}
    assert not train & held_out
    assert 26 <= len(held_out) <= 74  # 50 expected, four standard deviations of 6.1


def test_share_is_even_and_the_same_everywhere():
    shares = sorted(share(str(i)) for i in range(2000))
    # Kolmogorov-Smirnov: an even spread stays this close with a probability of 99.9 %.
    assert max(abs(one - i / 2000) for i, one in enumerate(shares)) < 1.95 / 2000**0.5
    # blake2b-48 of "math.gcd", by `printf math.gcd | b2sum -l 48`.
    assert share("math.gcd") == int("0751316e11ad", 16) / 2**48
