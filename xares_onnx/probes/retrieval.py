"""Train retrieval heads on pooled embeddings and captions, and rank clips and captions by cosine.

Heads are trained one after another, as they have nothing to share: so memory holds one, and what it learns cannot depend on
the others, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..models.linear import normalised
from ..models.retrieval import WIDTH, RetrievalHead, cosine_loss, product_loss
from .training import (
    HeadResult,
    Indices,
    OnEpoch,
    Rows,
    Selection,
    Settings,
    check_finite,
    generator,
    learning_rate,
    one_thread,
)
from .wordpiece import WordPiece

Arithmetic = Literal["corrected", "xares"]

RANKS = (1, 5, 10)
_ROWS_AT_ONCE = 4096  # most crops or captions that go through a tower at once when scoring
_VALUES_AT_ONCE = 1 << 24  # most similarities held at once, 64 MiB


def train_retrieval(
    embeddings: npt.NDArray[np.float32],
    captions: Sequence[Sequence[str]],
    clip_of_crop: Indices,
    folds: Sequence[Rows],
    settings: Settings,
    seeds: Sequence[int],
    *,
    vocabulary: WordPiece | None,
    arithmetic: Arithmetic,
    on_epoch: OnEpoch = lambda epoch: None,
) -> list[HeadResult]:
    """Train len(folds) x len(seeds) heads; results are sorted by fold and seed.

    `embeddings` (crops, dim), `captions` one or more a clip, `clip_of_crop` (crops,); folds have crop numbers. Without a
    `vocabulary` each fold's is trained on the captions of its training clips. A training example is a crop with one
    caption of its clip. The chosen epoch is the first with the largest mean of both recalls at 1 in validation.

    Corrected: cosine in training, pairs of one clip are not each other's negatives, and an example to score is a clip, its
    vector the mean of its crops' normalised vectors. X-ARES's: dot products in training, every other pair is a negative,
    and an example to score is a crop with its own copies of its clip's captions.

    `predictions` is what `recalls` gives, (examples, 7). `on_epoch` is called each time another 1/epochs of all the training
    is done. Raises `ScoreUndefinedError` where a head gives NaN or infinity.
    """
    with one_thread():
        x = normalised(torch.from_numpy(np.ascontiguousarray(embeddings)))
        results: list[HeadResult] = []
        heads, done = len(folds) * len(seeds), 0
        for fold, rows in enumerate(folds):
            pairing = _Pairing(captions, clip_of_crop, rows, vocabulary, arithmetic)
            for seed in sorted(seeds):
                learner = _Learner(x, pairing, settings.batch_size, generator(seed, fold))
                for epoch in range(1, settings.epochs + 1):
                    learner.train(learning_rate(epoch, settings.epochs, settings.learning_rate))
                    learner.select(epoch)
                    done += 1
                    if done % heads == 0:
                        on_epoch(done // heads)
                results.append(learner.result(fold, seed))
        return results


class _Pairing:
    """Which captions belong to which crops of a fold. A text is the number of a caption among the fold's different ones."""

    def __init__(
        self,
        captions: Sequence[Sequence[str]],
        clip_of_crop: Indices,
        rows: Rows,
        vocabulary: WordPiece | None,
        arithmetic: Arithmetic,
    ) -> None:
        self.rows, self.clip_of_crop, self.corrected = rows, clip_of_crop, arithmetic == "corrected"
        self.vocabulary = vocabulary or WordPiece.trained(
            caption for clip in np.unique(clip_of_crop[rows.train]) for caption in captions[clip]
        )
        clips = np.unique(clip_of_crop[np.concatenate([rows.train, rows.valid, rows.test])])
        numbers: dict[str, int] = {}
        self._texts_of_clip = {
            clip: np.array([numbers.setdefault(caption, len(numbers)) for caption in captions[clip]])
            for clip in clips.tolist()
        }
        encoded = [np.array(self.vocabulary.encode(text)) for text in numbers]
        self.tokens, positions = np.unique(np.concatenate(encoded), return_inverse=True)
        self._tokens_of_text = np.split(positions, np.cumsum([len(tokens) for tokens in encoded])[:-1])

        texts = self.texts_of(rows.train)
        self.train_crops = np.repeat(rows.train, [len(found) for found in texts])
        self.train_texts = np.concatenate(texts)

    def texts_of(self, crops: Indices) -> list[Indices]:
        """The texts of each crop's clip."""
        return [self._texts_of_clip[clip] for clip in self.clip_of_crop[crops].tolist()]

    def packed(self, texts: Indices) -> tuple[Tensor, Tensor]:
        """Tokens of some texts as `RetrievalHead.text` wants them: one text after another, and where each starts."""
        tokens = [self._tokens_of_text[text] for text in texts]
        starts = np.cumsum([0, *(len(part) for part in tokens[:-1])])
        return torch.from_numpy(np.concatenate(tokens)), torch.from_numpy(starts)


class _Learner:
    """One head, while it is trained."""

    def __init__(self, x: Tensor, pairing: _Pairing, batch_size: int, rng: np.random.Generator) -> None:
        self._x, self._pairing, self._batch_size, self._rng = x, pairing, batch_size, rng
        self._head = RetrievalHead(x.shape[1], pairing.vocabulary.size, torch.from_numpy(pairing.tokens), rng)
        self._adam = torch.optim.Adam(self._head.parameters(), fused=True)
        self._selection = Selection()
        self._best = [parameter.detach().clone() for parameter in self._head.parameters()]

    def train(self, rate: float) -> None:
        """One epoch."""
        self._adam.param_groups[0]["lr"] = rate
        pairing = self._pairing
        order = self._rng.permutation(len(pairing.train_crops))
        for start in range(0, len(order), self._batch_size):
            pairs = order[start : start + self._batch_size]
            crops = pairing.train_crops[pairs]
            audio = self._head.audio(self._x[torch.from_numpy(crops)])
            text = self._head.text(*pairing.packed(pairing.train_texts[pairs]))
            if pairing.corrected:
                clips = torch.from_numpy(pairing.clip_of_crop[crops])
                loss = cosine_loss(audio, text, self._head.log_temperature, clips)
            else:
                loss = product_loss(audio, text, self._head.log_temperature)
            self._adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._adam.step()

    def select(self, epoch: int) -> None:
        """Keep the head of this epoch if it is the best in validation, or if there is none."""
        score = math.nan
        if len(self._pairing.rows.valid):
            _, found = self._predict(self._pairing.rows.valid)
            score = float(found[:, 0].sum() / found[:, 1].sum() + found[:, 2].mean()) / 2
        if self._selection.better(score, epoch):
            for kept, parameter in zip(self._best, self._head.parameters(), strict=True):
                kept.copy_(parameter.detach())

    def result(self, fold: int, seed: int) -> HeadResult:
        """The test examples' ranks by the chosen epoch's head, which replaces the last."""
        with torch.no_grad():
            for kept, parameter in zip(self._best, self._head.parameters(), strict=True):
                parameter.copy_(kept)
        examples, predictions = self._predict(self._pairing.rows.test)
        return HeadResult(fold, seed, examples, predictions, self._selection.epoch, self._selection.score)

    @torch.inference_mode()
    def _predict(self, crops: Indices) -> tuple[Indices, Indices]:
        """(examples, what `recalls` gives of them) for some crops."""
        pairing = self._pairing
        owners = pairing.clip_of_crop[crops] if pairing.corrected else crops
        examples, first, places = np.unique(owners, return_index=True, return_inverse=True)
        audio = torch.zeros(len(examples), WIDTH)
        for start in range(0, len(crops), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            vectors = self._head.audio(self._x[torch.from_numpy(crops[part])])
            audio.index_add_(0, torch.from_numpy(places[part]), _directions(vectors))
        texts = pairing.texts_of(crops[first])
        unique, columns = np.unique(np.concatenate(texts), return_inverse=True)
        parts = [unique[start : start + _ROWS_AT_ONCE] for start in range(0, len(unique), _ROWS_AT_ONCE)]
        text = torch.cat([_directions(self._head.text(*pairing.packed(part))) for part in parts])
        counts = np.array([len(found) for found in texts])
        return examples, recalls(normalize(audio), text, columns, counts)


def _directions(vectors: Tensor) -> Tensor:
    check_finite(vectors.norm(dim=1))
    return normalize(vectors)


def recalls(audio: Tensor, text: Tensor, columns: Indices, counts: Indices) -> Indices:
    """How many captions find their clip, and whether the clip finds one of them, among all clips and all captions.

    `audio` (clips, dim) and `text` (texts, dim) are unit vectors. A caption's vector is a row of `text`, given by `columns`
    (captions,); the captions of the first clip come first, `counts` (clips,) of each. Gives int64 (clips, 7): [captions that
    rank the clip first, captions, 1 if the clip ranks one of them first, then the first and the last of these for ranks up
    to 5 and up to 10]. Of equally similar clips or captions the earlier comes first, as in a stable sort: where all are
    alike, only the first clip is found.
    """
    clips, captions = len(audio), len(columns)
    ends = np.cumsum(counts)
    firsts = ends - counts
    owners = np.repeat(np.arange(clips), counts)
    places, own = torch.from_numpy(columns), torch.from_numpy(owners)

    to_audio = np.empty(captions, np.int64)
    rows = max(1, _VALUES_AT_ONCE // max(clips, text.shape[1]))
    for start in range(0, captions, rows):
        part = slice(start, start + rows)
        similarities = text[places[part]] @ audio.T
        to_audio[part] = _ranks(similarities, similarities.gather(1, own[part, None]), own[part, None])

    to_text = np.empty(clips, np.int64)
    rows = max(1, _VALUES_AT_ONCE // captions)
    for start in range(0, clips, rows):
        part = slice(start, start + rows)
        # Equal captions share a row of `text`, so they are exactly equally similar.
        similarities = (audio[part] @ text.T)[:, places]
        low, high = firsts[start], ends[part][-1]
        mine = similarities.numpy()[owners[low:high] - start, np.arange(low, high)]
        best = torch.from_numpy(np.maximum.reduceat(mine, firsts[part] - low))
        to_text[part] = _ranks(similarities, best[:, None], torch.from_numpy(firsts[part])[:, None])

    found = [(np.add.reduceat(to_audio < rank, firsts, dtype=np.int64), (to_text < rank).astype(np.int64)) for rank in RANKS]
    (captions_first, clip_first), *further = found
    return np.stack([captions_first, counts, clip_first, *(column for pair in further for column in pair)], axis=1)


def _ranks(similarities: Tensor, reference: Tensor, before: Tensor) -> Indices:
    """For each row, how many columns are above its reference, or are equal to it and come before a column."""
    earlier = torch.arange(similarities.shape[1]) < before
    ranks: Indices = ((similarities > reference) | (similarities == reference) & earlier).sum(dim=1).numpy()
    return ranks
