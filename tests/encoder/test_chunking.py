"""Chunks tile the waveform, and every frame that comes back has its exact time."""

from __future__ import annotations

import itertools
from fractions import Fraction

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from xares_onnx.encoder.chunking import Chunk, cut, frame_centers, frames_inside, plan_chunks
from xares_onnx.encoder.contract.contract import Contract
from xares_onnx.encoder.contract.frame_law import FrameLaw

PLAIN = Contract(
    input="audio",
    input_layout="BT",
    lengths_input=None,
    output="embeddings",
    output_layout="BTD",
    dim=4,
    sample_rate=16_000,
    hop_samples=160,
    receptive_field_samples=400,
    first_frame_center_samples=200.0,
    min_samples=400,
    max_samples=None,
    chunk_samples=160_000,
    amplitude="unit",
    normalize="none",
    dynamic_batch=True,
    batch_coupled=False,
)
CLIP_ONLY = msgspec.structs.replace(
    PLAIN, output_layout="BD", hop_samples=None, receptive_field_samples=None, first_frame_center_samples=None
)


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    minimum = draw(st.integers(1, 3_000))
    return msgspec.structs.replace(
        PLAIN,
        sample_rate=draw(st.integers(100, 2_000)),
        hop_samples=draw(st.integers(1, 500)),
        receptive_field_samples=draw(st.integers(-500, minimum)),
        first_frame_center_samples=draw(st.floats(-500, 1_000)),
        min_samples=minimum,
        chunk_samples=draw(st.integers(minimum, 4_000)),
    )


samples = st.integers(1, 10_000)


def frames_of(chunk: Chunk, contract: Contract) -> int:
    assert contract.hop_samples is not None
    assert contract.receptive_field_samples is not None
    return FrameLaw(contract.hop_samples, contract.receptive_field_samples).frames(chunk.length)


# ---------------------------------------------------------------- chunks


@given(samples, contracts(), st.booleans())
def test_chunks_tile_the_waveform(samples: int, contract: Contract, pad_short_clips: bool) -> None:
    chunks = plan_chunks(samples, contract, pad_short_clips=pad_short_clips)
    assert chunks[0].start == 0
    assert chunks[-1].stop == samples
    assert all(before.stop == after.start for before, after in itertools.pairwise(chunks))
    assert all(chunk.stop - chunk.start == chunk.length == contract.chunk_samples for chunk in chunks[:-1])
    assert 0 < chunks[-1].stop - chunks[-1].start <= chunks[-1].length <= contract.chunk_samples


@given(samples, contracts())
def test_only_a_tail_under_a_second_is_padded_to_a_second_or_the_minimum(samples: int, contract: Contract) -> None:
    tail = plan_chunks(samples, contract)[-1]
    held = tail.stop - tail.start
    shortest = max(contract.sample_rate, contract.min_samples)
    if held >= min(shortest, contract.chunk_samples):
        assert tail.length == held
    else:
        assert tail.length == min(shortest, contract.chunk_samples)
    assert tail.length >= contract.min_samples


@given(samples, contracts())
def test_a_short_clip_goes_in_as_it_is_where_that_is_asked(samples: int, contract: Contract) -> None:
    chunks = plan_chunks(samples, contract, pad_short_clips=False)
    if len(chunks) == 1:
        assert chunks[0].length == max(samples, contract.min_samples)
    else:
        assert chunks == plan_chunks(samples, contract)


@pytest.mark.parametrize(
    ("samples", "contract", "expected"),
    [
        (160_000, PLAIN, [(0, 160_000, 160_000)]),
        (160_001, PLAIN, [(0, 160_000, 160_000), (160_000, 160_001, 16_000)]),
        (176_000, PLAIN, [(0, 160_000, 160_000), (160_000, 176_000, 16_000)]),
        (175_999, PLAIN, [(0, 160_000, 160_000), (160_000, 175_999, 16_000)]),
        (176_001, PLAIN, [(0, 160_000, 160_000), (160_000, 176_001, 16_001)]),
        (1, PLAIN, [(0, 1, 16_000)]),
        (20_000, msgspec.structs.replace(PLAIN, min_samples=24_000), [(0, 20_000, 24_000)]),
        (9_000, msgspec.structs.replace(PLAIN, chunk_samples=8_000), [(0, 8_000, 8_000), (8_000, 9_000, 8_000)]),
    ],
)
def test_chunks_by_hand(samples: int, contract: Contract, expected: list[tuple[int, int, int]]) -> None:
    assert [(chunk.start, chunk.stop, chunk.length) for chunk in plan_chunks(samples, contract)] == expected


@given(samples, contracts())
def test_cut_gives_back_every_sample_once_and_pads_with_zeros(samples: int, contract: Contract) -> None:
    waveform = np.arange(1, samples + 1, dtype=np.float32)
    pieces = [(cut(waveform, chunk), chunk) for chunk in plan_chunks(samples, contract)]
    assert all(len(piece) == chunk.length for piece, chunk in pieces)
    held = [piece[: chunk.stop - chunk.start] for piece, chunk in pieces]
    np.testing.assert_array_equal(np.concatenate(held), waveform)
    assert not any(piece[chunk.stop - chunk.start :].any() for piece, chunk in pieces)


# ---------------------------------------------------------------- frames and their times


@given(samples, contracts())
def test_centres_are_start_plus_first_centre_plus_hops(samples: int, contract: Contract) -> None:
    assert contract.hop_samples is not None
    assert contract.first_frame_center_samples is not None
    for chunk in plan_chunks(samples, contract):
        centers = frame_centers(chunk, frames_of(chunk, contract), contract)
        for i in {0, 1, len(centers) - 1} & set(range(len(centers))):
            exact = chunk.start + Fraction(contract.first_frame_center_samples) + i * contract.hop_samples
            assert abs(Fraction(centers[i]) - exact) < Fraction(1, 10**9)


@given(samples, contracts())
def test_a_frame_is_dropped_only_where_it_lies_past_the_end(samples: int, contract: Contract) -> None:
    assert contract.hop_samples is not None
    for chunk in plan_chunks(samples, contract):
        frames = frames_of(chunk, contract)
        assume(frames > 0)
        kept = frames_inside(chunk, frames, samples, contract)
        starts = frame_centers(chunk, frames, contract) - contract.hop_samples / 2
        assert (starts[kept:] >= samples).all()
        first_of_the_clip = int(chunk.start == 0)
        assert (starts[first_of_the_clip:kept] < samples).all()
        assert kept >= first_of_the_clip


@pytest.mark.parametrize(("samples", "kept"), [(1, 1), (120, 1), (121, 1), (280, 1), (281, 2), (16_000, 98), (15_640, 97)])
def test_kept_frames_by_hand(samples: int, kept: int) -> None:
    """Centres lie at 200, 360, ... 15,720: the second frame reaches back to 280, the last to 15,640."""
    (chunk,) = plan_chunks(samples, PLAIN)
    assert frames_inside(chunk, 98, samples, PLAIN) == kept


def test_a_padded_tail_may_lose_every_frame() -> None:
    chunk = plan_chunks(160_050, PLAIN)[1]
    assert frames_inside(chunk, 98, 160_050, PLAIN) == 0


def test_no_drift_over_ten_minutes() -> None:
    """Counting frames over the whole clip as frame x hop is 1.2 s late for this encoder after ten minutes."""
    wav2vec2 = msgspec.structs.replace(
        PLAIN, hop_samples=320, receptive_field_samples=400, first_frame_center_samples=200.0, min_samples=400
    )
    samples = 600 * 16_000 + 7
    times = []
    for chunk in plan_chunks(samples, wav2vec2):
        frames = frames_of(chunk, wav2vec2)
        times.append(frame_centers(chunk, frames_inside(chunk, frames, samples, wav2vec2), wav2vec2) / 16_000)
    last_whole_chunk = times[59]
    assert last_whole_chunk[0] == pytest.approx(590 + 200 / 16_000, abs=1e-12)
    joined = np.concatenate(times)
    naive = np.arange(len(joined)) * 320 / 16_000
    assert joined[-1] - naive[-1] > 1.0
    gaps = np.diff(joined)
    assert gaps.min() > 0
    assert gaps.max() <= 0.04 + 1e-9  # one frame is missing where two chunks meet, never two


@given(samples)
def test_a_clip_only_encoder_keeps_its_one_vector(samples: int) -> None:
    for chunk in plan_chunks(samples, CLIP_ONLY):
        assert frames_inside(chunk, 1, samples, CLIP_ONLY) == 1
        with pytest.raises(ValueError, match="no frames"):
            frame_centers(chunk, 1, CLIP_ONLY)


def test_no_samples_give_no_chunks() -> None:
    assert plan_chunks(0, PLAIN) == []
