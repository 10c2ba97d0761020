"""From text to ids, without torch.

In reading order: tokenizer (text to ids and back), chat_format (conversations to ids and a mask), and two
stages: train (learns the vocabulary) and encode (writes the corpus as shards of ids).
"""
