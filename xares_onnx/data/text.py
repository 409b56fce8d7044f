"""Transcripts: how they are normalised before they are learnt and compared, and how errors are counted."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import jiwer
import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


class _Table(dict[int, str]):
    """For `str.translate`: what a function makes of a character, asked once for each."""

    def __init__(self, function: Callable[[str], str]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, code: int) -> str:
        self[code] = self._function(chr(code))
        return self[code]


# Typeset or typed where an apostrophe is meant: quotation marks, modifier letter, grave, acute. U+0149 is n behind one.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u0060\u00b4", "'") | {"\u0149": "'n"})
_VISIBLE = _Table(lambda c: "" if unicodedata.category(c) == "Cf" and c != "\u200b" else c)
_WRITTEN = _Table(lambda c: c if unicodedata.category(c)[0] in "LMN" or c == "'" else " ")
# Where only letters, marks, numbers and apostrophes are left, \w is a letter or a number.
_WORD = re.compile(r"\w[^\s']*(?:'\w[^\s']*)*")


def normalise(text: str) -> str:
    """A transcript as it is learnt and compared: words of lower case letters, marks and numbers, one space between them.

    In this order:

    * Invisible format characters (category Cf: soft hyphen, joiners, direction marks) are removed, except for the zero width
      space, which separates words.
    * Typographic apostrophes (U+2018, U+2019, U+201B, U+02BC, and the grave and acute typed in their place) become '.
    * NFKC: the same text has one spelling, whether its accents are composed or not, its letters wide, joined or
      raised. No accent is stripped.
    * Lower case; then NFKC again, as a lower case letter may compose where its capital does not.
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


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """Of each utterance, word errors (substitutions, deletions and insertions) and words of the reference (utterances, 2).

    Words are what white space separates. The word error rate is the ratio of the two sums. `ValueError` for a reference
    without words, or another number of hypotheses than of references.
    """
    return _errors([text.split() for text in references], [text.split() for text in hypotheses])


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """`word_errors` of characters, one space between words being one of them (utterances, 2)."""
    return _errors([[*" ".join(text.split())] for text in references], [[*" ".join(text.split())] for text in hypotheses])


def _errors(references: list[list[str]], hypotheses: list[list[str]]) -> Counts:
    for number, reference in enumerate(references):
        if not reference:
            raise ValueError(f"reference {number} is empty, so its error rate is not defined")

    def as_given(tokens: Any) -> Any:
        return tokens

    compared = jiwer.process_words(references, hypotheses, as_given, as_given)  # type: ignore[arg-type]
    errors = [
        sum(max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in chunks if c.type != "equal")
        for chunks in compared.alignments
    ]
    return np.array([errors, [len(reference) for reference in references]], np.int64).T.copy()
