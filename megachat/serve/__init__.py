"""Talking to a trained model: chat (a stage) in the terminal."""
