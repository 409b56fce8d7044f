"""Transcripts against their definitions: what a normalised text may look like, and edit distances counted the long way."""

# ruff: noqa: RUF001  (look-alike characters are what is tested)

from __future__ import annotations

import subprocess
import sys
import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xares_onnx.data.text import lower_cased, normalise
from xares_onnx.metrics.words import character_errors, word_errors

# Texts in which the rare cases are common: apostrophes, marks, format characters, capitals that change length, compositions.
tricky = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from(
            "aAé'’‘ʼ`´ŉ.-_ \t\n"
            "\u00a0\u00ad\u200b\u200c\u200d\u2060\ufeff\u0301\u030c\u0307\u0331"
            "İΣςßẞﬁ²½①〇１०中नी\U0001f600"
        ),
    ),
    max_size=12,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MISTER QUILTER IS THE APOSTLE", "mister quilter is the apostle"),
        ("  Hello,\tworld!\n(twice) ", "hello world twice"),
        ("well-known state—of–the/art e_mail", "well known state of the art e mail"),
        ("Don't stop, it's 5 o'clock", "don't stop it's 5 o'clock"),
        ("Don’t don‘t donʼt don`t don´t don‛t don＇t", "don't don't don't don't don't don't don't"),
        ("'tis the dogs' 'quoted' rock 'n' roll ' a''b", "tis the dogs quoted rock n roll a b"),
        ("l'été d'Été naïve Ångström", "l'été d'été naïve ångström"),
        ("cafe\u0301 au lait", "caf\u00e9 au lait"),  # one spelling of an accent, which stays
        ("e\u0301't", "é't"),  # an apostrophe behind a mark is inside its word
        ("q\u0301't", "q\u0301't"),  # also where the mark does not compose
        ("J\u030cakub", "\u01f0akub"),  # composes only once it is in lower case
        ("ﬁnal ２０２６ x²", "final 2026 x2"),
        ("co\u00adoperate \u200ehe\u200fllo\ufeff", "cooperate hello"),  # what is not seen is not there
        ("می\u200cخواهم", "میخواهم"),
        ("e\u200d\u0301", "é"),
        ("ไทย\u200bไทย", "ไทย ไทย"),  # the zero width space separates words
        ("हिन्दी में 〇 १२", "हिन्दी में 〇 १२"),  # vowel signs are marks, and a number need not be a decimal digit
        ("ΟΔΥΣΣΕΥΣ ΣΑΣ.", "οδυσσευς σας"),
        ("你好，世界！", "你好 世界"),
        ("STRASSE Straße", "strasse straße"),
        ("\u0301abc \u0301 'x a'\u0301b", "abc x a b"),
        ("ŉ", "n"),
        ("$ 100% a+b 😀", "100 a b"),
        ("", ""),
        (" ... ' ", ""),
    ],
)
def test_normalised_transcripts(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(tricky)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


def test_no_character_is_an_exception() -> None:
    everything = map(chr, range(sys.maxunicode + 1))
    special = [c for c in everything if c < "\u3000" or c.lower() != c or unicodedata.normalize("NFKC", c) != c]
    for start in range(0, len(special), 1000):
        # Between letters, before a mark, and behind a capital whose small letter depends on where its word ends.
        text = "".join(f" a{c}b {c}\u0301 Σ{c}" for c in special[start : start + 1000])
        once = normalise(text)
        assert normalise(once) == once
        assert allowed(once)


@given(tricky)
def test_normalised_text_is_words_of_letters_marks_numbers_and_inner_apostrophes(text: str) -> None:
    normalised = normalise(text)
    assert allowed(normalised)
    assert unicodedata.is_normalized("NFKC", normalised)
    assert normalised == normalised.lower()


def allowed(text: str) -> bool:
    kinds = ["'" if c == "'" else " " if c == " " else unicodedata.category(c)[0] for c in text]
    for before, kind, after in zip([" ", *kinds], kinds, [*kinds[1:], " "], strict=False):
        if kind == " " and (before == " " or after == " "):
            return False
        if kind == "'" and not (before in "LMN" and after in "LN"):
            return False
        if kind == "M" and before not in "LMN":
            return False
        if kind not in "LMN' ":
            return False
    return True


@given(st.text(st.sampled_from("abc xyz éü"), max_size=20))
def test_a_clean_text_is_left_alone(text: str) -> None:
    assert normalise(text) == " ".join(text.split())


def test_lower_case_alone_leaves_the_rest() -> None:
    assert lower_cased(" Don’t  STOP, Éva! Straße ") == " don’t  stop, éva! straße "


def distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Levenshtein's, by the whole table."""
    table = np.zeros((len(reference) + 1, len(hypothesis) + 1), int)
    table[:, 0], table[0] = np.arange(len(reference) + 1), np.arange(len(hypothesis) + 1)
    for i, wanted in enumerate(reference, start=1):
        for j, got in enumerate(hypothesis, start=1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (wanted != got))
    return int(table[-1, -1])


sentences = st.lists(st.text("ab", min_size=1, max_size=2), max_size=7).map(" ".join)
utterances = st.lists(st.tuples(sentences.filter(bool), sentences), max_size=4)


@given(utterances)
def test_word_errors_are_edit_distances(pairs: list[tuple[str, str]]) -> None:
    counts = word_errors([reference for reference, _ in pairs], [hypothesis for _, hypothesis in pairs])
    assert counts.shape == (len(pairs), 2)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[distance(r.split(), h.split()), len(r.split())] for r, h in pairs]


@given(utterances)
def test_character_errors_are_edit_distances_with_spaces(pairs: list[tuple[str, str]]) -> None:
    counts = character_errors([reference for reference, _ in pairs], [hypothesis for _, hypothesis in pairs])
    assert counts.shape == (len(pairs), 2)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[distance(r, h), len(r)] for r, h in pairs]


def test_errors_are_counted_utterance_by_utterance() -> None:
    references = ["the cat sat", "a", "one two", "same text"]
    hypotheses = ["the hat sat down", "", "two", "same text"]
    assert word_errors(references, hypotheses).tolist() == [[2, 3], [1, 1], [1, 2], [0, 2]]
    assert character_errors(references, hypotheses).tolist() == [[6, 11], [1, 1], [4, 7], [0, 9]]


def test_white_space_separates_and_is_no_error() -> None:
    assert word_errors([" a  b\tc "], ["a b\u00a0 c"]).tolist() == [[0, 3]]
    assert character_errors([" a  b\tc "], ["  a b c"]).tolist() == [[0, 5]]


@pytest.mark.parametrize("count", [word_errors, character_errors])
def test_an_empty_reference_has_no_error_rate(count: type) -> None:
    with pytest.raises(ValueError, match="reference 1 is empty"):
        count(["a", " "], ["a", "b"])
    with pytest.raises(ValueError):
        count(["a", "b"], ["a"])


def test_transcripts_need_no_torch() -> None:
    code = "import sys, xares_onnx.data.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
