"""How a conversation becomes tokens: `<s>`, then for each message its role, its content, `<|end|>`.

Tokens and mask are made together, message by message: a prompt's tokens are always a prefix of the whole
conversation's, because no token ever crosses from one message into the next. The `<|end|>` of an answer is
trained on: it is how the model learns to stop. A call of a tool is what the assistant says, and ends like
it; what the tool says is not trained on. The roles are control tokens, which neither user nor tool can write.
"""

from collections.abc import Sequence

from megachat.data.conversations import Conversation, Message
from megachat.tokenizer.tokenizer import TOOL, Tokenizer


def render(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens and mask; the mask is 1 on what the assistant says and on the `<|end|>` after it, but for
    messages of the weight 0.

    Example: user "Hi", assistant "Yes" -> tokens  <s> <|user|> Hi <|end|> <|assistant|> Yes <|end|>
                                           mask     0     0     0     0          0        1     1
    """
    tokens, mask = [tokenizer.bos], [0]
    for message in conversation.messages:
        content = [*tokenizer.encode(message.content), tokenizer.end]
        tokens += [role(message, tokenizer), *content]
        says = message.weight if message.role == "assistant" else 0
        mask += [0, *[says] * len(content)]
    return tokens, mask


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Tokens up to and including the `<|assistant|>` that asks for an answer, which `tokenizer.end` ends."""
    if not messages or messages[-1].role == "assistant":
        raise ValueError("a prompt ends with a message of the user's or a tool's; there is nothing to answer")
    tokens, _ = render(Conversation(tuple(messages)), tokenizer)
    return [*tokens, tokenizer.assistant]


def render_answer(answer: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens that follow `render_prompt` when this is the answer: its own, and `<|end|>`."""
    return [*tokenizer.encode(answer), tokenizer.end]


def render_reply(text: str, room: int, tokenizer: Tokenizer) -> list[int]:
    """What a tool says to a call that the assistant has ended, and the `<|assistant|>` that asks to go on: at
    most `room` tokens, three at least. The end of a longer text is lost.
    """
    said = tokenizer.encode(text)[: room - 3]
    return [role(Message("tool", text), tokenizer), *said, tokenizer.end, tokenizer.assistant]


def role(message: Message, tokenizer: Tokenizer) -> int:
    """The control token that opens a message."""
    roles = {
        "system": tokenizer.system,
        "user": tokenizer.user,
        "assistant": tokenizer.assistant,
        "tool": tokenizer.tool,
    }
    token = roles[message.role]
    if token is None:
        raise ValueError(
            f"the tokenizer has no {TOOL}, which opens what a tool says, for it was trained by an earlier "
            "version; train it again with `megachat tokenizer`, or leave out conversations with tools"
        )
    return token
