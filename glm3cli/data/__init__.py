"""Tokenizer, chat prompts, and datasets."""
