"""Text to token numbers as BERT (uncased) tokenizes: lower case, no accents, punctuation apart, words in pieces.

A word is cut into the longest piece that starts it, then the longest that continues it; a word that the pieces cannot spell
is [UNK]. Every text lies between [CLS] and [SEP].
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordPiece as Model
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from ..errors import UsageError, foreign, printable
from ..foreign import ForeignFileError, read_small

_UNKNOWN, _START, _END = "[UNK]", "[CLS]", "[SEP]"
_MAX_BYTES = 64_000_000
_MARKS = ("[PAD]", _UNKNOWN, _START, _END)
_CONTINUES = "##"


class WordPiece:
    """A vocabulary and its tokenizer. `size` is the number of tokens, `digest` the sha256 of their lines in order."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """`tokens` in the order of their numbers, each once, with [PAD], [UNK], [CLS] and [SEP] among them."""
        numbers = {token: number for number, token in enumerate(tokens)}
        self.size = len(tokens)
        self.digest = hashlib.sha256("".join(f"{token}\n" for token in tokens).encode()).hexdigest()
        self._start, self._end = numbers[_START], numbers[_END]
        self._tokenizer = _tokenizer(numbers)

    @classmethod
    def trained(cls, captions: Iterable[str], *, size: int = 30_522) -> WordPiece:
        """Train a vocabulary on captions, whose order does not matter.

        It has their characters, and pieces from merging the most frequent pair of pieces, until there are `size` tokens or
        no pair occurs twice. All characters are kept, even if they are more than `size`.
        """
        texts = list(captions)
        tokenizer = _tokenizer({})
        # The trainer numbers the characters that continue a word as it meets them in a hash map, and breaks ties between
        # pairs by these numbers (huggingface/tokenizers#1794): vocabularies differ from run to run. Naming them ends that.
        normalised = map(tokenizer.normalizer.normalize_str, texts)
        words = {word for text in normalised for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)}
        continuing = sorted({character for word in words for character in word[1:]})
        trainer = WordPieceTrainer(
            vocab_size=size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[*_MARKS, *(_CONTINUES + character for character in continuing)],
            # In effect no limit: with one, the hash map would also choose which of equally rare characters to drop.
            limit_alphabet=sys.maxunicode + 1,
            continuing_subword_prefix=_CONTINUES,
        )
        tokenizer.train_from_iterator(texts, trainer)
        numbers = tokenizer.get_vocab()
        return cls(sorted(numbers, key=numbers.__getitem__))

    @classmethod
    def from_file(cls, path: Path) -> WordPiece:
        """Read BERT's `vocab.txt`: a token per line, numbered from 0. Raises `UsageError` for any other file."""
        name = f"the vocabulary {printable(str(path))}"
        try:
            text = read_small(path, _MAX_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"{name} is not text; give BERT's vocab.txt, with one token per line") from None
        except ForeignFileError as error:
            raise UsageError(f"{name} cannot be read ({error}); give BERT's vocab.txt") from None
        tokens = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
        counts = Counter(tokens)
        if missing := [mark for mark in _MARKS if mark not in counts]:
            raise UsageError(f"{name} has no {', '.join(missing)}; give BERT's vocab.txt, with one token per line")
        token, count = counts.most_common(1)[0]
        if count > 1:
            raise UsageError(
                f"{name} has the line '{foreign(token)}' {count} times; give BERT's vocab.txt as it was published"
            )
        return cls(tokens)

    def encode(self, text: str) -> list[int]:
        """Token numbers, between those of [CLS] and [SEP]; a mark spelt out in the text is read as text."""
        return [self._start, *self._tokenizer.encode(text, add_special_tokens=False).ids, self._end]


def _tokenizer(numbers: dict[str, int]) -> Tokenizer:
    model = Model(numbers, unk_token=_UNKNOWN, max_input_chars_per_word=100, continuing_subword_prefix=_CONTINUES)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer
