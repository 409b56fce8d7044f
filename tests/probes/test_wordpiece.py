"""WordPiece: the pieces of words worked out by hand, and vocabularies that do not differ from run to run."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer

from xares_onnx.errors import UsageError
from xares_onnx.probes.wordpiece import WordPiece

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
# [UNK] is 1, [CLS] 2 and [SEP] 3
TOKENS = [*MARKS, "a", "dog", "dogs", "##s", "bark", "##ing", "##i", "##n", "##g", ".", "'", "cafe", "[", "]", "pad", "狗"]


def vocabulary_file(folder: Path, tokens: list[str]) -> Path:
    path = folder / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a dog", ["a", "dog"]),
        ("A DOG barks.", ["a", "dog", "bark", "##s", "."]),
        ("dogs barking", ["dogs", "bark", "##ing"]),  # the longest piece
        ("a dogg", ["a", "dog", "##g"]),
        ("a dogx barks", ["a", "[UNK]", "bark", "##s"]),  # a word is spelt, or it is not
        ("dog's", ["dog", "'", "[UNK]"]),
        ("Café\tdog \n", ["cafe", "dog"]),  # no accents, any space
        ("狗狗dog", ["狗", "狗", "dog"]),  # a Chinese character is a word
        ("dog\x00\u200bs", ["dogs"]),  # controls are no text
        ("[PAD]", ["[", "pad", "]"]),
        ("dog" + "g" * 97, ["dog", *["##g"] * 97]),
        ("dog" + "g" * 98, ["[UNK]"]),  # longer than 100 characters
        ("", []),
        (" \t", []),
    ],
)
def test_words_are_cut_as_bert_does_it(text: str, pieces: list[str], tmp_path: Path) -> None:
    vocabulary = WordPiece.from_file(vocabulary_file(tmp_path, TOKENS))
    expected = [TOKENS.index(piece) for piece in ["[CLS]", *pieces, "[SEP]"]]
    assert vocabulary.encode(text) == expected
    assert WordPiece(TOKENS).encode(text) == expected


@given(st.text(st.sampled_from("adogsbrkin. 'ÉéX狗\u0301"), max_size=30))
def test_encodings_are_those_of_the_librarys_own_bert_tokenizer(text: str) -> None:
    tokens = [*TOKENS, *"osbrkin", *(f"##{c}" for c in "adokb")]
    reference = BertWordPieceTokenizer({token: number for number, token in enumerate(tokens)}, lowercase=True)
    assert WordPiece(tokens).encode(text) == reference.encode(text).ids


def test_size_and_digest_are_those_of_the_file(tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path, TOKENS)
    vocabulary = WordPiece.from_file(path)
    assert (vocabulary.size, vocabulary.digest) == (len(TOKENS), hashlib.sha256(path.read_bytes()).hexdigest())
    swapped = WordPiece([*TOKENS[:4], *TOKENS[:3:-1]])
    assert swapped.digest != vocabulary.digest
    path.write_bytes("\r\n".join(TOKENS).encode())  # ends of line are no part of it
    assert WordPiece.from_file(path).digest == vocabulary.digest


def test_a_file_that_is_no_vocabulary_is_wrong_usage(tmp_path: Path) -> None:
    def fails(path: Path, match: str) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            WordPiece.from_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "none.txt", r"cannot be read \(No such file")
    fails(tmp_path, "it is not a regular file")
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)))
    fails(tmp_path / "weights.bin", "not text")
    (tmp_path / "empty.txt").touch()
    fails(tmp_path / "empty.txt", r"has no \[PAD\], \[UNK\], \[CLS\], \[SEP\];")
    for mark in MARKS:
        fails(vocabulary_file(tmp_path, [token for token in TOKENS if token != mark]), f"has no \\{mark};")
    fails(vocabulary_file(tmp_path, [*TOKENS, "b", "dog"]), "the line 'dog' 2 times")
    fails(vocabulary_file(tmp_path, [*TOKENS, "\x1b[2J", "\x1b[2J"]), r"the line '\\x1b\[2J' 2 times")


# ---------------------------------------------------------------- trained


def merged_by_hand(words: dict[str, int], size: int) -> list[str]:
    """Pieces in the order of their making: the characters, then merges of the pair that occurs most.

    Of equally frequent pairs, the one of the earlier pieces.
    """
    spelt = {word: [word[0], *(f"##{c}" for c in word[1:])] for word in words}
    starts = {c for word in words for c in word}
    pieces = [*MARKS, *sorted({piece for word in spelt.values() for piece in word[1:]}), *sorted(starts)]
    while len(pieces) < size:
        counts: dict[tuple[str, str], int] = {}
        for word, own in spelt.items():
            for pair in itertools.pairwise(own):
                counts[pair] = counts.get(pair, 0) + words[word]
        if not counts or max(counts.values()) < 2:
            break
        first, second = min(counts, key=lambda pair: (-counts[pair], pieces.index(pair[0]), pieces.index(pair[1])))
        merged = first + second.removeprefix("##")
        if merged not in pieces:
            pieces.append(merged)
        for own in spelt.values():
            i = 0
            while i < len(own) - 1:
                if (own[i], own[i + 1]) == (first, second):
                    own[i : i + 2] = [merged]
                i += 1
    return pieces


@given(st.lists(st.text("abc", min_size=1, max_size=7), min_size=1, max_size=12), st.sampled_from([8, 14, 30_522]))
def test_a_vocabulary_is_that_of_merging_by_hand(words: list[str], size: int) -> None:
    expected = merged_by_hand({word: words.count(word) for word in words}, size)
    vocabulary = WordPiece.trained([" ".join(words)], size=size)
    assert (vocabulary.size, vocabulary.digest) == (len(expected), WordPiece(expected).digest)


def test_a_word_that_comes_often_is_one_token_and_a_new_one_is_spelt() -> None:
    vocabulary = WordPiece.trained(["The dog barks.", "A DOG, barking loudly", "dogs"])
    start, *pieces, end = vocabulary.encode("dog bark dok")
    assert (start, end) == (2, 3)
    assert len(pieces) == 1 + 1 + len(vocabulary.encode("dok")[1:-1])
    assert 1 not in pieces
    assert vocabulary.encode("dög") == vocabulary.encode("DOG")
    assert vocabulary.encode("x") == [2, 1, 3]
    assert vocabulary.size < 60


@pytest.mark.parametrize("captions", [[], [""], ["  "]])
def test_no_words_give_the_marks_alone(captions: list[str]) -> None:
    vocabulary = WordPiece.trained(captions)
    assert (vocabulary.size, vocabulary.encode("a dog")) == (4, [2, 1, 1, 3])


def test_every_character_is_kept() -> None:
    characters = [chr(0x4E00 + i) for i in range(1500)]  # the trainer would keep a thousand
    vocabulary = WordPiece.trained([" ".join(characters[i : i + 9]) for i in range(0, 1500, 9)] + ["ab ba"], size=10)
    assert 1 not in vocabulary.encode(" ".join(characters) + " aabb")


def captions_with_ties() -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopé狗", k=rng.randint(2, 8))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=8)) for _ in range(150)]


TRAIN = """
import random, sys
sys.path.insert(0, {tests!r})
from test_wordpiece import captions_with_ties
from xares_onnx.probes.wordpiece import WordPiece
captions = captions_with_ties()
random.Random({seed}).shuffle(captions)
vocabulary = WordPiece.trained(iter(captions), size={size})
sys.stdout.write(vocabulary.digest + str(vocabulary.encode("abcd bca " + captions_with_ties()[0])))
"""


def test_a_vocabulary_does_not_depend_on_order_process_or_threads() -> None:
    found = {}
    for seed, size in [(0, 30_522), (1, 30_522), (2, 30_522), (3, 400), (4, 400)]:
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "RAYON_NUM_THREADS": str(1 + seed % 3)}
        program = TRAIN.format(tests=str(Path(__file__).parent), seed=seed, size=size)
        ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        assert ran.stderr == ""
        found.setdefault(size, set()).add(ran.stdout)
    expected = WordPiece.trained(captions_with_ties())
    assert found[30_522] == {expected.digest + str(expected.encode("abcd bca " + captions_with_ties()[0]))}
    assert len(found[400]) == 1


def test_nothing_is_printed_and_no_variable_set(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = dict(os.environ)
    WordPiece.trained(captions_with_ties()).encode("abc")
    WordPiece.from_file(vocabulary_file(tmp_path, TOKENS)).encode("a dog")
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before
