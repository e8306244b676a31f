"""Emu3: texts and image tokens of one vocabulary, by one transformer."""
