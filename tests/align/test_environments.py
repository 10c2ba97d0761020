"""Tools within answers: what they say, what is masked of it, and that a policy learns to use them."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from megachat.align.answers import Answer, Question, Room, in_turns, in_words, rendered
from megachat.align.environments import Calculator, Call, Environment, Python, Reply, Said
from megachat.align.grpo import GRPO
from megachat.align.rewards import Exact
from megachat.align.rollout import Rollout, as_rows, estimated
from megachat.align.rows import padded
from megachat.align.sandbox import Limits
from megachat.config import ConfigError, decode
from megachat.data import formats
from megachat.data.conversations import Message, Prompt, ask
from megachat.data.formats import CALL, CALLED, Record
from megachat.model.cross_entropy import IGNORE
from megachat.model.heads import Scalar
from megachat.tokenizer.chat_format import render_prompt
from megachat.tokenizer.tokenizer import CONTROLS, FILE, Tokenizer
from megachat.tokenizer.train import train
from megachat.train.loop import train_step
from tests.align import tiny
from tests.spawn import on_ranks
from tests.tiny_model import finish, write_model

CALCULATOR = Calculator(turns=2, at_once=1, digits=20)
PYTHON = Python(turns=2, at_once=2, limits=Limits(seconds=10.0, megabytes=256), longest=20)
NUMBERS = range(5)
ROOM = Room(answer=200, context=400)


def calling(expression: str) -> str:
    """A call of the calculator, as fine-tuning has it."""
    return formats.call({"name": "calculator", "arguments": {"expression": expression}})


class Says(Environment):
    """One thing, to whatever it hears."""

    what: str

    def tools(self) -> list[Record]:
        """None that the policy would be told of."""
        return []

    def reply(self, said: Said) -> Reply | None:
        """That."""
        if not self.what:
            raise OSError("the board is gone")
        return Reply(self.what)


def told(environment: Environment, text: str) -> str | None:
    reply = environment.reply(Said(Prompt(ask("?"), ""), (), text))
    return None if reply is None else reply.text


def coding(program: str) -> str:
    return formats.call({"name": "python", "arguments": {"code": program}})


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("-3 ** 2", "-9"),
        ("2 ** -1", "0.5"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("0.1 + 0.2", "0.3"),
        ("+1e3", "1000"),
        (" 12\n", "12"),
        ("9 ** 20", "12157665459056928801"),  # 20 digits
        ("1 ** 999999999999", "1"),
    ],
)
def test_the_calculator_calculates(expression: str, value: str):
    assert told(CALCULATOR, f"Let me see.\n{calling(expression)}") == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("5 % 0", "division by zero"),
        ("9 ** 21", "a number is too large"),
        ("9 ** 9 ** 9", "a number is too large"),
        ("9 ** 99999999999 ** 99999999999", "a number is too large"),
        ("(-9) ** 999999999", "a number is too large"),
        ("1e999", "a number is too large"),
        ("1e19 * 1e19", "a number is too large"),
        ("1e300 * 1e300", "a number is too large"),
        ("(-8) ** 0.5", "the root of a negative number"),
        ("x + 1", "an expression is made of"),
        ("__import__('os')", "an expression is made of"),
        ("(1).real", "an expression is made of"),
        ("e.E", "this is no expression"),
        ("1, 2", "an expression is made of"),
        ("1 < 2", "an expression is made of"),
        ("1j", "an expression is made of"),
        ("", "this is no expression"),
        ("1 +", "this is no expression"),
        ("1(2)", "this is no expression"),
        ("(" * 400 + ")" * 400, "this is no expression"),
        ("-" * 999 + "1", "the expression is too deep"),
        ("1" * 1001, "the expression has more than 1000 characters"),
    ],
)
def test_the_calculator_refuses_in_words(expression: str, why: str):
    said = told(CALCULATOR, calling(expression))
    assert said is not None
    assert said.startswith(f"error: {why}")


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        ("1 + 1", 'a call is {"name": ..., "arguments": {...}}'),
        ("2", 'a call is {"name": ..., "arguments": {...}}'),
        ("{", "the call is not JSON"),
        ("[" * 100_000, "the call is not JSON"),
        ('{"name": "abacus", "arguments": {}}', "there is no tool 'abacus'; there is calculator"),
        ('{"name": "calculator"}', 'calculator takes {"expression": "a text"}'),
        ('{"name": "calculator", "arguments": []}', 'calculator takes {"expression": "a text"}'),
        (
            '{"name": "calculator", "arguments": {"expression": 1}}',
            'calculator takes {"expression": "a text"}',
        ),
    ],
)
def test_a_call_that_is_wrong_is_told_so(inner: str, why: str):
    inner = inner.replace("1 + 1", '"1 + 1"')
    assert told(CALCULATOR, f"{CALL}{inner}{CALLED}") == f"error: {why}"


@pytest.mark.parametrize("text", ["4", "", f"{calling('1')} is what I call", "1 + 1 </tool_call>"])
def test_what_calls_nothing_is_the_answer(text: str):
    assert told(CALCULATOR, text) is told(PYTHON, text) is None


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print(2 + 3)\nprint('x')", "5\nx"),
        ("print('a' * 99)", "a" * 20),
        ("pass", ""),
        ("print(1)\n1 / 0", "error: ZeroDivisionError: d"[: 7 + 20]),
        ("raise SystemExit", "error: the program has left before its end"),
        ("print({'b', 'a', 'c', 'd'})", None),
    ],
)
def test_python_says_what_was_printed_or_what_went_wrong(program: str, said: str | None):
    found = told(PYTHON, coding(program))
    assert found == (told(PYTHON, coding(program)) if said is None else said)  # a set: always in one order


def test_python_ends_in_time():
    environment = PYTHON.model_copy(update={"limits": Limits(seconds=1.0, megabytes=256)})
    assert told(environment, coding("print('so far')\nwhile True: pass")) == (
        "error: the program took longer than 1 seconds"
    )


def test_the_policy_is_told_of_tools_as_in_fine_tuning():
    (tool,) = CALCULATOR.tools()
    turns: list[formats.Turn] = [("system", "Be brief."), ("user", "1+1?")]
    messages = [{"role": role, "content": text} for role, text, *_ in turns]
    record = {"messages": messages, "tools": [{"type": "function", "function": tool}]}
    assert formats.told(turns, [tool]) == formats.prompt(record)
    assert formats.told(formats.prompt(record), [tool]) == formats.prompt(record)  # told already
    alone = formats.told(turns[1:], [tool])
    assert alone == [("system", f"Tools:\n{json.dumps(tool)}"), ("user", "1+1?")]


# A policy whose answers are written down.


@pytest.fixture(scope="module")
def tokenizer(arithmetic: Path) -> Tokenizer:
    return Tokenizer.load(arithmetic / "tokenizer")


def acted(
    script: Sequence[str],
    tokenizer: Tokenizer,
    environment: Environment = CALCULATOR,
    room: Room = ROOM,
) -> tuple[Question, Answer]:
    """The answer of a policy that says one line of the script after the other."""
    lines = iter(script)

    def write(prompts: Sequence[Sequence[int]], seeds: Sequence[int], most: int) -> list[Answer]:
        found = []
        for prompt in prompts:
            assert len(prompt) + most <= room.context
            said = [*tokenizer.encode(next(lines)), tokenizer.end][:most]
            found.append(Answer(said, [-0.5 * place for place in range(len(said))]))
        return found

    prompt = Prompt(ask("1+2?"), "3")
    question = Question(prompt, render_prompt(prompt.messages, tokenizer))
    (answer,) = in_turns(environment, [question], [7], room, write, tokenizer, tiny.place(1, 0))
    return question, answer


def test_what_the_tool_says_is_masked_token_by_token(tokenizer: Tokenizer):
    call = calling("1+2")
    question, answer = acted([call, "3"], tokenizer)
    tokens, mask = rendered(question.tokens, answer)
    called, three = tokenizer.encode(call), tokenizer.encode("3")
    assert tokens == [
        *question.tokens, *called, tokenizer.end, tokenizer.tool, *three, tokenizer.end,
        tokenizer.assistant, *three, tokenizer.end,
    ]  # fmt: skip
    own = len(called) + 1
    assert mask == [0] * len(question.tokens) + [1] * own + [0] * (len(three) + 3) + [1] * (len(three) + 1)
    # It is the conversation that fine-tuning would read.
    messages = (*question.prompt.messages, Message("assistant", call), Message("tool", "3"))
    assert render_prompt(messages, tokenizer) == tokens[: -len(three) - 1]
    assert answer.calls == [Call(call, "3", False)]
    rows = padded([(tokens, mask)], tokenizer.pad)
    sampled = as_rows([answer.logps], rows)
    expected = [-0.5 * place for place in range(own)] + [-0.5 * place for place in range(len(three) + 1)]
    assert sampled[rows.mask].tolist() == expected
    assert not sampled[~rows.mask].any()


def test_the_last_message_is_what_is_judged(tokenizer: Tokenizer):
    question, answer = acted([calling("1+1"), calling("1/0"), "It is 3"], tokenizer)
    (judged,) = in_words([question], [answer], tokenizer)
    assert judged.text == "It is 3"
    assert judged.stopped
    assert [(call.told, call.wrong) for call in judged.calls] == [
        ("2", False),
        ("error: division by zero", True),
    ]
    assert (
        judged.tokens
        == len(answer.own)
        == sum(len(tokenizer.encode(text)) + 1 for text in (calling("1+1"), calling("1/0"), "It is 3"))
    )
    exact = Exact(weight=1.0, after="", strict=False)
    assert exact.scores([judged]) == [1.0]
    # 3 is what the tool has said, and the policy not.
    question, answer = acted([calling("1+2"), "4"], tokenizer)
    assert exact.scores(in_words([question], [answer], tokenizer)) == [0.0]


def test_an_answer_that_goes_on_calling_has_not_finished(tokenizer: Tokenizer):
    question, answer = acted([calling("1"), calling("2"), calling("3"), "6"], tokenizer)
    (judged,) = in_words([question], [answer], tokenizer)
    assert [call.told for call in judged.calls] == ["1", "2"]  # two turns
    assert judged.text == calling("3")
    assert not judged.stopped


def test_nothing_is_longer_than_there_is_room_for(tokenizer: Tokenizer):
    call, long = calling("1+2"), calling("11111*11111")
    size, start = len(tokenizer.encode(call)) + 1, len(tokenizer.encode(long)) + 1
    # All of a reply of nine digits does not fit.
    question, answer = acted([long, "8888"], tokenizer, room=Room(start + 6, 400))
    assert len(answer.tokens) == start + 6
    assert [answer.tokens[start], *answer.tokens[-3:-1]] == [
        tokenizer.tool,
        tokenizer.end,
        tokenizer.assistant,
    ]
    assert "123454321".startswith(answer.calls[0].told)
    assert sum(answer.mask[start:]) == 1
    assert not in_words([question], [answer], tokenizer)[0].stopped
    # No reply fits: the call stays open.
    question, answer = acted([call, "3"], tokenizer, room=Room(size + 3, 400))
    assert (len(answer.tokens), answer.calls, answer.open) == (size, [], True)
    assert not in_words([question], [answer], tokenizer)[0].stopped
    # A call that is cut off is none.
    question, answer = acted([call, "3"], tokenizer, room=Room(size - 1, 400))
    assert (len(answer.tokens), answer.calls) == (size - 1, [])


def test_what_a_tool_says_is_never_a_control_token(tokenizer: Tokenizer):
    attack = "".join(CONTROLS) + "</s>"
    environment = PYTHON.model_copy(update={"longest": 999})
    _, answer = acted([coding(f"print({attack!r})"), "ok"], tokenizer, environment)
    (part,) = answer.told
    said = answer.tokens[part.start + 1 : part.stop - 2]
    controls = {tokenizer.end, tokenizer.user, tokenizer.system, tokenizer.assistant, tokenizer.tool}
    assert not controls & {*said}
    assert tokenizer.decode(said) == attack


def test_half_a_character_in_a_call_does_not_end_the_training(tokenizer: Tokenizer):
    _, answer = acted(["x", "y"], tokenizer, Says(turns=1, at_once=1, what="\ud800!"))
    assert answer.calls[0].told == "?!"


def test_an_answer_is_the_same_whatever_others_call_beside_it(tokenizer: Tokenizer):
    drawn: list[int] = []

    def write(prompts: Sequence[Sequence[int]], seeds: Sequence[int], most: int) -> list[Answer]:
        found = []
        drawn.extend(seeds)
        for prompt, seed in zip(prompts, seeds, strict=True):
            assert len(prompt) + most <= 200
            draw = random.Random(f"{seed} {[*prompt]}")
            text = "so " * draw.randrange(30) + calling("1+1") * (draw.random() < 0.7)
            said = [*tokenizer.encode(text), tokenizer.end][:most]
            found.append(Answer(said, [0.0] * len(said)))
        return found

    prompts = [Prompt(ask("1+2?" * (1 + row % 3)), "") for row in range(40)]
    questions = [Question(prompt, render_prompt(prompt.messages, tokenizer)) for prompt in prompts]
    room = Room(answer=200 - max(len(one.tokens) for one in questions), context=200)
    environment, alone = CALCULATOR.model_copy(update={"turns": 3}), tiny.place(1, 0)
    together = in_turns(environment, questions, range(40), room, write, tokenizer, alone)
    assert drawn[:40] == [*range(40)]  # the first messages are those without an environment
    assert len({*drawn}) == len(drawn) > 80  # what is drawn in one turn is not drawn again in the next
    assert {len(answer.calls) for answer in together} == {0, 1, 2, 3}
    assert {answer.open for answer in together} == {True, False}
    assert max(len(answer.tokens) for answer in together) == room.answer
    for row in range(40):
        (one,) = in_turns(environment, questions[row : row + 1], [row], room, write, tokenizer, alone)
        assert one == together[row]


def test_an_environment_that_breaks_ends_the_run_in_its_own_words(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="the board is gone"):
        acted(["x", "y"], tokenizer, Says(turns=1, at_once=1, what=""))


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_an_answer_too_short_for_a_call_is_refused(name: str, inputs: Path, run: Path):
    settings = [*tiny.ROLLOUTS, "environment=calculator", "max_new_tokens=7"]
    with pytest.raises(ConfigError, match="max_new_tokens=7 leaves no room for a call"):
        tiny.stage(name, inputs, run, *settings)


def test_a_tokenizer_without_tools_is_told_before_anything_is_sampled(inputs: Path, run: Path):
    task = tiny.stage("grpo", inputs, run, *tiny.ROLLOUTS, *tiny.GROUPS, "environment=calculator")
    assert isinstance(task, GRPO)
    state = tiny.running(tiny.stage("sft", inputs, run))
    state.tokenizer.tool = None
    with pytest.raises(ValueError, match=r"has no <\|tool\|>"):
        task.asked(state)


def test_advantages_and_values_are_those_of_the_policys_tokens_alone():
    # Two answers of three own tokens each; in the second a tool speaks after the first.
    plain, broken = ([9, 1, 2, 3], [0, 1, 1, 1]), ([9, 1, 7, 8, 2, 3], [0, 1, 0, 0, 1, 1])
    rows = padded([plain, broken], pad=0)
    own = tensor([[0.5, 0.25, 1.0]] * 2)
    noise = torch.full(rows.tokens.shape, torch.nan)

    def placed(numbers: torch.Tensor) -> torch.Tensor:
        return noise.masked_scatter(rows.mask, numbers)

    zeros = torch.zeros(rows.tokens.shape)
    rollout = Rollout(rows, tensor([True, True]), torch.zeros(2), zeros, zeros, placed(own), zeros)
    rewards = placed(tensor([[0.0, 0.0, 2.0]] * 2))
    advantages, returns = estimated(rollout, rewards, 0.9, 0.8)
    for found in (advantages, returns):
        first, second = (found[row][rows.mask[row]] for row in range(2))
        assert_close(first, second)
    last = 2 - 1.0
    middle = (0.9 * 1.0 - 0.25) + 0.9 * 0.8 * last
    begin = (0.9 * 0.25 - 0.5) + 0.9 * 0.8 * middle
    assert_close(returns[1][rows.mask[1]], tensor([begin + 0.5, middle + 0.25, last + 1.0]))


# Models.


def record(a: int, b: int, second: int) -> Record:
    """A question, and the answer of somebody who calls with perhaps another second number."""
    call = {"name": "calculator", "arguments": {"expression": f"{a}+{second}"}}
    said = [
        {"role": "user", "content": f"{a}+{b}?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": str(a + second)},
        {"role": "assistant", "content": str(a + second)},
    ]
    return {"tools": CALCULATOR.tools(), "messages": said}


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with additions to ask, and conversations in which somebody calls the calculator, one of the
    numbers often another, and repeats what it says.
    """
    folder = tmp_path_factory.mktemp("arithmetic") / "inputs"
    folder.mkdir()
    draw = random.Random(0)
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
    records = [
        record(a, b, draw.choice(NUMBERS) if draw.random() < 0.6 else b) for _ in range(12) for a, b in pairs
    ]
    tiny.write(folder / "conversations.jsonl", records)
    tiny.write(folder / "prompts.jsonl", [{"prompt": f"{a}+{b}?", "answer": str(a + b)} for a, b in pairs])
    texts = [turn[1] for one in records for turn in formats.conversation(one)]
    tokenizer = train(texts, vocab=500, character_coverage=1.0, threads=1)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer" / FILE)
    finish(folder / "tokenizer")
    torch.manual_seed(0)
    shape = tiny.SHAPE | {"context": 128}
    write_model(folder / "pretrain", decode(shape).build(tokenizer.vocab), tokenizer)
    write_model(folder / "rm", Scalar(decode(shape).build(tokenizer.vocab)), tokenizer)
    return folder


@pytest.fixture(scope="session")
def caller(arithmetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a model that has learnt to do likewise."""
    folder = tmp_path_factory.mktemp("caller") / "inputs"
    shutil.copytree(arithmetic, folder)
    settings = ["context=112", "batch=32", "micro_batch=32", "epochs=30", "validation=0", "question=1+2?"]
    tiny.stage("sft", arithmetic, folder, *settings).execute()
    return folder


SIZES = ["context=112", "max_new_tokens=40", "batch=64", "micro_batch=64", "rollout=64", "at_once=64"]
SIZES += ["epochs=1", "prompts.held_out=0", "environment=calculator", "environment.turns=1"]


def made(inputs: Path, run: Path, *overrides: str) -> GRPO:
    task = tiny.stage("grpo", inputs, run, *SIZES, "group=8", "rewards.exact.after=''", *overrides)
    assert isinstance(task, GRPO)
    return task


@pytest.mark.slow
def test_grpo_learns_to_call_with_the_right_numbers(caller: Path, run: Path):
    task = made(caller, run, "rollouts=20")
    state = tiny.running(task)
    batches, notes = task.batches(state), []
    for _ in range(20):
        train_step(task, state, next(batches), rate=5e-4)
        state.progress.step += 1
        notes.append({**state.notes})
    rewards = [note["reward/mean"] for note in notes]
    assert sum(rewards[:2]) / 2 < 0.6, rewards
    assert sum(rewards[-5:]) / 5 > 0.85, rewards
    assert notes[-1]["environment/calls"] > 0.9
    assert notes[-1]["environment/errors"] < 0.1


@pytest.mark.slow
def test_what_is_sampled_is_masked_and_does_not_depend_on_what_it_is_sampled_with(caller: Path, run: Path):
    task = made(caller, run)
    state = tiny.running(task)
    questions = state.data.train[:12]
    answers = task.answers(questions, range(12), state)
    assert sum(len(answer.calls) for answer in answers) > 8
    few = made(caller, run, "at_once=5")
    again = few.answers(questions, range(12), state)
    again[3:5] = few.answers(questions[3:5], range(3, 5), state)
    assert [(one.tokens, one.told, one.calls) for one in again] == [
        (one.tokens, one.told, one.calls) for one in answers
    ]
    rows = padded([rendered(one.tokens, own) for one, own in zip(questions, answers, strict=True)], 0)
    for row, answer in enumerate(answers):
        trained = rows.labels[row][rows.labels[row] != IGNORE].tolist()
        assert trained == answer.own
        assert state.tokenizer.tool not in trained
        assert len(trained) == len(answer.logps)
    plain = task.model_copy(update={"environment": None}).answers(questions, range(12), state)
    for one, answer in zip(plain, answers, strict=True):
        first = answer.told[0].start if answer.told else len(answer.tokens)
        assert one.tokens[:first] == answer.tokens[:first]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_run_with_an_environment_records_its_calls(name: str, caller: Path, run: Path):
    settings = ["rollouts=2", "prompts.held_out=0.2", "validation_prompts=4", "validation_interval=1"]
    settings += ["optimizer.lr=1e-4"]
    settings += ["group=8", "rewards.exact.after=''"] if name == "grpo" else []
    tiny.stage(name, caller, run, *SIZES, *settings).execute()
    rows = tiny.rows(run, name)
    assert all(row["environment/calls"] > 0.8 for row in rows)
    assert all(row["kl"] == 0 for row in rows[:1])
    assert "validation/reward" in rows[-1]
    shown = [json.loads(line) for line in (run / name / "answers.jsonl").read_text().splitlines()]
    assert {one["of"] for one in shown} == {"rollout", "held out"}
    called = [one for one in shown if one["calls"]]
    assert len(called) > len(shown) / 2
    for one in called:
        asked, result = one["calls"].rsplit(" -> ", 1)
        assert asked.startswith(CALL)
        assert CALL not in one["answer"]
        assert len(result) < 40
    if name == "grpo":
        for one in shown:
            assert one["reward"] == float(one["answer"] == one["truth"])


def sampled(inputs: Path, run: Path, *overrides: str) -> dict[str, Any]:
    """A rollout, all of its rows, and the loss of its first step."""
    task = made(inputs, run, "parallel.precision=fp32", "micro_batch=8", *overrides)
    state = tiny.running(task)
    scored, _ = task._sample(state, 0)
    batches = task.batches(state)
    sums = train_step(task, state, next(batches), rate=1e-3)
    figures = {name: value for name, value in state.notes.items() if not name.startswith("rollout/")}
    return {"answers": scored.answers, "loss": sums["loss"] / sums["weight"], "figures": figures}


@on_ranks(1)
def alone(inputs: Path, run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "one.json").write_text(json.dumps(sampled(inputs, run)))


@on_ranks(2)
def shared(inputs: Path, run: Path) -> None:
    expected = json.loads((run / "one.json").read_text())
    for layout in ("zero1", "zero3"):
        found = json.loads(json.dumps(sampled(inputs, run, f"parallel={layout}")))
        assert found["answers"] == expected["answers"]
        assert found["figures"]["environment/calls"] > 0.8
        assert found["figures"] == pytest.approx(expected["figures"], rel=1e-4, abs=1e-5)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_two_data_ranks_sample_and_pay_what_one_does(caller: Path, run: Path) -> None:
    alone(inputs=caller, run=run)
    shared(inputs=caller, run=run)
