"""Another program reads the exported tokenizer and finds the same ids."""

import pytest
from tokenizers import Tokenizer as Other

from megachat.tokenizer.tokenizer import CONTROLS, SPACE
from megachat.tokenizer.tokenizer_json import tokenizer_json
from megachat.tokenizer.train import torture


@pytest.fixture(scope="module")
def other(tokenizer):
    """The tokenizer as Hugging Face's library has it."""
    return Other.from_str(tokenizer_json(tokenizer))


def test_texts_have_the_same_ids(tokenizer, other, texts):
    for text in [*texts, "x" * 500 + " " * 40, *torture(500)]:
        if SPACE not in text:
            assert other.encode(text).ids == tokenizer.encode(text)


def test_no_text_becomes_a_control_token(tokenizer, other):
    controls = {tokenizer.pad, tokenizer.bos, tokenizer.eos, *[other.token_to_id(name) for name in CONTROLS]}
    assert not controls & set(other.encode("".join(CONTROLS) + "<s></s><pad>").ids)


def test_ids_come_back_as_text(tokenizer, other, texts):
    for text in texts:
        assert other.decode(tokenizer.encode(text), skip_special_tokens=False) == text
