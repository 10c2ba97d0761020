"""What answers the policy while it writes: tools that it calls in the middle of an answer.

A call is text, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and what the tool says is a
message of the role `tool`, both as fine-tuning reads them from conversations (`megachat/data/formats.py`). A
call that is wrong is told so in the same way: a policy that is learning to call makes every mistake there is,
and none of them ends the training.
"""

import ast
import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from megachat.align.sandbox import Limits
from megachat.config import Config
from megachat.data.conversations import Prompt
from megachat.data.formats import CALL, CALLED, Record, is_call


@dataclass(frozen=True, slots=True)
class Call:
    """A message of the policy's that was replied to, and the reply."""

    asked: str
    told: str
    wrong: bool
    """Whether the reply is an error."""

    def __str__(self) -> str:
        """As one line."""
        return f"{self.asked} -> {self.told}"


@dataclass(frozen=True, slots=True)
class Said:
    """What the policy has just said, and what came before it."""

    prompt: Prompt
    calls: tuple[Call, ...]
    """The earlier ones of the same answer."""
    text: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What the environment says to it."""

    text: str
    wrong: bool = False
    """Whether it is an error."""


class Environment(Config):
    """What is there to be called while the policy answers."""

    turns: PositiveInt
    """Calls in one answer, at most; one that calls again after them has not finished."""
    at_once: PositiveInt
    """Calls that one rank replies to side by side."""

    def tools(self) -> list[Record]:
        """What the system message tells the policy of them, each with its name and parameters."""
        raise NotImplementedError

    def reply(self, said: Said) -> Reply | None:
        """What comes back, which must follow from `said` alone. None: the answer is at its end."""
        raise NotImplementedError


class Calculator(Environment):
    """Arithmetic: + - * / // % ** and parentheses."""

    digits: Annotated[int, Field(gt=0, le=4000)]
    """Numbers of more digits are refused."""

    def tools(self) -> list[Record]:
        """One."""
        return [described("calculator", "Works out arithmetic.", "expression", "such as (1 + 2) * 3")]

    def reply(self, said: Said) -> Reply | None:
        """What the expression comes to."""
        return replied(said.text, "calculator", "expression", lambda text: calculated(text, self.digits))


class Python(Environment):
    """A program, run in a sandbox; each starts anew."""

    limits: Limits
    """What running one may take."""
    longest: PositiveInt
    """Characters of its output that come back; of more the beginning."""

    def tools(self) -> list[Record]:
        """One."""
        return [described("python", "Runs a program and returns what it prints.", "code", "such as print(1)")]

    def reply(self, said: Said) -> Reply | None:
        """What the program has printed, or the last line of its error."""
        return replied(said.text, "python", "code", self._run)

    def _run(self, program: str) -> str:
        outcome = self.limits.run(program)
        output = outcome.output.strip()
        if outcome.ended:
            return output[: self.longest]
        if outcome.late:
            raise Mistake(f"the program took longer than {self.limits.seconds:g} seconds")
        if "Traceback (most recent call last):" in output:
            raise Mistake(output.rpartition("\n")[2][: self.longest])
        raise Mistake("the program has left before its end")


class Mistake(Exception):
    """What is wrong with a call, for the one who called."""


def described(name: str, what: str, argument: str, example: str) -> Record:
    """A tool with one argument, a text."""
    inner = {argument: {"type": "string", "description": example}}
    return {
        "name": name,
        "description": what,
        "parameters": {"type": "object", "properties": inner, "required": [argument]},
    }


def replied(said: str, tool: str, key: str, act: Callable[[str], str]) -> Reply | None:
    """What a tool with one argument makes of a message; of one that calls nothing None."""
    if not is_call("assistant", said):
        return None
    try:
        return Reply(act(argument(said, tool, key)))
    except Mistake as mistake:
        return Reply(f"error: {mistake}", wrong=True)


def argument(said: str, tool: str, key: str) -> str:
    """The argument in the call that a message ends with."""
    inner = said.rpartition(CALL)[2].rstrip().removesuffix(CALLED)
    try:
        call: Any = json.loads(inner)
    except (ValueError, RecursionError):
        raise Mistake("the call is not JSON") from None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Mistake('a call is {"name": ..., "arguments": {...}}')
    if call["name"] != tool:
        raise Mistake(f"there is no tool {call['name'][:40]!r}; there is {tool}")
    given = call.get("arguments")
    if not isinstance(given, dict) or not isinstance(given.get(key), str):
        raise Mistake(f'{tool} takes {{"{key}": "a text"}}')
    value: str = given[key]
    return value


LONGEST = 1000
"""Characters of an expression."""

WRITTEN = re.compile(r"[0-9.eE_+\-*/%()\s]*")
"""What an expression is made of."""

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculated(expression: str, digits: int) -> str:
    """What it comes to: integers exactly, others to 12 digits. Example: calculated("7 / 2", 100) -> "3.5" """
    if len(expression) > LONGEST:
        raise Mistake(f"the expression has more than {LONGEST} characters")
    if not WRITTEN.fullmatch(expression):
        raise Mistake("an expression is made of numbers, + - * / // % ** and parentheses")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, digits)
        return str(value) if isinstance(value, int) else f"{value:.12g}"
    except ZeroDivisionError:
        raise Mistake("division by zero") from None
    except OverflowError:
        raise Mistake("a number is too large") from None
    except (SyntaxError, ValueError):
        raise Mistake("this is no expression") from None
    except (RecursionError, MemoryError):
        raise Mistake("the expression is too deep") from None


def _value(node: ast.expr, digits: int) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return _bounded(value, digits)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return _bounded(UNARY[type(op)](_value(operand, digits)), digits)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bounded(_power(_value(left, digits), _value(right, digits), digits), digits)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return _bounded(BINARY[type(op)](_value(left, digits), _value(right, digits)), digits)
    raise Mistake("this is no expression")


def _power(base: int | float, exponent: int | float, digits: int) -> int | float:
    # Before it is worked out: 9**9**9 has more digits than there is memory.
    exact = isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1
    if exact and exponent * math.log10(abs(base)) > digits + 1:
        raise OverflowError
    value: int | float | complex = base**exponent
    if isinstance(value, complex):
        raise Mistake("the root of a negative number")
    return value


def _bounded(value: int | float, digits: int) -> int | float:
    if not math.isfinite(value) or abs(value) >= 10**digits:
        raise OverflowError
    return value
