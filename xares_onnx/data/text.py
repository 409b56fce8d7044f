"""How transcripts are normalised before heads learn them and metrics compare them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable


class _Table(dict[int, str]):
    """For `str.translate`: a function's result for a character, computed once per character."""

    def __init__(self, function: Callable[[str], str]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, code: int) -> str:
        self[code] = self._function(chr(code))
        return self[code]


# Written instead of an apostrophe: quotation marks, modifier letter, grave, acute. U+0149 is an n behind one.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u0060\u00b4", "'") | {"\u0149": "'n"})
_VISIBLE = _Table(lambda c: "" if unicodedata.category(c) == "Cf" and c != "\u200b" else c)
_WRITTEN = _Table(lambda c: c if unicodedata.category(c)[0] in "LMN" or c == "'" else " ")
# Once only letters, marks, numbers and apostrophes are left, \w is a letter or a number.
_WORD = re.compile(r"\w[^\s']*(?:'\w[^\s']*)*")


def normalise(text: str) -> str:
    """Normalise a transcript to words of lower case letters, marks and numbers with one space between them.

    In this order:

    * Invisible format characters (category Cf: soft hyphen, joiners, direction marks) are removed, except for the zero width
      space, which separates words.
    * Typographic apostrophes (U+2018, U+2019, U+201B, U+02BC, and the grave and acute typed in their place) become '.
    * NFKC: the same text has one spelling, whether its accents are composed or not, and its letters wide, joined or
      raised or not. No accent is stripped.
    * Lower case; then NFKC again, since a lower case letter may compose although its capital does not.
    * Every character that is not a letter, mark, number or ' (categories L, M, N) becomes a space.
    * A ' stays between a letter or number, with its marks, and another; elsewhere it becomes a space, and so do marks that
      follow no letter or number.
    * White space is collapsed and trimmed.

    Normalising twice changes nothing. The result may be empty.
    """
    text = unicodedata.normalize("NFKC", text.translate(_VISIBLE).translate(_APOSTROPHES)).lower()
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).translate(_WRITTEN)))


def lower_cased(text: str) -> str:
    """X-ARES's normalisation of transcripts: lower case, and nothing else."""
    return text.lower()
