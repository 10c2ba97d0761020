"""Raw text to token windows, without torch.

In reading order: document, sources, harvest (the embedded corpus), filters, dedup, clean (a stage), then,
once `megachat.tokenizer` has made ids of the text, shards and loader; conversations and questions are for
alignment.
"""
