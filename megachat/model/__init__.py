"""The language model, its variants for rewards and values, and generation: plain torch that names no rank."""
