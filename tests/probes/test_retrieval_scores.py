"""Recalls of retrieval heads against sorting by hand, and their losses against softmax by softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from retrieval_reference import (
    ANIMALS,
    ARITHMETICS,
    DIM,
    SOUNDS,
    Problem,
    Settings,
    loss_by_hand,
    problem,
    recall_at_1_of_xares,
    recalls_by_hand,
    score,
    train_one,
)

from xares_onnx.models import retrieval as towers
from xares_onnx.models.retrieval import cosine_loss, product_loss
from xares_onnx.probes import retrieval
from xares_onnx.probes.retrieval import recalls
from xares_onnx.probes.training import Rows
from xares_onnx.probes.wordpiece import WordPiece


def fixed(p: Problem, arithmetic: str) -> NDArray[np.int64]:
    """The test predictions of a head that learns nothing."""
    [result] = p.train(arithmetic, Settings(epochs=1, learning_rate=0.0), vocabulary=WordPiece.trained(["abc", *ANIMALS]))
    found: NDArray[np.int64] = result.predictions
    return found


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_the_order_of_a_clips_captions_does_not_matter(arithmetic: str) -> None:
    p = problem([(5, 0, 20)])
    turned = Problem(p.embeddings, [own[::-1] for own in p.captions], p.clip_of_crop, p.folds)
    assert fixed(p, arithmetic).tolist() == fixed(turned, arithmetic).tolist()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_examples_are_clips_or_crops_and_captions_are_counted(arithmetic: str) -> None:
    p = problem([(5, 0, 20)])
    rows = p.folds[0]
    shuffled = Problem(p.embeddings, p.captions, p.clip_of_crop, [Rows(rows.train, rows.valid, rows.test[::-1].copy())])
    [result] = shuffled.train(arithmetic, Settings(epochs=1))
    expected = rows.test if arithmetic == "xares" else np.unique(p.clip_of_crop[rows.test])
    clips = p.clip_of_crop[expected] if arithmetic == "xares" else expected
    assert result.examples.tolist() == expected.tolist()
    assert result.predictions.shape == (len(expected), 7)
    assert result.predictions[:, 1].tolist() == [len(p.captions[clip]) for clip in clips]


def test_a_clip_is_where_its_crops_point_in_the_mean_however_long_their_vectors_are() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((121, DIM)).astype(np.float32)
    embeddings[::2] = 1  # LayerNorm leaves 0, and the audio tower a shorter vector
    captions = [[f"{ANIMALS[clip % 5]} {SOUNDS[clip // 5 % 5]} {'a' * (1 + clip // 25)}"] for clip in range(41)]
    p = Problem(
        embeddings, captions, np.repeat(np.arange(41), 3)[:121], [Rows(np.arange(1), np.empty(0, int), np.arange(1, 121))]
    )
    vocabulary = WordPiece.trained(caption for own in captions for caption in own)
    still = Settings(epochs=1, learning_rate=0.0)
    expected = train_one(p, 0, 0, still, "corrected", vocabulary)
    [result] = p.train("corrected", still, vocabulary=vocabulary)
    assert result.predictions.tolist() == expected.predictions.tolist()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_scoring_in_small_blocks_is_the_same(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem([(5, 0, 20)])
    whole = fixed(p, arithmetic)
    monkeypatch.setattr(retrieval, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(retrieval, "_VALUES_AT_ONCE", 3 * towers.WIDTH)
    assert fixed(p, arithmetic).tolist() == whole.tolist()


@st.composite
def vectors(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Few different whole numbers, so that products are exact and many are equal; some captions share a text."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    clips, dim, spread = draw(st.integers(1, 14)), draw(st.integers(1, 4)), draw(st.integers(0, 9))
    counts = rng.integers(1, draw(st.integers(1, 4)) + 1, clips)
    columns = rng.integers(0, draw(st.integers(1, 30)), counts.sum())
    unique, columns = np.unique(columns, return_inverse=True)
    audio, text = (rng.integers(-spread, spread + 1, (rows, dim)).astype(np.float32) for rows in (clips, len(unique)))
    return audio, text, columns, counts


@given(vectors())
@settings(max_examples=150)
def test_recalls_are_those_of_sorting(
    drawn: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]],
) -> None:
    audio, text, columns, counts = drawn
    found = recalls(torch.from_numpy(audio), torch.from_numpy(text), columns, counts)
    expected = recalls_by_hand(audio, np.split(text[columns], np.cumsum(counts)[:-1]))
    assert found.tolist() == expected.tolist()


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 5), st.booleans())
@settings(max_examples=100)
def test_the_score_is_that_of_xares(seed: int, clips: int, captions: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    audio, text = (rng.standard_normal((rows, 3)).astype(np.float32) for rows in (clips, clips * captions))
    if ties:
        audio, text = audio.round(), text.round()
    found = recalls(torch.from_numpy(audio), torch.from_numpy(text), np.arange(len(text)), np.full(clips, captions))
    assert score(found) == pytest.approx(recall_at_1_of_xares(audio.repeat(captions, axis=0), text, captions))


def test_where_all_are_alike_only_the_first_clip_is_found() -> None:
    found = recalls(torch.ones(12, 2), torch.ones(1, 2), np.zeros(24, np.int64), np.full(12, 2))
    assert found[:, :3].tolist() == [[2, 2, 1], *[[0, 2, 0]] * 11]
    assert found[:, 3].sum() == 10  # captions of the first five clips
    assert found[:, 4].sum() == 3  # the first five captions are those of the first three clips


# ---------------------------------------------------------------- losses


@given(st.integers(0, 2**32), st.lists(st.integers(0, 4), min_size=1, max_size=9), st.floats(-2, 4))
@settings(max_examples=60)
def test_losses_are_those_of_softmaxes_by_hand(seed: int, clips: list[int], log_temperature: float) -> None:
    rng = np.random.default_rng(seed)
    audio, text = (torch.from_numpy(rng.standard_normal((len(clips), 5))) for _ in range(2))
    temperature = torch.tensor(log_temperature, dtype=torch.float64)
    for arithmetic in ARITHMETICS:
        gradients, values = [], []
        for by_hand in (True, False):
            leaves = [value.clone().requires_grad_() for value in (audio, text, temperature)]
            if by_hand:
                loss = loss_by_hand(*leaves, clips, arithmetic)
            elif arithmetic == "corrected":
                loss = cosine_loss(*leaves, torch.tensor(clips))
            else:
                loss = product_loss(*leaves)
            loss.backward()
            values.append(loss.detach())
            gradients.append(torch.cat([leaf.grad.ravel() for leaf in leaves]))
        torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-10)
