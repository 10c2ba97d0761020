"""The one training loop and what it needs. Read loop first, then pretrain; the rest are its parts."""
