"""Exact round trips, control tokens out of reach, and decoding as tokens come."""

import pickle
import random
from pathlib import Path

import pytest
import sentencepiece

from megachat.tokenizer import tokenizer as module
from megachat.tokenizer.tokenizer import (
    BOS,
    CONTROLS,
    EOS,
    FILE,
    PAD,
    SPACE,
    UNKNOWN,
    StreamDecoder,
    Tokenizer,
)
from megachat.tokenizer.train import torture


def of_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The byte tokens of some bytes; they stand at 9 to 264, after the special tokens."""
    tokens = [9 + byte for byte in data]
    assert [tokenizer.bytes_of(token) for token in tokens] == [bytes([byte]) for byte in data]
    return tokens


def test_every_character_of_unicode_comes_back(tokenizer):
    characters = [chr(code) for code in range(0, 0x110000, 5) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 10_000):
        text = "".join(characters[start : start + 10_000])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_texts_with_every_pitfall_come_back(tokenizer):
    texts = list(torture(3000))
    for text, tokens in zip(texts, tokenizer.encode_many(texts), strict=True):
        assert tokenizer.decode(tokens) == text


AWKWARD = ["", " ", "   ", "\0", "a\0b", "\n", "\n\n  \n", "\r\n", "\t\tx", " a ", "a  b", "中文。", "👩‍👩‍👧"]
AWKWARD += ["a\u2581b", "\u2581", "\u2581\u2581", " \u2581 ", "\u2585", "\u2047", "\ufffd", "\ufeffa"]
AWKWARD += ["e\u0301\u00e9", "<|user|>", "<0x41>", "<s>"]


@pytest.mark.parametrize("text", AWKWARD)
def test_an_awkward_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", [*CONTROLS, PAD, UNKNOWN, BOS, EOS])
def test_text_never_becomes_a_control_token(tokenizer, name):
    for text in (name, f"a{name}b", f" {name} {name}", f"<|{name}|>", f"{SPACE}{name}\n"):
        assert min(tokenizer.encode(text)) >= 9
    special = {tokenizer.pad, 1, tokenizer.bos, tokenizer.eos}
    special |= {tokenizer.system, tokenizer.user, tokenizer.assistant, tokenizer.end, tokenizer.tool}
    assert special == set(range(9))


def test_the_character_that_stands_for_a_space_is_written_as_its_three_bytes(tokenizer):
    between = of_bytes(tokenizer, b"\xe2\x96\x81")
    assert tokenizer.encode("a\u2581b") == [*tokenizer.encode("a"), *between, *tokenizer.encode("b")]


def test_remembered_words_give_the_tokens_of_sentencepiece(tokenizer, texts):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    texts = [*texts, *(text for text in torture(500) if SPACE not in text)]
    for _ in range(2):  # at first sight, and from memory
        assert tokenizer.encode_many(texts) == theirs.encode(texts)
    assert [tokenizer.decode(theirs.encode(text)) for text in texts] == texts


def test_a_full_memory_is_forgotten_and_changes_nothing(tokenizer, monkeypatch):
    expected = tokenizer.encode("to be or not to be")
    monkeypatch.setattr(module, "KNOWN", 3)
    small = Tokenizer(tokenizer.model)
    assert [small.encode("to be or not to be") for _ in range(3)] == [expected] * 3
    assert small._known == {}


def test_half_a_surrogate_pair_is_refused_with_its_place(tokenizer):
    with pytest.raises(ValueError, match=r"half a surrogate pair, '\\ud800' in ' b\\ud800c', which is not"):
        tokenizer.encode("a b\ud800c d")


def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer):
    for text in ["def f(x):\n    return x\n", "中文", "a\u2581b", "👩‍👩‍👧", *torture(50)]:
        assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.token_bytes[:8].tolist() == [0] * 8
    assert tokenizer.token_bytes.shape == (tokenizer.vocab,) == (800,)


def test_control_tokens_are_no_text(tokenizer):
    hi = tokenizer.encode("Hi")
    assert tokenizer.decode([tokenizer.bos, tokenizer.user, *hi, tokenizer.end, tokenizer.pad]) == "Hi"


def test_bytes_that_are_no_utf8_become_the_replacement_character(tokenizer):
    assert tokenizer.decode(of_bytes(tokenizer, b"a\xffb\xe4\xb8")) == "a\ufffdb\ufffd"


def test_a_label_that_is_no_token_is_not_decoded_to_something(tokenizer):
    with pytest.raises(KeyError, match="-100"):
        tokenizer.decode([-100])


def test_a_stream_holds_a_character_back_until_it_is_whole(tokenizer):
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in of_bytes(tokenizer, "中a".encode())] == ["", "", "中", "a"]
    assert stream.finish() == ""


def test_a_stream_that_ends_in_half_a_character_says_so(tokenizer):
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in of_bytes(tokenizer, b"\xe4\xb8")] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_streaming_any_tokens_gives_what_decoding_them_gives(tokenizer):
    dice = random.Random(0)
    for _ in range(300):
        # Half of them bytes: what an untrained model writes is mostly no UTF-8.
        tokens = [dice.randrange(dice.choice((265, tokenizer.vocab))) for _ in range(dice.randrange(30))]
        stream = StreamDecoder(tokenizer)
        assert "".join(map(stream.push, tokens)) + stream.finish() == tokenizer.decode(tokens)


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / FILE)
    for path in (tmp_path, tmp_path / FILE, str(tmp_path)):
        assert Tokenizer.load(path).sha256 == tokenizer.sha256
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_worker_process_gets_the_same_tokenizer(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.sha256 == tokenizer.sha256
    assert copy.encode("中文 <|user|>") == tokenizer.encode("中文 <|user|>")


def test_a_missing_tokenizer_says_what_trains_one(tmp_path):
    with pytest.raises(
        ValueError, match=r"no tokenizer at .*tokenizer.model; `megachat tokenizer` trains one"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("data", "why"), [(b"", "is empty"), (b"no model", "not a sentencepiece model")])
def test_a_damaged_tokenizer_is_refused(tmp_path, data, why):
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(ValueError, match=why):
        Tokenizer.load(tmp_path)


def trained(path: Path, **settings) -> bytes:
    """A sentencepiece model that somebody else trained."""
    settings = {
        "vocab_size": 280,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "model_prefix": str(path),
    } | settings
    sentences = iter(["to be or not to be that is the question"] * 50)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_type="bpe", **settings)
    return Path(f"{path}.model").read_bytes()


def test_a_model_without_the_chat_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no <pad>; train it with `megachat tokenizer`"):
        Tokenizer(trained(tmp_path / "other", byte_fallback=True))


def test_a_model_whose_tokens_cross_words_is_refused(tmp_path):
    settings = {"byte_fallback": True, "vocab_size": 320, "control_symbols": list(CONTROLS), "pad_id": 3}
    assert Tokenizer(trained(tmp_path / "words", **settings)).vocab <= 320
    with pytest.raises(ValueError, match=r"tokens that cross words"):
        Tokenizer(trained(tmp_path / "phrases", split_by_whitespace=False, **settings))
