"""Train retrieval heads on pooled embeddings and captions, and rank clips and captions by cosine.

Heads are trained one after another, because they share no work: so memory holds one, and none depends on the others, to the
last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import ScoreUndefinedError
from ..metrics.statistics import recall_both_ways
from ..models.linear import normalised
from ..models.retrieval import WIDTH, RetrievalHead, cosine_loss, product_loss
from ..models.standardised import MatrixRows, Standardisation, pool_of
from .sweep import Clock, Sweep, swept
from .training import (
    RUNAWAY,
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

SWEEP = Sweep(rates=(1e-4, 5e-4, 2e-3, 1e-2), batch_size=128, epochs=100, patience=8, counts_clips=True)
RANKS = (1, 5, 10)
_ROWS_AT_ONCE = 4096  # most crops or captions that go through a tower at once when scoring
_VALUES_AT_ONCE = 1 << 24  # most similarities held at once, 64 MiB


def train_retrieval(
    embeddings: npt.NDArray[np.float32],
    captions: Sequence[Sequence[str]],
    clip_of_crop: Indices,
    folds: Sequence[Rows],
    settings: Settings | Sweep,
    seeds: Sequence[int],
    *,
    vocabulary: WordPiece | None,
    arithmetic: Arithmetic,
    on_epoch: OnEpoch = lambda epoch: None,
) -> list[HeadResult]:
    """Train len(folds) x len(seeds) heads.

    A training example is a crop with one caption of its clip. The chosen epoch is the first with the largest mean of both
    recalls at 1 in validation.

    Corrected: cosine in training, pairs of one clip are not each other's negatives, and an example to score is a clip, its
    vector the mean of its crops' normalised vectors. X-ARES's: dot products in training, every other pair is a negative,
    and an example to score is a crop with its own copies of its clip's captions.

    Args:
        embeddings: (crops, dim).
        captions: One or more per clip.
        clip_of_crop: (crops,).
        folds: Crop numbers.
        settings: With `Settings`, every head trains at one rate for a fixed number of epochs. With a `Sweep`, embeddings are
            standardised by the fold's training crops, and rates and epochs are chosen on the validation clips.
        seeds: One head each per fold.
        vocabulary: If None, each fold's is trained on the captions of its training clips.
        arithmetic: See above.
        on_epoch: Called each time another 1/epochs of all training is done; of a sweep, 1/steps.

    Returns:
        Results sorted by fold and seed; `predictions` are the `recalls` of the examples, (examples, 7).

    Raises:
        ScoreUndefinedError: A head gives NaN or infinity.
    """
    with one_thread():
        if isinstance(settings, Sweep):
            clock = Clock(settings, len(folds), len(seeds), on_epoch)
            return [
                result
                for fold, rows in enumerate(folds)
                for result in _swept(
                    _standardised(embeddings, rows.train),
                    _Pairing(captions, clip_of_crop, rows, vocabulary, arithmetic),
                    fold,
                    settings,
                    seeds,
                    clock,
                )
            ]
        x = normalised(torch.from_numpy(np.ascontiguousarray(embeddings)))
        results: list[HeadResult] = []
        heads, done = len(folds) * len(seeds), 0
        for fold, rows in enumerate(folds):
            pairing = _Pairing(captions, clip_of_crop, rows, vocabulary, arithmetic)
            for seed in sorted(seeds):
                learner = _Learner(x, pairing, settings.batch_size, generator(seed, fold))
                for epoch in range(1, settings.epochs + 1):
                    learner.rate = learning_rate(epoch, settings.epochs, settings.learning_rate)
                    learner.train()
                    if learner.selection.better(learner.valid_score(), epoch):
                        learner.keep()
                    done += 1
                    if done % heads == 0:
                        on_epoch(done // heads)
                learner.finish()
                chosen = learner.selection
                results.append(HeadResult(fold, seed, *learner.predict(), chosen.epoch, chosen.score))
        return results


def _swept(x: Tensor, pairing: _Pairing, fold: int, plan: Sweep, seeds: Sequence[int], clock: Clock) -> Iterator[HeadResult]:
    def learner(seed: int, rate: float) -> _Learner:
        return _Learner(x, pairing, plan.batch_size, generator(seed, fold), rate)

    return swept(learner, fold, pairing.rows, seeds, plan, clock)


def _standardised(embeddings: npt.NDArray[np.float32], train: Indices) -> Tensor:
    """Standardise by mean and deviation of the rows `train`, then normalise each row."""
    with np.errstate(invalid="ignore", over="ignore"), pool_of(1) as pool:
        standardisation = Standardisation.of(MatrixRows(embeddings, train, embeddings[:, :0]), pool)
        if not standardisation.finite:
            raise ScoreUndefinedError(RUNAWAY)
        return normalised(torch.from_numpy(standardisation.apply(np.array(embeddings, np.float32))))


class _Pairing:
    """The captions of a fold's crops. A text is the number of a caption among the fold's distinct captions."""

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
        self.train_crops = np.repeat(rows.train, [len(of_crop) for of_crop in texts])
        self.train_texts = np.concatenate(texts)

    def texts_of(self, crops: Indices) -> list[Indices]:
        """The texts of each crop's clip."""
        return [self._texts_of_clip[clip] for clip in self.clip_of_crop[crops].tolist()]

    def packed(self, texts: Indices) -> tuple[Tensor, Tensor]:
        """Tokens of some texts in the form of `RetrievalHead.text`: one text after another, and the start of each."""
        tokens = [self._tokens_of_text[text] for text in texts]
        starts = np.cumsum([0, *(len(part) for part in tokens[:-1])])
        return torch.from_numpy(np.concatenate(tokens)), torch.from_numpy(starts)


class _Learner:
    """One head in training."""

    def __init__(
        self, x: Tensor, pairing: _Pairing, batch_size: int, rng: np.random.Generator, rate: float = math.nan
    ) -> None:
        self._x, self._pairing, self._batch_size, self._rng = x, pairing, batch_size, rng
        self._head = RetrievalHead(x.shape[1], pairing.vocabulary.size, torch.from_numpy(pairing.tokens), rng)
        self._adam: torch.optim.Adam | None = torch.optim.Adam(self._head.parameters(), fused=True)
        self._best = [parameter.detach().clone() for parameter in self._head.parameters()]
        self.rate, self.epoch, self.selection = rate, 0, Selection()

    def train(self) -> None:
        assert self._adam is not None
        self._adam.param_groups[0]["lr"] = self.rate
        order = self._rng.permutation(len(self._pairing.train_crops))
        for start in range(0, len(order), self._batch_size):
            pairs = order[start : start + self._batch_size]
            loss = self._loss(self._pairing.train_crops[pairs], self._pairing.train_texts[pairs])
            self._adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._adam.step()

    def _loss(self, crops: Indices, texts: Indices) -> Tensor:
        """The loss of pairs of a crop and a text."""
        pairing = self._pairing
        audio = self._head.audio(self._x[torch.from_numpy(crops)])
        text = self._head.text(*pairing.packed(texts))
        if not pairing.corrected:
            return product_loss(audio, text, self._head.log_temperature)
        clips = torch.from_numpy(pairing.clip_of_crop[crops])
        return cosine_loss(audio, text, self._head.log_temperature, clips)

    def selected(self) -> tuple[float, float]:
        return self.valid_score(), self._valid_loss()

    def valid_score(self) -> float:
        return self.score(self._pairing.rows.valid) if len(self._pairing.rows.valid) else math.nan

    @torch.inference_mode()
    def _valid_loss(self) -> float:
        """Mean over the pairs, in as many batches as in training."""
        crops = self._pairing.rows.valid
        if not len(crops):
            return math.nan
        texts = self._pairing.texts_of(crops)
        pairs = np.repeat(crops, [len(of_crop) for of_crop in texts]), np.concatenate(texts)
        batches = -(-len(pairs[0]) // self._batch_size)
        # A batch takes every n-th pair, so that captions of one clip, which are not each other's negatives, are apart.
        losses = [
            float(self._loss(pairs[0][batch::batches], pairs[1][batch::batches])) * len(pairs[0][batch::batches])
            for batch in range(batches)
        ]
        return sum(losses) / len(pairs[0])

    def keep(self) -> None:
        for kept, parameter in zip(self._best, self._head.parameters(), strict=True):
            kept.copy_(parameter.detach())

    def save(self) -> None:
        """Keep no checkpoint: a training is short."""

    def finish(self) -> None:
        with torch.no_grad():
            for kept, parameter in zip(self._best, self._head.parameters(), strict=True):
                parameter.copy_(kept)
                parameter.grad = None
        self._adam, self._best = None, []

    def score(self, rows: Indices) -> float:
        _, ranked = self._predict(rows)
        return float(recall_both_ways(np.array([*ranked[:, :3].sum(axis=0), len(ranked)], np.float64)))

    def predict(self) -> tuple[Indices, Indices]:
        return self._predict(self._pairing.rows.test)

    @torch.inference_mode()
    def _predict(self, crops: Indices) -> tuple[Indices, Indices]:
        """The examples of some crops, and their `recalls`."""
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
        counts = np.array([len(of_example) for of_example in texts])
        return examples, recalls(normalize(audio), text, columns, counts)


def _directions(vectors: Tensor) -> Tensor:
    check_finite(vectors.norm(dim=1))
    return normalize(vectors)


def recalls(audio: Tensor, text: Tensor, columns: Indices, counts: Indices) -> Indices:
    """How many captions rank their clip first, and whether the clip ranks one of them first, among all clips and captions.

    Of equally similar clips or captions the earlier ranks first, as in a stable sort: if all are alike, only the first clip
    is recalled.

    Args:
        audio: (clips, dim) unit vectors.
        text: (texts, dim) unit vectors.
        columns: (captions,) the row of each caption in `text`, the captions of the first clip first.
        counts: (clips,) captions of each clip.

    Returns:
        int64 (clips, 7): captions that rank the clip first, captions, 1 if the clip ranks one of them first; then the first
        and the last of these for ranks up to 5, and up to 10.
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
        own_captions = similarities.numpy()[owners[low:high] - start, np.arange(low, high)]
        best = torch.from_numpy(np.maximum.reduceat(own_captions, firsts[part] - low))
        to_text[part] = _ranks(similarities, best[:, None], torch.from_numpy(firsts[part])[:, None])

    within = [
        (np.add.reduceat(to_audio < rank, firsts, dtype=np.int64), (to_text < rank).astype(np.int64)) for rank in RANKS
    ]
    (captions_first, clip_first), *further = within
    return np.stack([captions_first, counts, clip_first, *(column for pair in further for column in pair)], axis=1)


def _ranks(similarities: Tensor, reference: Tensor, before: Tensor) -> Indices:
    """For each row, the number of columns above its reference, or equal to it and before column `before`."""
    earlier = torch.arange(similarities.shape[1]) < before
    ranks: Indices = ((similarities > reference) | (similarities == reference) & earlier).sum(dim=1).numpy()
    return ranks
