"""How a text is read: its sentences, words, capital words and language."""
