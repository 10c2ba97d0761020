"""STAGE chat: talk to a run's model in the terminal, `megachat chat run=runs/quickstart`.

With `prompt=...` it answers once, prints the answer and nothing else on stdout, and ends.
The conversation is kept as long as it fits into the model's context; then the oldest question goes, with its
answer. A base model (`stage=pretrain`) has never seen a conversation, so it continues the text instead of
answering.
What a model writes goes to a terminal, so control characters other than newline and tab are left out.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import ClassVar, Literal, get_args

from megachat.data.conversations import Message
from megachat.evals.answers import best_device
from megachat.log import say
from megachat.model.draws import seed_of
from megachat.model.generate import Sampling, stream
from megachat.model.gpt import GPT
from megachat.parallel.checkpoint import load_model
from megachat.run import Stage, finished
from megachat.tokenizer.chat_format import render_prompt
from megachat.tokenizer.tokenizer import StreamDecoder, Tokenizer

Talkative = Literal["ppo", "dpo", "kto", "grpo", "sft", "pretrain"]
BEST_FIRST: tuple[Talkative, ...] = get_args(Talkative)
"""Which of a run's models to talk to, when none is named."""

HELP = """\
/reset   forget the conversation so far
/quit    leave (so does Ctrl-D)
/help    this list
Ctrl-C stops an answer. Anything else is said to the model."""


class Chat(Stage):
    """Talk to a run's model."""

    name: ClassVar[str] = "chat"
    recorded: ClassVar[bool] = False

    stage: Talkative | None
    """Whose model: `ppo`, `dpo`, `kto`, `grpo`, `sft` or `pretrain`; null takes the first of these
    that has finished."""
    prompt: str | None
    """A question to answer once; null opens a conversation."""
    system: str | None
    """A system message that every conversation begins with; null for none."""
    sampling: Sampling
    """How answers are written; one takes at most half of the model's context."""
    device: Literal["auto", "cpu", "cuda"]
    """Where the model runs; `auto` takes a GPU when there is one."""

    def reads(self) -> list[str]:
        """The one stage whose model it talks to."""
        return [self.chosen()]

    def chosen(self) -> Talkative:
        """The stage whose model it talks to."""
        if self.stage is not None:
            return self.stage
        for stage in BEST_FIRST:
            if finished(self.source(stage)):
                return stage
        raise ValueError(
            f"no model in {self.inputs} has finished training (looked for {', '.join(BEST_FIRST)}); "
            f"run `megachat pipeline run={self.inputs}` first, or name another run with run=..."
        )

    def execute(self) -> None:
        """Answers `prompt`, or talks until the user leaves."""
        stage = self.chosen()
        device = best_device(self.device)
        loaded = load_model(self.input(stage), device=device)
        assert isinstance(loaded.model, GPT), (
            f"{stage} holds a {type(loaded.model).__name__}, which cannot talk"
        )
        talk = Talk(
            loaded.model, loaded.tokenizer, self.sampling, self.seed, self.system, base=stage == "pretrain"
        )
        if self.prompt is not None:
            if not self.prompt.strip():
                raise ValueError("prompt is empty; leave it out to talk in the terminal")
            print("".join(talk.answer(self.prompt)))
            return
        say(f"{self.source(stage)}, step {loaded.step}, on {device}. /help lists the commands.")
        converse(talk, ask=read_line)


class Talk:
    """A conversation with a model, and as much of its past as fits."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        system: str | None,
        base: bool,
    ) -> None:
        """`base`: the model continues text, it does not answer."""
        longest = min(sampling.max_new_tokens, model.config.context // 2)
        self.sampling = sampling.model_copy(update={"max_new_tokens": longest})
        self.room = model.config.context - longest
        """Tokens of the context that a prompt may take."""
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.answers = 0
        """How many it has begun: each is drawn anew."""
        self.system = [] if system is None else [Message("system", system)]
        self.base = base
        self.past: list[Message] = []

    def answer(self, question: str) -> Iterator[str]:
        """The answer, piece by piece as it is written. Also one cut off becomes part of the conversation."""
        tokens = self.prompt(question)
        stop = {self.tokenizer.eos} if self.base else {self.tokenizer.end}
        decoder = StreamDecoder(self.tokenizer)
        pieces: list[str] = []
        seed = seed_of(self.seed, self.answers)
        self.answers += 1
        try:
            for token in stream(self.model, tokens, self.sampling, stop, seed):
                pieces.append(printable(decoder.push(token)))
                yield pieces[-1]
            pieces.append(printable(decoder.finish()))
            yield pieces[-1]
        finally:
            if not self.base:
                self.past += [Message("user", question), Message("assistant", "".join(pieces))]

    def prompt(self, question: str) -> list[int]:
        """The tokens the model continues; forgets the oldest turns until they leave room for the answer."""
        if self.base:
            return [self.tokenizer.bos, *self.tokenizer.encode(question)[-(self.room - 1) :]]
        while True:
            tokens = render_prompt([*self.system, *self.past, Message("user", question)], self.tokenizer)
            if len(tokens) <= self.room:
                return tokens
            if not self.past:
                raise ValueError(
                    f"this question is {len(tokens)} tokens long, and the model's context leaves {self.room} "
                    f"before an answer of up to {self.sampling.max_new_tokens}; shorten it"
                )
            self.past = self.past[2:]

    def reset(self) -> None:
        """Forgets the conversation."""
        self.past = []


def converse(talk: Talk, ask: Callable[[], str | None]) -> None:
    """Reads questions with `ask` and prints the answers, until it returns None or the user says /quit."""
    while (line := ask()) is not None:
        question = line.strip()
        if question in ("/quit", "/exit"):
            return
        if question == "/reset":
            talk.reset()
            say("Forgotten.")
        elif question.startswith("/") and " " not in question:
            say(HELP)
        elif question:
            try:
                for piece in talk.answer(question):
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                pass  # stops the answer, not the conversation
            except ValueError as mistake:
                say(str(mistake))
            sys.stdout.write("\n")
            sys.stdout.flush()


def read_line() -> str | None:
    """A line from the user; None at the end of the input. Ctrl-C takes a line back."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in `input`)
    try:
        return input("> " if sys.stdin.isatty() else "")
    except KeyboardInterrupt:
        say("\n(Ctrl-D or /quit to leave)")
        return ""
    except EOFError:
        sys.stdout.write("\n" if sys.stdin.isatty() else "")
        return None


def printable(text: str) -> str:
    """Text without the control characters that could move the cursor or recolour the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))
