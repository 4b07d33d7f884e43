"""Strings to token ids and back: tokenizers, chat format, streaming text. No torch, no ranks."""
