"""The synthetic tasks of every kind but classes: their labels must be true, and nothing but the sound may give them away.

What is heard is read back from the waveforms by plain signal processing, which shares no code with the makers of the clips.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations, pairwise
from json import dumps
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import butter, sosfiltfilt
from scipy.stats import binom, pearsonr
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import average_precision_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic_clips import Array, all_of, decibels, frames, log_mel, samples_of, split_of, task_file
from synthetic_ears import (
    between_boundaries,
    events_in,
    letter_at,
    letters_in,
    name_of_sound,
    noise_over_tone,
    residue,
    texture_of,
)

from xares_onnx.data.synthetic import LABELS, SAMPLE_RATE, SPLITS, TASKS, Clip

KINDS = {
    "synthetic_tags": ("tags", "mean_average_precision"),
    "synthetic_events": ("events", "segment_f1_macro"),
    "synthetic_notes": ("events", "segment_f1_micro"),
    "synthetic_captions": ("captions", "recall_at_1"),
    "synthetic_transcript": ("transcript", "one_minus_wer"),
    "synthetic_number": ("number", "mse"),
}
TAGS = ("hum", "buzz", "whistle", "siren", "chirps", "bell", "knocks", "hiss")
EVENTS = ("hum", "beep", "siren", "whistle", "hiss")
NOUNS = {  # the words of the captions
    "hum": ("hum", "drone"),
    "buzz": ("buzz", "razor"),
    "beep": ("beep", "tone"),
    "whistle": ("whistle", "flute"),
    "siren": ("siren", "alarm"),
    "chirps": ("birdsong", "chirping"),
    "bell": ("bell", "chime"),
    "knocks": ("knocking", "drumming"),
    "ticks": ("ticking", "clock"),
    "hiss": ("hiss", "steam"),
}
HIGH, LOW, RAIN, SILENCE = ("high", "shrill"), ("low", "deep"), ("rain",), ("silence", "quiet")
LETTERS = "AEIOURHFXS"

each_task = pytest.mark.parametrize("task", KINDS)


# --- The task files and the labels ---


def test_every_kind_has_a_task() -> None:
    assert set(TASKS) == {*LABELS, *KINDS}


@each_task
def test_task_file_reads_every_label(task: str) -> None:
    definition = task_file(task)
    assert (definition.name, definition.domain) == (task, "synthetic")
    assert (definition.kind, definition.score.metric) == KINDS[task]
    assert definition.weight == (None if task == "synthetic_number" else SPLITS["test"])
    assert definition.data.splits == {split: f"{split}-*.tar" for split in SPLITS}
    names: Sequence[str] = definition.target.class_names
    seen: set[int] = set()
    for clip in all_of(task):
        value = definition.target.encode(clip.label if isinstance(clip.label, dict) else {"events": clip.label})
        if definition.kind == "events":
            assert value.outside == 0
            assert len(value.classes) == len(clip.label)
            seen.update(value.classes.tolist())
        elif definition.kind == "tags":
            assert ";".join(names[tag] for tag in value) == clip.label["tags"]
            seen.update(value)
    assert seen == set(range(len(names)))


# Of the json of every label, as the shards hold it.
CHECKSUMS = {
    "synthetic_tags": 2_753_179_780,
    "synthetic_events": 3_377_311_395,
    "synthetic_notes": 3_256_401_376,
    "synthetic_captions": 2_550_652_695,
    "synthetic_transcript": 3_174_831_688,
    "synthetic_number": 3_781_116_565,
}


@each_task
def test_other_labels_are_another_version(task: str) -> None:
    found = zlib.crc32("\n".join(f"{clip.key} {dumps(clip.label)}" for clip in all_of(task)).encode())
    assert found == CHECKSUMS[task], f"{found}: raise VERSION"


def test_tags_are_balanced() -> None:
    for split, size in SPLITS.items():
        tags = [clip.label["tags"].split(";") for clip in split_of("synthetic_tags", split)]
        assert Counter(map(len, tags)) == {1: size // 3, 2: size // 3, 3: size // 3}
        assert all(len(set(names)) == len(names) for names in tags)
        found = Counter(name for names in tags for name in names)
        low, high = binom.ppf([0.0005, 0.9995], 2 * size, 1 / len(TAGS))
        assert set(found) == set(TAGS)
        assert all(low <= count <= high for count in found.values())


def test_events_lie_in_their_clips_and_leave_room() -> None:
    bands = {"hum": 0, "beep": 1, "siren": 1, "whistle": 2, "hiss": 3}
    overlaps = 0
    for split, size in SPLITS.items():
        part = split_of("synthetic_events", split)
        assert Counter(len(clip.label) for clip in part) == dict.fromkeys(range(1, 5), size // 4)
        for clip in part:
            assert len(clip.waveform) == 4 * SAMPLE_RATE
            onsets = [event["onset"] for event in clip.label]
            assert onsets == sorted(onsets)
            for event in clip.label:
                assert 0.29 < event["offset"] - event["onset"] < 1.51
                assert 0.09 < event["onset"] < event["offset"] < 3.91
            for one, other in combinations(clip.label, 2):
                gap = max(one["onset"], other["onset"]) - min(one["offset"], other["offset"])
                assert bands[one["label"]] != bands[other["label"]] or gap > 0.099
                overlaps += gap < 0
        found = Counter(event["label"] for clip in part for event in clip.label)
        low, high = binom.ppf([0.0005, 0.9995], found.total(), 1 / len(EVENTS))
        assert all(0.7 * low <= found[label] <= 1.3 * high for label in EVENTS)  # neighbours of one band are drawn again
    assert overlaps > 100


def test_at_most_two_notes_sound_at_once_and_never_one_twice() -> None:
    pairs = 0
    for clip in all_of("synthetic_notes"):
        assert [note["start"] for note in clip.label] == sorted(note["start"] for note in clip.label)
        assert all(0.119 < note["end"] - note["start"] < 0.401 for note in clip.label)
        assert clip.label[0]["start"] >= 0.049
        assert clip.label[-1]["start"] < 1.5
        for one in clip.label:
            sounding = [note for note in clip.label if note["start"] <= one["start"] < note["end"]]
            assert len(sounding) <= 2
            assert len({note["note"] for note in sounding}) == len(sounding)
            pairs += len(sounding) == 2
    found = Counter(note["note"] for clip in all_of("synthetic_notes") for note in clip.label)
    assert set(found) == set(range(60, 72))
    assert min(found.values()) > 0.8 * max(found.values())
    assert pairs > 0.3 * found.total()


def test_each_test_clip_is_one_combination_that_each_of_its_captions_names() -> None:
    for split in SPLITS:
        meanings, part = [], split_of("synthetic_captions", split)
        for clip in part:
            assert list(clip.label) == [f"caption_{number}" for number in range(1, 6)]
            assert len(set(clip.label.values())) == 5
            (meaning,) = {meaning_of(caption) for caption in clip.label.values()}
            (order,) = {order_of(caption) for caption in clip.label.values()}
            meanings.append(meaning)
            assert order is None or set(order) == meaning[0]
        assert len(set(meanings)) == min(len(meanings), 180)
        assert Counter(high for _, high, _ in meanings)[True] in range(int(0.35 * len(meanings)), int(0.65 * len(meanings)))
        assert Counter(rain for _, _, rain in meanings)[True] in range(int(0.35 * len(meanings)), int(0.65 * len(meanings)))
        orders = [order for clip in part if (order := order_of(clip.label["caption_1"]))]
        assert 0.35 < len(orders) / len(part) < 0.65
        assert 0.3 < np.mean([order == tuple(name for name in NOUNS if name in order) for order in orders]) < 0.7


def test_every_word_of_a_caption_is_trained() -> None:
    words = {split: {word for caption in captions_of(split) for word in caption.split()} for split in SPLITS}
    assert words["valid"] | words["test"] <= words["train"]
    assert {noun for nouns in NOUNS.values() for noun in nouns} <= {word.strip(",") for word in words["test"]}


def test_transcripts_are_any_words_of_two_to_four_letters() -> None:
    for split, size in SPLITS.items():
        transcripts = [clip.label["trans"] for clip in split_of("synthetic_transcript", split)]
        assert all(re.fullmatch(rf"[{LETTERS}]{{2,4}}( [{LETTERS}]{{2,4}})*", transcript) for transcript in transcripts)
        # Where every clip had a space, a head could learn to hold it all the time in place of the blank.
        assert Counter(len(transcript.split()) for transcript in transcripts) == dict.fromkeys(range(1, 5), size // 4)
        letters = Counter("".join(transcripts).replace(" ", ""))
        assert set(letters) == set(LETTERS)
        assert min(letters.values()) > 0.5 * max(letters.values())
        assert any(one == other != " " for transcript in transcripts for one, other in pairwise(transcript))


def test_numbers_fill_their_range() -> None:
    scores = np.array([clip.label["score"] for clip in all_of("synthetic_number")])
    assert (scores == scores.round(1)).all()
    assert (scores.min(), scores.max()) == pytest.approx((0, 10), abs=0.1)
    assert np.histogram(scores, 5, (0, 10))[0] == pytest.approx(len(scores) / 5, rel=0.3)


# --- The labels are true ---


def test_a_lone_sound_is_what_its_tag_says() -> None:
    alone = [clip for clip in all_of("synthetic_tags") if ";" not in clip.label["tags"]]
    heard = [name_of_sound(samples_of(clip)) == clip.label["tags"] for clip in alone]
    assert np.mean(heard) > 0.97


def test_sounds_in_turn_are_what_their_caption_says() -> None:
    heard = []
    for clip in all_of("synthetic_captions"):
        order, (_, high, rain) = order_of(clip.label["caption_1"]), meaning_of(clip.label["caption_1"])
        if order is not None and not rain:
            halves = np.array_split(samples_of(clip), 2)
            heard += [name_of_sound(half, 0.6 if high else -0.6) == name for half, name in zip(halves, order, strict=True)]
    assert len(heard) > 150
    assert np.mean(heard) > 0.97


def test_low_sounds_lie_low_and_high_ones_high() -> None:
    usual = {"hum": 100, "beep": 1000, "siren": 1000, "whistle": 1700}
    heard = 0
    for clip in all_of("synthetic_captions"):
        order, (_, high, rain) = order_of(clip.label["caption_1"]), meaning_of(clip.label["caption_1"])
        if order is not None and not rain:
            for half, name in zip(np.array_split(samples_of(clip), 2), order, strict=True):
                if name in usual:
                    strongest = np.abs(np.fft.rfft(half)).argmax() * SAMPLE_RATE / half.size
                    assert abs(np.log2(strongest / usual[name]) - (0.6 if high else -0.6)) < 0.4, clip.key
                    heard += 1
    assert heard > 50


def test_texture_tells_which_tags_a_mixture_has() -> None:
    assert average_precision("synthetic_tags", texture) > 0.95


def test_texture_tells_what_a_caption_says() -> None:
    assert average_precision("synthetic_captions", texture) > 0.92


def test_rain_hisses() -> None:
    """Seen in the quietest moments above 6 kHz, where no low sound but a hiss is."""
    floors: dict[bool, list[float]] = {True: [], False: []}
    for clip in split_of("synthetic_captions", "test"):
        pair, high, rain = meaning_of(clip.label["caption_1"])
        if not high and "hiss" not in pair:
            power = np.abs(np.fft.rfft(frames(samples_of(clip), 512, 256) * np.hanning(512))) ** 2
            floors[rain].append(float(np.log10(np.quantile(power[:, 200:], 0.1) / power.mean())))
    assert np.quantile(floors[True], 0.05) > np.quantile(floors[False], 0.95)


def test_events_begin_and_end_when_their_labels_say() -> None:
    right = []
    for clip in split_of("synthetic_events", "test")[:80]:
        heard = events_in(samples_of(clip))
        said = sorted((event["label"], event["onset"], event["offset"]) for event in clip.label)
        same = [name for name, _, _ in heard] == [name for name, _, _ in said]
        times = [np.abs(np.subtract(a[1:], b[1:])).max() for a, b in zip(heard, said, strict=False)]
        right.append(same and max(times) < 0.02)
    assert np.mean(right) > 0.97


def test_notes_explain_all_that_sounds() -> None:
    """Harmonics of the notes that are said to sound leave nothing between any two boundaries, silence is silent, and no
    note is superfluous."""
    residues, silences, gains = [], [], []
    for clip in split_of("synthetic_notes", "test")[:20]:
        signal = sosfiltfilt(butter(6, 1300, fs=SAMPLE_RATE, output="sos"), samples_of(clip))
        pieces = list(between_boundaries(signal, clip.label))
        sounding = [(piece, notes) for piece, notes in pieces if notes]
        tuning = min(np.linspace(-0.1, 0.1, 5), key=lambda cents: sum(residue(*one, cents) for one in sounding))
        for piece, notes in pieces:
            if not notes:
                silences.append((piece**2).mean() / (signal**2).mean())
                continue
            residues.append(residue(piece, notes, tuning))
            if len(notes) == 2:
                gains += [residue(piece, notes - {note}, tuning) - residues[-1] for note in notes]
    assert min(map(len, (residues, silences, gains))) > 20
    assert np.quantile(residues, 0.97) < 0.05
    assert max(silences) < 0.01
    assert np.quantile(gains, 0.03) > 0.02


def test_letters_rise_out_of_words_in_their_order() -> None:
    """Every letter is brief: where many frames look alike, training with the CTC loss keeps a linear head silent."""
    right: list[bool] = []
    lengths: list[float] = []
    for clip in split_of("synthetic_transcript", "test"):
        signal = samples_of(clip)
        words, said = letters_in(signal), clip.label["trans"].split()
        assert list(map(len, words)) == list(map(len, said)), clip.key
        for word, letters in zip(words, said, strict=True):
            right += [letter_at(signal, *span) == letter for span, letter in zip(word, letters, strict=True)]
            lengths += [(stop - start) / SAMPLE_RATE for start, stop in word]
    assert np.mean(right) > 0.98
    assert 0.02 < np.quantile(lengths, 0.01) < np.quantile(lengths, 0.99) < 0.07


def test_numbers_are_the_level_of_the_noise() -> None:
    part = split_of("synthetic_number", "test")
    said = np.array([clip.label["score"] for clip in part])
    heard = np.array([noise_over_tone(samples_of(clip)) for clip in part])
    plain = (said >= 1) & (said < 6.5)
    assert np.mean(np.abs(heard - (4 * said - 20))[plain] < 2) > 0.97
    assert heard[said < 1].max() < -5
    assert heard[said >= 6.5].min() > 4


# --- What a score means ---


@each_task
def test_loudness_says_nothing_of_the_label(task: str) -> None:
    loudness = np.array([decibels(clip.waveform) for clip in all_of(task)])
    assert np.ptp(loudness) > 20
    assert loudness.std() > 6
    for name, trait in traits(task).items():
        assert abs(pearsonr(loudness, trait)[0]) < 3.7 / np.sqrt(len(loudness)), name


@pytest.mark.parametrize("task", ["synthetic_tags", "synthetic_captions", "synthetic_number"])
def test_length_says_nothing_of_the_label(task: str) -> None:
    length = np.array([len(clip.waveform) for clip in all_of(task)])
    assert len(set(length)) > 100
    for name, trait in traits(task).items():
        assert abs(pearsonr(length, trait)[0]) < 3.7 / np.sqrt(len(length)), name


def test_length_of_a_transcript_says_how_many_letters_but_not_which() -> None:
    part, known = split_of("synthetic_transcript", "test"), split_of("synthetic_transcript", "train")
    lengths = np.array([len(clip.waveform) for clip in known])
    hits = words = 0
    for clip in part:
        guess = known[int(np.argmin(np.abs(lengths - len(clip.waveform))))].label["trans"].split()
        said = clip.label["trans"].split()
        hits += sum(one == other for one, other in zip(guess, said, strict=False))
        words += len(said)
    assert hits < 0.02 * words


@pytest.mark.parametrize(("task", "seconds"), [("synthetic_events", 0.5), ("synthetic_notes", 0.1)])
def test_the_clock_says_nothing_of_the_events(task: str, seconds: float) -> None:
    truth = {split: np.array([segments(clip, task, seconds) for clip in split_of(task, split)]) for split in SPLITS}
    usual = truth["train"].mean(axis=0) > 0.5
    guesses = np.broadcast_to(usual, truth["test"].shape)
    classes = truth["test"].shape[2]
    assert f1_score(truth["test"].reshape(-1, classes), guesses.reshape(-1, classes), average="micro", zero_division=0) < 0.1


@pytest.mark.parametrize("task", ["synthetic_tags", "synthetic_captions"])
def test_noise_finds_labels_by_chance(task: str) -> None:
    share = np.mean([trait[-SPLITS["test"] :].mean() for trait in traits(task).values()])
    assert average_precision(task, noise) == pytest.approx(share, abs=0.08)


def test_noise_finds_numbers_by_chance() -> None:
    assert abs(correlation(noise)) < 0.2


def test_average_spectrum_says_much_of_tags_captions_and_numbers_but_not_all() -> None:
    assert 0.7 < average_precision("synthetic_tags", average_log_mel) < 0.95
    assert 0.7 < correlation(average_log_mel) < 0.95
    scores = decisions("synthetic_captions", average_log_mel)
    meanings = np.column_stack(list(traits("synthetic_captions").values()))[-SPLITS["test"] :]
    found = (scores @ (2 * meanings - 1).T).argmax(axis=1)
    assert 0.2 < np.mean(found == np.arange(len(found))) < 0.9


@pytest.mark.parametrize(("task", "ceiling"), [("synthetic_events", 0.95), ("synthetic_notes", 0.99)])
def test_single_frames_say_much_of_events_but_not_all(task: str, ceiling: float) -> None:
    names = task_file(task).target.class_names
    heard, truth = {}, {}
    for split in ("train", "test"):
        spectra = [centred(log_mel(samples_of(clip)))[::20] for clip in split_of(task, split)]
        times = 0.0125 + 0.2 * np.arange(len(spectra[0]))
        heard[split] = np.concatenate(spectra)
        truth[split] = np.concatenate([active(clip, task, times) for clip in split_of(task, split)])
    scores = []
    for column in range(0, len(names), len(names) // 4):
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        head.fit(heard["train"], truth["train"][:, column])
        scores.append(f1_score(truth["test"][:, column], head.predict(heard["test"])))
    assert 0.6 < np.mean(scores) < ceiling


def test_a_frame_cannot_tell_a_beep_from_a_siren() -> None:
    """The first tone of a siren is a beep as far as 25 ms go."""
    spectra, beeps = [], []
    for clip in all_of("synthetic_events"):
        loud = log_mel(samples_of(clip))
        for event in clip.label:
            if event["label"] in ("beep", "siren"):
                spectra.append(loud[int(100 * (event["onset"] + event["offset"]) / 2)])
                beeps.append(event["label"] == "beep")
    half = len(beeps) // 2
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(spectra[:half], beeps[:half])
    assert 0.5 < head.score(spectra[half:], beeps[half:]) < 0.85


# --- Labels as numbers ---


@cache
def traits(task: str) -> dict[str, Array]:
    """What there is to know of the clips of all splits: a value a clip each."""
    labels = [clip.label for clip in all_of(task)]
    if task == "synthetic_tags":
        return {tag: np.array([float(tag in label["tags"].split(";")) for label in labels]) for tag in TAGS}
    if task == "synthetic_events":
        return {name: np.array([float(sum(e["label"] == name for e in label)) for label in labels]) for name in EVENTS}
    if task == "synthetic_notes":
        return {str(n): np.array([float(sum(e["note"] == n for e in label)) for label in labels]) for n in range(60, 72)}
    if task == "synthetic_transcript":
        return {c: np.array([label["trans"].count(c) / len(label["trans"]) for label in labels]) for c in LETTERS}
    if task == "synthetic_number":
        return {"score": np.array([label["score"] for label in labels])}
    meanings = [meaning_of(label["caption_1"]) for label in labels]
    columns = {name: np.array([float(name in pair) for pair, _, _ in meanings]) for name in NOUNS}
    return columns | {place: np.array([float(m[k]) for m in meanings]) for k, place in ((1, "high"), (2, "rain"))}


def captions_of(split: str) -> list[str]:
    return [caption for clip in split_of("synthetic_captions", split) for caption in clip.label.values()]


def meaning_of(caption: str) -> tuple[frozenset[str], bool, bool]:
    """The two sounds, whether they are high, whether it rains: each said by exactly one of its words."""
    words = re.findall(r"\w+", caption)
    pair = [name for name, nouns in NOUNS.items() for noun in nouns if noun in words]
    assert len(pair) == len(set(pair)) == 2, caption
    high, low, rain, silence = (sum(word in words for word in choice) for choice in (HIGH, LOW, RAIN, SILENCE))
    assert high + low == rain + silence == 1, caption
    return frozenset(pair), bool(high), bool(rain)


def order_of(caption: str) -> tuple[str, ...] | None:
    """The sounds from first to last; None where they are at once."""
    words = re.findall(r"\w+", caption)
    pair = sorted((words.index(noun), name) for name, nouns in NOUNS.items() for noun in nouns if noun in words)
    names = tuple(name for _, name in pair)
    if " after " in caption:
        return names[::-1]
    forward = any(word in caption for word in (", then ", " followed by ", " later ", " before "))
    at_once = any(word in caption for word in (" over ", " at once", " together with ", " along with ", " during "))
    assert forward != at_once, caption
    return names if forward else None


def active(clip: Clip, task: str, times: Array) -> NDArray[np.bool_]:
    """(times, classes): which events sound at these instants."""
    start, end, label, names = event_fields(task)
    rows = np.zeros((len(times), len(names)), bool)
    for event in clip.label:
        rows[(times >= event[start]) & (times < event[end]), names.index(str(event[label]))] = True
    return rows


def segments(clip: Clip, task: str, seconds: float) -> NDArray[np.bool_]:
    """(segments, classes): which events sound within each."""
    start, end, label, names = event_fields(task)
    count = round(len(clip.waveform) / SAMPLE_RATE / seconds)
    rows = np.zeros((count, len(names)), bool)
    for event in clip.label:
        rows[int(event[start] / seconds) : int(np.ceil(event[end] / seconds)), names.index(str(event[label]))] = True
    return rows


def event_fields(task: str) -> tuple[str, str, str, list[str]]:
    target: Any = task_file(task).target
    return target.start, target.end, target.label, list(target.classes)


# --- Encoders: a clip to one vector, and what heads of scikit-learn make of it ---


def noise(clip: Clip) -> Array:
    return np.random.default_rng(zlib.crc32(clip.key.encode())).standard_normal(64)


def average_log_mel(clip: Clip) -> Array:
    mean: Array = centred(log_mel(samples_of(clip))).mean(axis=0)
    return mean


def texture(clip: Clip) -> Array:
    return texture_of(samples_of(clip))


def centred(spectra: Array) -> Array:
    return spectra - spectra.mean(axis=-1, keepdims=True)


@cache
def vectors(task: str, encoder: Callable[[Clip], Array]) -> tuple[Array, Array]:
    """Of the clips before the test split, and of the test split, scaled alike."""
    everything = np.array([encoder(clip) for clip in all_of(task)])
    known = everything[: -SPLITS["test"]]
    scaled = (everything - known.mean(axis=0)) / known.std(axis=0)
    return scaled[: -SPLITS["test"]], scaled[-SPLITS["test"] :]


@cache
def decisions(task: str, encoder: Callable[[Clip], Array]) -> Array:
    """Log odds of each trait for each test clip, (clips, traits)."""
    known, tested = vectors(task, encoder)
    columns = []
    for trait in traits(task).values():
        head = LogisticRegression(C=0.1, max_iter=1000).fit(known, trait[: len(known)])
        columns.append(head.decision_function(tested))
    return np.column_stack(columns)


def average_precision(task: str, encoder: Callable[[Clip], Array]) -> float:
    truth = np.column_stack(list(traits(task).values()))[-SPLITS["test"] :]
    return float(average_precision_score(truth, decisions(task, encoder)))


def correlation(encoder: Callable[[Clip], Array]) -> float:
    known, tested = vectors("synthetic_number", encoder)
    score = traits("synthetic_number")["score"]
    head = RidgeCV(np.geomspace(0.1, 1000, 9)).fit(known, score[: len(known)])
    return float(pearsonr(head.predict(tested), score[-len(tested) :])[0])
