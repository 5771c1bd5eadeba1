"""Strings that are text: Python's, like JSON's, can hold halves of characters."""


def unicode(text: str) -> str:
    r"""The same text. JSON can spell half a character ("\ud800"), which no tokenizer takes: ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the string is not valid Unicode at character {error.start}") from None
    return text
