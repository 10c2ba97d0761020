"""An answer as tokens: what the policy has written, and what tools have said to it in between.

A tool's message stands in the answer as it stands in a conversation: `<|tool|>`, text, `<|end|>`, and then
the `<|assistant|>` with which the policy goes on. None of that is the policy's, so none is trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megachat.align.environments import Call, Environment, Reply, Said
from megachat.align.rewards import Answer as Judged
from megachat.align.rows import Rendered
from megachat.align.sandbox import side_by_side
from megachat.align.sharing import by_ranks
from megachat.data.conversations import Prompt
from megachat.data.formats import is_call
from megachat.model.draws import seed_of
from megachat.parallel.mesh import Mesh
from megachat.tokenizer.chat_format import render_reply
from megachat.tokenizer.tokenizer import Tokenizer

LEAST = 4
"""Tokens that a reply needs, at least: three control tokens, and one with which the policy goes on."""


@dataclass(frozen=True)
class Question:
    """A prompt, and its tokens, which end where the answer begins."""

    prompt: Prompt
    tokens: list[int]


@dataclass(frozen=True)
class Answer:
    """What the policy said, and what it was told meanwhile."""

    tokens: list[int]
    logps: list[float]
    """The sampler's log-probability of each token of the policy's own. Where the loss is computed with newer
    weights or by other kernels, the ratio to its own says by how much."""
    told: list[range] = field(default_factory=list)
    """Where in it the tokens are not the policy's."""
    calls: list[Call] = field(default_factory=list)
    """What they reply to, and what they say."""
    open: bool = False
    """Whether it ends with a call that nobody has replied to."""

    @property
    def mask(self) -> list[int]:
        """1 on the policy's own tokens."""
        mask = [1] * len(self.tokens)
        for part in self.told:
            mask[part.start : part.stop] = [0] * len(part)
        return mask

    @property
    def own(self) -> list[int]:
        """The policy's own tokens."""
        return [token for token, own in zip(self.tokens, self.mask, strict=True) if own]

    @property
    def last(self) -> list[int]:
        """Those of its last message."""
        return self.tokens[self.told[-1].stop :] if self.told else self.tokens


def rendered(prompt: Sequence[int], answer: Answer) -> Rendered:
    """A prompt with an answer, whose own tokens are trained on."""
    return [*prompt, *answer.tokens], [0] * len(prompt) + answer.mask


def in_words(questions: Sequence[Question], answers: Sequence[Answer], tokenizer: Tokenizer) -> list[Judged]:
    """The answers as rewards read them: the last message of each is its text."""
    return [
        Judged(
            one.prompt,
            _text(answer, tokenizer),
            len(answer.own),
            answer.tokens[-1] == tokenizer.end and not answer.open,
            tuple(answer.calls),
        )
        for one, answer in zip(questions, answers, strict=True)
    ]


@dataclass(frozen=True)
class Room:
    """How many tokens there may be."""

    answer: int
    """In all of an answer."""
    context: int
    """In a prompt and its answer."""


Write = Callable[[Sequence[Sequence[int]], Sequence[int], int], list[Answer]]
"""Prompts, a seed for each, and how many tokens an answer may have -> answers of one message."""


def in_turns(
    environment: Environment,
    questions: Sequence[Question],
    seeds: Sequence[int],
    room: Room,
    write: Write,
    tokenizer: Tokenizer,
    mesh: Mesh,
) -> list[Answer]:
    """Answers in which the environment replies to calls.

    All ranks call it with all questions and get all answers. An answer follows from its question and its seed
    alone: what others beside it call is of no matter.
    """

    def reply(said: Sequence[Said]) -> list[Reply | None]:
        return side_by_side(environment.reply, said, environment.at_once)

    answers = [Answer([], []) for _ in questions]
    going = [*range(len(questions))]
    for turn in range(environment.turns + 1):
        if not going:
            break
        prompts = [[*questions[row].tokens, *answers[row].tokens] for row in going]
        # The first turn's is the seed itself: an answer that calls nothing is the one without an environment.
        own = [seed_of(seeds[row], "turn", turn) if turn else seeds[row] for row in going]
        rooms = [room.answer - len(answers[row].tokens) for row in going]
        for row, new in zip(going, _within(rooms, room.context, prompts, own, write), strict=True):
            answers[row].tokens.extend(new.tokens)
            answers[row].logps.extend(new.logps)
        going = [
            row
            for row in going
            if turn < environment.turns
            and answers[row].tokens[-1] == tokenizer.end
            and room.answer - len(answers[row].tokens) >= LEAST
        ]
        said = [
            Said(questions[row].prompt, tuple(answers[row].calls), _text(answers[row], tokenizer))
            for row in going
        ]
        replies = [*zip(going, said, by_ranks(reply, said, mesh), strict=True)]
        for row, one, told in replies:
            if told is not None:
                _tell(answers[row], one, told, room.answer, tokenizer)
        going = [row for row, _, told in replies if told is not None]
    return [replace(answer, open=is_call("assistant", _text(answer, tokenizer))) for answer in answers]


def _within(
    rooms: Sequence[int],
    context: int,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    write: Write,
) -> list[Answer]:
    """An answer to each prompt, of at most so many tokens as there is room for.

    They are written together with one limit, that of the roomiest, and cut; but for those that would not be
    within the context then, which come after them.
    """
    found: dict[int, Answer] = {}
    left = sorted(range(len(prompts)), key=lambda row: -rooms[row])
    while left:
        most = rooms[left[0]]
        now = [row for row in left if len(prompts[row]) + most <= context]
        written = write([prompts[row] for row in now], [seeds[row] for row in now], most)
        for row, one in zip(now, written, strict=True):
            found[row] = Answer(one.tokens[: rooms[row]], one.logps[: rooms[row]])
        left = [row for row in left if row not in found]
    return [found[row] for row in range(len(prompts))]


def _tell(answer: Answer, said: Said, reply: Reply, most: int, tokenizer: Tokenizer) -> None:
    """Adds a reply to an answer, cut to where there is room for one more token."""
    # What a call has made a tool say may hold half a character, which no text has.
    text = reply.text.encode("utf-8", "replace").decode()
    start = len(answer.tokens)
    answer.tokens.extend(render_reply(text, most - start - 1, tokenizer))
    answer.told.append(range(start, len(answer.tokens)))
    answer.calls.append(Call(said.text, tokenizer.decode(answer.tokens[start:]), reply.wrong))


def _text(answer: Answer, tokenizer: Tokenizer) -> str:
    """Its last message."""
    return tokenizer.decode(token for token in answer.last if token != tokenizer.end)
