"""Chat in the terminal: what is printed where, what is remembered, and how it ends."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from megachat.config import ConfigError, compose, decode
from megachat.data.conversations import Message
from megachat.model.generate import Sampling
from megachat.serve.chat import Chat, Talk, converse, printable, read_line
from tests.evals import tiny

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=3)


def chat(run: Path, *overrides: str) -> Chat:
    quick = ["sampling.temperature=0", "sampling.max_new_tokens=3", "device=cpu"]
    built: Chat = decode(compose("chat", [f"run={run}", *quick, *overrides]))
    return built


def token(text: str) -> int:
    [number] = tiny.tokenizer().encode(text)
    return number


def talk(says: str = "a", system: str | None = None, base: bool = False, sampling: Sampling = GREEDY) -> Talk:
    """A conversation with a model that only ever says one letter."""
    model = tiny.constant(token(says))
    return Talk(model, tiny.tokenizer(), sampling, 0, system, base)


def said(pieces: Iterator[str]) -> str:
    return "".join(pieces)


def test_a_prompt_prints_its_answer_and_nothing_else(run: Path, capfd: pytest.CaptureFixture[str]):
    tiny.write_model(run / "sft", tiny.constant(token("e")))
    chat(run, "prompt=What does math.gcd do?").execute()
    assert capfd.readouterr().out == "eee\n"


def test_an_empty_prompt_is_refused(run: Path):
    tiny.write_model(run / "sft", tiny.constant(token("e")))
    with pytest.raises(ValueError, match="prompt is empty"):
        chat(run, "prompt=").execute()


def test_chinese_and_apostrophes_can_be_asked(run: Path):
    assert chat(run, "prompt=What's 语言, (really)?").prompt == "What's 语言, (really)?"


def test_the_best_finished_model_is_taken_and_stage_names_another(run: Path):
    with pytest.raises(
        ValueError,
        match=r"no model in .* has finished training \(looked for ppo, dpo, kto, grpo, sft, pretrain\)",
    ):
        chat(run).chosen()
    for stage in ("pretrain", "sft", "ppo"):
        tiny.finish(run / stage)
    tiny.finish(run / "rm")
    assert chat(run).chosen() == "ppo"
    assert chat(run, "stage=sft").chosen() == "sft"
    (run / "ppo" / "done.json").unlink()  # it is still running
    assert chat(run).chosen() == "sft"


def test_a_reward_model_cannot_be_talked_to(run: Path):
    with pytest.raises(
        ConfigError, match="stage: input should be 'ppo', 'dpo', 'kto', 'grpo', 'sft' or 'pretrain', got 'rm'"
    ):
        chat(run, "stage=rm")


def test_answers_stream_token_by_token():
    pieces = talk().answer("Hi")
    assert next(pieces) == "a"
    assert list(pieces) == ["a", "a", ""]


def test_the_conversation_is_remembered_and_reset():
    conversation = talk()
    said(conversation.answer("Hi"))
    assert conversation.past == [Message("user", "Hi"), Message("assistant", "aaa")]
    words, once = tiny.tokenizer(), conversation.prompt("And?")
    assert words.decode(once) == "HiaaaAnd?"
    conversation.reset()
    assert words.decode(conversation.prompt("And?")) == "And?"


def test_the_oldest_turns_are_forgotten_first_and_the_system_message_never():
    conversation = talk(system="s")
    for question in ("1", "2", "3", "4", "5", "6", "7", "8", "9"):
        said(conversation.answer(question))
    prompt = conversation.prompt("?")
    # The context is 64, an answer takes 3. <s> <|system|> s <|end|> are 4, and "?" with its role, its end and
    # the role of the answer another 4. A turn is 3 (question) + 5 (answer): (61 - 8) / 8 = 6 turns fit.
    assert tiny.tokenizer().decode(prompt) == "s4aaa5aaa6aaa7aaa8aaa9aaa?"
    assert len(prompt) == 8 + 6 * 8 <= 64 - 3


def test_a_question_too_long_says_how_long_it_may_be():
    with pytest.raises(
        ValueError, match=r"question is 504 tokens long, and the model's context leaves 61.*shorten it"
    ):
        talk().prompt("1" * 500)


def test_an_answer_takes_at_most_half_of_the_context():
    long = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=1000)
    conversation = talk(sampling=long)
    assert conversation.room == 32
    assert said(conversation.answer("Hi")) == "a" * 32


def test_a_base_model_continues_the_text_and_remembers_nothing():
    conversation = talk(base=True)
    assert said(conversation.answer("Hi")) == "aaa"
    assert conversation.past == []
    words = tiny.tokenizer()
    assert conversation.prompt("Hi") == [words.bos, *words.encode("Hi")]
    assert len(conversation.prompt("1" * 500)) == 61


def test_half_a_character_is_never_printed():
    middle = "中".encode()[1]
    conversation = talk()
    conversation.model = tiny.constant(tiny.tokenizer()._id(f"<0x{middle:02X}>"))
    assert "\ufffd" in said(
        conversation.answer("Hi")
    )  # bytes that never become a character are shown as such


def test_terminal_escapes_in_an_answer_are_not_sent_to_the_terminal():
    assert printable("a\x1b[31mb\x07\x9b2Jc\r\n\td语") == "a[31mb2Jc\n\td语"


def lines(*typed: str | None) -> Iterator[str | None]:
    yield from typed
    yield None


def test_commands_are_not_said_to_the_model(capsys: pytest.CaptureFixture[str]):
    conversation = talk()
    script = lines("Hi", "/help", "", "/nonsense", "/reset", "/quit", "never")
    converse(conversation, lambda: next(script))
    printed = capsys.readouterr()
    assert printed.out == "aaa\n"
    assert printed.err.count("/reset   forget") == 2  # an unknown command shows the list, too
    assert conversation.past == []
    assert next(script) == "never"


def test_the_end_of_the_input_ends_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    converse(talk(), read_line)
    assert capsys.readouterr().out == "aaa\n"


def test_ctrl_c_takes_a_line_back_and_the_conversation_goes_on(monkeypatch: pytest.MonkeyPatch):
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert read_line() == ""


def test_ctrl_c_stops_the_answer_and_not_the_conversation(capsys: pytest.CaptureFixture[str]):
    conversation = talk()
    written = conversation.answer

    def interrupted(question: str) -> Iterator[str]:
        for number, piece in enumerate(written(question)):
            if question == "stop" and number == 1:
                raise KeyboardInterrupt
            yield piece

    conversation.answer = interrupted  # type: ignore[method-assign]
    script = lines("stop", "go")
    converse(conversation, lambda: next(script))
    assert capsys.readouterr().out == "a\naaa\n"


def test_a_mistake_is_told_and_the_conversation_goes_on(capsys: pytest.CaptureFixture[str]):
    script = lines("1" * 500, "Hi")
    converse(talk(), lambda: next(script))
    printed = capsys.readouterr()
    assert "question is 504 tokens long" in printed.err
    assert printed.out == "\naaa\n"
