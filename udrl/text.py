"""Words and numbers in text: the one definition of a prompt's length."""


def count_words(text: str) -> int:
    """Return the number of whitespace-separated words, the unit of every length in the project."""
    return len(text.split())
