"""Text that came out of a file, made fit for a terminal: what would act on the terminal is shown instead, and nothing is hidden."""

from __future__ import annotations

import unicodedata

# Marks that reorder what follows, and the byte order mark: invisible, and used to make one text look like another.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"}


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return `text` with every control character as its picture (␛ for escape), and what has none as U+FFFD.

    An escape sequence is so no longer one, and its text stays visible: a template cannot hide a part of itself. With `lines`,
    newlines and tabs stay; without, every run of white space is one blank.

    >>> printable("a\x1b[31mred\nb")
    'a␛[31mred b'
    """
    plain = text.replace("\r\n", "\n") if lines else " ".join(text.split())
    return "".join(c if c in "\n\t" else _shown(c) for c in plain)


def _shown(character: str) -> str:
    if character in _DIRECTIONS or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return _PICTURES.get(ord(character), "\ufffd")
    return character
