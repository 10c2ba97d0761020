"""The tokenizer as Hugging Face's `tokenizer.json`: the same ids from other programs.

A sentencepiece BPE model has no list of merges: two neighbours may merge if what they make is a piece, the
best piece first. So the merges are all ways to cut a piece in two pieces, in the order of the pieces. The
control symbols are pieces that no merge makes, hence here, too, no text becomes one. A real U+2581 in a text
is the one difference: there it becomes a space.
"""

import json
from typing import Any

from megachat.tokenizer.tokenizer import SPACE, UNKNOWN, Tokenizer


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """What `tokenizer.json` holds."""
    pieces = tokenizer.pieces
    ids = {piece: token for token, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in tokenizer.learnt
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    model = {
        "type": "BPE",
        "unk_token": UNKNOWN,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": ids,
        "merges": merges,
    }
    whole: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }
    return json.dumps(whole, ensure_ascii=False)
