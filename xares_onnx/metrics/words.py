"""Word and character errors of transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """(utterances, 2): word errors (substitutions, deletions and insertions), and words of the reference.

    White space separates words. The word error rate is the ratio of the two sums. Raises `ValueError` for a reference
    without words, or if the numbers of references and hypotheses differ.
    """
    return _errors([text.split() for text in references], [text.split() for text in hypotheses])


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """(utterances, 2): the same for characters, with one space between words as a character."""
    return _errors([[*" ".join(text.split())] for text in references], [[*" ".join(text.split())] for text in hypotheses])


def _errors(references: list[list[str]], hypotheses: list[list[str]]) -> Counts:
    for number, reference in enumerate(references):
        if not reference:
            raise ValueError(f"reference {number} is empty, so its error rate is not defined")

    import jiwer  # needed only for transcripts

    def as_given(tokens: Any) -> Any:
        return tokens

    compared = jiwer.process_words(references, hypotheses, as_given, as_given)  # type: ignore[arg-type]
    errors = [
        sum(max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in chunks if c.type != "equal")
        for chunks in compared.alignments
    ]
    return np.array([errors, [len(reference) for reference in references]], np.int64).T.copy()
