"""megachat builds a ChatGPT from raw text: clean, tokenize, pretrain, align, evaluate, and talk to it."""

__version__ = "0.1.0"
