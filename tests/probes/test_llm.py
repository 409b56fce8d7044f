"""The llm head against the plainest way to do the same: one utterance at a time, no padding, no cache, torch's own layers.

The language model is a real one, only tiny: a Qwen2 of two layers that was taught to copy what stands before the separator.
Speech is made of one vector per character, and some noise. Where two tokens are equally likely up to rounding, either is
right: the plain way gives every text that may be written, nearly always one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_lm import (
    DIM,
    HIDDEN,
    INNER,
    Head,
    Plain,
    PlainAdapter,
    Speech,
    adapted_noise,
    make_folder,
    plain_from,
    same,
    sentences,
    speech,
    word_error_rate,
)
from torch import Tensor, nn

from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.models.llm import Adapter, LanguageModel
from xares_onnx.probes import llm
from xares_onnx.probes.sweep import Sweep


@pytest.fixture(scope="module")
def folder(taught_lm: Path) -> Path:
    return taught_lm


@pytest.fixture(scope="module")
def untaught_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its weights as they were drawn: it babbles on and on."""
    return make_folder(tmp_path_factory.mktemp("models") / "untaught-lm", taught=False)


@pytest.fixture(scope="module")
def language_model(folder: Path) -> LanguageModel:
    return LanguageModel(folder, "cpu")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return plain_from(folder)


# -- what it is for ---------------------------------------------------------------------------------------------------


def test_the_adapter_learns_to_transcribe(language_model: LanguageModel) -> None:
    task = speech(300, 30, 60)
    (result,) = task.train(language_model)
    references = [task.transcripts[clip] for clip in result.examples]
    assert not {task.transcripts[clip] for clip in task.folds[0].train} >= set(references)
    assert 1 - word_error_rate(references, result.predictions) > 0.8
    assert result.valid_score > 0.8
    np.testing.assert_array_equal(result.examples, np.sort(task.folds[0].test))


def test_shuffled_transcripts_teach_nothing(language_model: LanguageModel) -> None:
    task = speech(300, 30, 60)
    train = task.folds[0].train
    shuffled = np.array(task.transcripts, object)
    shuffled[train] = np.random.default_rng(0).permutation(shuffled[train])
    (result,) = replace(task, transcripts=shuffled.tolist()).train(language_model)
    assert 1 - word_error_rate([task.transcripts[clip] for clip in result.examples], result.predictions) < 0.2


def test_training_leaves_the_language_model_as_it_is(language_model: LanguageModel) -> None:
    before = {key: tensor.clone() for key, tensor in language_model.model.state_dict().items()}
    speech(12, 4, 4).train(language_model, Head(epochs=1))
    after = language_model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(not p.requires_grad and p.grad is None for p in language_model.model.parameters())


# -- sequences: loss, teacher forcing, generation ---------------------------------------------------------------------

utterances = st.lists(st.tuples(st.integers(1, 12), st.text("ABC d'é", max_size=9)), min_size=1, max_size=5)


@given(utterances, st.integers(0, 99))
@settings(max_examples=25)
def test_the_loss_is_the_mean_over_tokens_one_utterance_at_a_time(
    language_model: LanguageModel, plain: Plain, batch: list[tuple[int, str]], seed: int
) -> None:
    adapted, texts = adapted_noise([length for length, _ in batch], seed), [text for _, text in batch]
    loss = language_model.losses(adapted, texts).mean()
    torch.testing.assert_close(loss, plain.loss(adapted, texts), atol=1e-4, rtol=1e-5)


def test_the_gradient_reaches_every_frame_as_without_padding(language_model: LanguageModel, plain: Plain) -> None:
    texts = ["AB", "CD EFG", "H"]
    adapted = [frames.requires_grad_() for frames in adapted_noise([3, 11, 7])]
    gradients = torch.autograd.grad(language_model.losses(adapted, texts).mean(), adapted)
    expected = torch.autograd.grad(plain.loss(adapted, texts), adapted)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert bool((reference != 0).any(dim=1).all())
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-4)


@given(utterances, st.integers(0, 99))
@settings(max_examples=15)
def test_teacher_forcing_reads_the_likeliest_token_after_each_true_one(
    language_model: LanguageModel, plain: Plain, batch: list[tuple[int, str]], seed: int
) -> None:
    adapted, texts = adapted_noise([length for length, _ in batch], seed), [text for _, text in batch]
    written = language_model.teacher_forced(adapted, texts)
    for frames, text, one in zip(adapted, texts, written, strict=True):
        assert one in plain.teacher_forced(frames, text)


def spoken(plain: Plain, text: str) -> Tensor:
    """What the language model copies: the embeddings of the text's own tokens."""
    return plain.model.get_input_embeddings()(torch.tensor(plain.tokenizer(text).input_ids)).detach()


def test_the_language_model_is_sure_of_what_it_copies(plain: Plain) -> None:
    """So that no kernel's rounding decides a test: the right token leads by 3 even where the penalty is held against it."""
    for text in sentences(np.random.default_rng(7), 60):
        ids = plain.ids(text)
        logits = plain.logits(spoken(plain, text), ids)[len(text) : -1]
        right = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        others = logits.scatter(1, torch.tensor(ids[1:])[:, None], -torch.inf).amax(dim=1)
        assert (right / 1.1 - others).min() > 3


def test_generation_is_the_plain_loop_alone_and_in_a_batch(language_model: LanguageModel, plain: Plain) -> None:
    texts = ["AB", "DC E", "GH KA"]
    adapted = [spoken(plain, text) for text in texts] + adapted_noise([1, 5, 14], scale=0.5)
    expected = [plain.generate(frames) for frames in adapted]
    assert expected[:3] == [{text} for text in texts]
    together = language_model.generate(adapted)
    reversed_order = language_model.generate(adapted[::-1])[::-1]
    alone = [language_model.generate([frames])[0] for frames in adapted]
    for written in zip(together, reversed_order, alone, strict=True):
        may_be_written = expected.pop(0)
        assert set(written) <= may_be_written


@pytest.mark.parametrize("shift", [0.0, -8.0])
def test_the_repetition_penalty_and_the_limit_of_tokens_matter(untaught_folder: Path, shift: float) -> None:
    """With logits of either sign."""
    plain, language_model = plain_from(untaught_folder), LanguageModel(untaught_folder, "cpu")
    for model in (plain.model, language_model.model):
        model.lm_head.register_forward_hook(lambda _, __, logits: logits + shift)
    (adapted,) = adapted_noise([9], scale=2.0)
    written = {penalty: plain.tokens(adapted, penalty) for penalty in (1.0, 1.1, 1.2)}
    assert {len(tokens) for tokens in written[1.1]} == {200}
    (text,) = language_model.generate([adapted])
    assert [text in map(plain.decoded, tokens) for tokens in written.values()] == [False, True, False]


def test_padding_goes_to_the_longest_and_logits_are_those_of_the_text(language_model: LanguageModel) -> None:
    shapes: list[tuple[tuple[int, ...], int]] = []
    positions: list[list[list[int]]] = []

    def note(_: nn.Module, __: Any, inputs: dict[str, Any], output: Any) -> None:
        shapes.append((tuple(inputs["inputs_embeds"].shape), output.logits.shape[1]))
        positions.append(inputs["position_ids"].tolist())

    hook = language_model.model.register_forward_hook(note, with_kwargs=True)
    try:
        language_model.losses(adapted_noise([1750, 30, 400, 5]), ["A", "ABCDEFGH", "", "AB"])
        language_model.generate([torch.zeros(1, HIDDEN), torch.zeros(40, HIDDEN)])
    finally:
        hook.remove()
    assert shapes[0] == ((4, 1750 + 3, HIDDEN), len("ABCDEFGH") + 3)  # separator, end, and one position before
    assert shapes[1] == ((2, 40 + 1, HIDDEN), 1)
    assert {shape for shape, _ in shapes[2:]} <= {(2, 1, HIDDEN)}
    # Every utterance counts from its own first frame, whatever stands before it.
    assert [row[-length:] for row, length in zip(positions[0], (1753, 40, 402, 9), strict=True)] == [
        list(range(length)) for length in (1753, 40, 402, 9)
    ]
    assert [row[-1] for row in positions[1]] == [1, 40]
    assert all(step == [[2 + number], [41 + number]] for number, step in enumerate(positions[2:]))


# -- training ---------------------------------------------------------------------------------------------------------


def kept_weights(path: Path, part: str = "adapter.") -> dict[str, Tensor]:
    return {key.removeprefix(part): tensor for key, tensor in load_file(path).items() if key.startswith(part)}


@pytest.mark.parametrize("frames_at_once", [4096, 6, 1])
def test_training_is_torchs_own_adam_on_plain_losses(
    language_model: LanguageModel, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames_at_once: int
) -> None:
    """However many pieces a batch is computed in."""
    largest = 0

    def note(_: nn.Module, __: Any, inputs: dict[str, Any], ___: Any) -> None:
        nonlocal largest
        if torch.is_grad_enabled():
            largest = max(largest, len(inputs["inputs_embeds"]))

    monkeypatch.setattr(llm, "_FRAMES_AT_ONCE", frames_at_once)
    task = speech(21, 3, 3, folds=2)
    head = Head(epochs=3, batch_size=4, learning_rate=3e-3)
    fold, seed = 1, 5
    adapter = PlainAdapter(seed, fold)
    adam = torch.optim.Adam(adapter.parameters())
    for epoch in range(1, 4):
        adam.param_groups[0]["lr"] = 3e-3 * (0.55 + 0.45 * math.cos(math.pi * (epoch - 1) / 3))
        order = np.random.default_rng([seed, fold, epoch]).permutation(task.folds[fold].train)
        for batch in (order[i : i + 4] for i in range(0, 21, 4)):
            adam.zero_grad()
            adapted = [adapter(torch.from_numpy(task.frames[clip])) for clip in batch]
            plain.loss(adapted, [task.transcripts[clip] for clip in batch]).backward()
            adam.step()
    hook = language_model.model.register_forward_hook(note, with_kwargs=True)
    task.train(language_model, head, [seed], checkpoints=tmp_path)
    hook.remove()
    assert largest == {4096: 4, 6: 3, 1: 1}[frames_at_once]
    expected = adapter.state_dict()
    kept = [kept_weights(path) for path in tmp_path.iterdir()]
    (weights,) = [weights for weights in kept if torch.allclose(weights["gate.bias"], expected["gate.bias"], atol=1e-2)]
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key], atol=2e-4, rtol=1e-3)


def test_a_fresh_adapter_is_drawn_as_torch_draws_layers(language_model: LanguageModel) -> None:
    adapter = language_model.adapter(DIM, np.random.default_rng([3, 4]))
    reference = PlainAdapter(3, 4)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((9, DIM)).astype(np.float32))
    torch.testing.assert_close(adapter(x), reference(x), atol=1e-6, rtol=1e-5)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (DIM + 1) * INNER + (INNER + 1) * HIDDEN
    torch_draws, ours = nn.Linear(200, 300).weight.detach(), Adapter(200, 300, 7, np.random.default_rng(0)).gate
    assert ours.weight.std().item() == pytest.approx(torch_draws.std().item(), rel=0.02)
    assert ours.bias.abs().max().item() == pytest.approx(torch_draws.abs().max().item(), rel=0.02)


def adapter_of(weights: dict[str, Tensor]) -> PlainAdapter:
    adapter = PlainAdapter(0, 0)
    adapter.load_state_dict(weights)
    return adapter.requires_grad_(False)


def teacher_forced(task: Speech, plain: Plain, weights: dict[str, Tensor]) -> list[tuple[str, set[str]]]:
    """(reference, what may be written) of each validation clip."""
    references = [task.transcripts[clip] for clip in task.folds[0].valid]
    adapted = [adapter_of(weights)(torch.from_numpy(task.frames[clip])) for clip in task.folds[0].valid]
    return [(text, plain.teacher_forced(x, text)) for x, text in zip(adapted, references, strict=True)]


def cut_and_lower(reference: str, text: str) -> tuple[str, str]:
    return reference.lower(), text[: len(reference)].lower()


def scores_by(compared: Callable[[str, str], tuple[str, str]], clips: list[tuple[str, set[str]]]) -> tuple[float, float]:
    """The lowest and the highest 1 - WER over `clips`: the same unless two tokens are equally likely, up to rounding."""
    ends = []
    for pick in (max, min):
        pairs = [
            pick((compared(reference, text) for text in texts), key=lambda pair: word_error_rate([pair[0]], [pair[1]]))
            for reference, texts in clips
        ]
        ends.append(1 - word_error_rate([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
    return ends[0] - 1e-9, ends[1] + 1e-9


def test_the_first_best_epoch_by_teacher_forcing_is_chosen(
    language_model: LanguageModel, plain: Plain, tmp_path: Path
) -> None:
    """Scores of every epoch recomputed from the weights kept after it. Two epochs at least make no error: the first counts.

    The test clips are noise, of which adapters of different epochs make different texts.
    """
    task = speech(300, 12, 30)
    for clip in task.folds[0].test:
        task.frames[clip] = np.random.default_rng(clip).standard_normal((6, DIM)).astype(np.float32)
    adapters: list[dict[str, Tensor]] = []

    def note(_: int) -> None:
        adapters.append(kept_weights(*tmp_path.iterdir()))

    (result,) = task.train(language_model, Head(epochs=4), checkpoints=tmp_path, on_epoch=note)
    scores = [scores_by(cut_and_lower, teacher_forced(task, plain, weights)) for weights in adapters]
    best = result.best_epoch - 1
    assert 0 < best < 3
    assert scores[best][0] <= result.valid_score <= scores[best][1]
    assert all(lowest < result.valid_score for lowest, _ in scores[:best])
    assert all(lowest <= result.valid_score for lowest, _ in scores[best:])
    assert scores[-1][1] >= 1
    kept = kept_weights(*tmp_path.iterdir(), "best.")
    assert all(torch.equal(kept[key], adapters[best][key]) for key in kept)
    of_the_best, of_the_last = (
        [plain.generate(adapter_of(weights)(torch.from_numpy(task.frames[clip]))) for clip in result.examples]
        for weights in (kept, adapters[-1])
    )
    assert all(text in texts for text, texts in zip(result.predictions, of_the_best, strict=True))
    assert not all(text in texts for text, texts in zip(result.predictions, of_the_last, strict=True))


def test_selection_cuts_to_the_reference_and_lowers_case(
    language_model: LanguageModel, plain: Plain, tmp_path: Path
) -> None:
    """What follows the text, where its end is not seen, costs nothing: here the last letter said is in no reference."""
    task = speech(300, 30, 2)
    texts = task.transcripts.copy()
    for clip in task.folds[0].valid:
        texts[clip] = texts[clip][:-2] + texts[clip][-2].lower()
    task = replace(task, transcripts=texts)
    (result,) = task.train(language_model, Head(epochs=2), checkpoints=tmp_path)
    clips = teacher_forced(task, plain, kept_weights(*tmp_path.iterdir(), "best."))
    lowest, highest = scores_by(cut_and_lower, clips)
    assert lowest <= result.valid_score <= highest
    for otherwise in (
        lambda reference, text: (reference, text[: len(reference)]),
        lambda reference, text: (reference.lower(), text.lower()),
    ):
        assert scores_by(otherwise, clips)[1] < result.valid_score - 0.1


def test_xares_counts_errors_beyond_every_word_as_no_word_right(language_model: LanguageModel) -> None:
    """Of epochs in which more is wrong than there are words, its rule knows no better one and takes the first."""
    task, head = speech(60, 10, 2), Head(epochs=6)
    (plain,) = task.train(language_model, head)
    (floored,) = task.train(language_model, head, least_score=plain.valid_score + 0.1)
    assert plain.best_epoch > 1
    assert (floored.valid_score, floored.best_epoch) == (plain.valid_score + 0.1, 1)


def test_a_sweep_takes_the_best_rate_by_teacher_forcing_and_writes_with_it(
    language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = speech(120, 12, 20)
    seen: list[tuple[float, float, float, int]] = []
    selected = llm._Training.selected

    def watched(training: Any) -> tuple[float, float]:
        score_and_loss = selected(training)
        clips = training._rows.valid
        with torch.no_grad():
            losses = language_model.losses(training._adapted(clips), training._texts(clips))
        assert score_and_loss[1] == pytest.approx(float(losses.mean()), rel=1e-4)
        seen.append((score_and_loss[0], -score_and_loss[1], -training._rate, -training.epoch))
        return score_and_loss

    monkeypatch.setattr(llm._Training, "selected", watched)
    (result,) = task.train(language_model, Sweep((1e-4, 1e-2), 8, epochs=5, patience=2))
    best = max(seen)
    assert result.tuning is not None
    assert (result.valid_score, result.tuning.chosen, result.best_epoch) == (best[0], [-best[2]], -best[3])
    assert result.tuning.chosen == [1e-2]
    slow, fast = result.tuning.tried
    assert fast.test is not None
    assert fast.test > (slow.test or 0)
    at_that_rate = task.train(language_model, Sweep((1e-2,), 8, epochs=5, patience=2))
    assert at_that_rate[0].predictions == result.predictions


def test_a_sweep_of_one_rate_is_torchs_own_adam_at_that_rate(
    language_model: LanguageModel, plain: Plain, tmp_path: Path
) -> None:
    task, seed = speech(21, 0, 3), 5
    adapter = PlainAdapter(seed, 0)
    adam = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    for epoch in range(1, 4):
        order = np.random.default_rng([seed, 0, epoch]).permutation(task.folds[0].train)
        for batch in (order[i : i + 4] for i in range(0, 21, 4)):
            adam.zero_grad()
            adapted = [adapter(torch.from_numpy(task.frames[clip])) for clip in batch]
            plain.loss(adapted, [task.transcripts[clip] for clip in batch]).backward()
            adam.step()
    task.train(language_model, Sweep((3e-3,), 4, epochs=3, patience=1), [seed], checkpoints=tmp_path)
    (path,) = tmp_path.iterdir()
    for key, weight in kept_weights(path).items():
        torch.testing.assert_close(weight, adapter.state_dict()[key], atol=2e-4, rtol=1e-3)


def test_without_validation_clips_the_last_epoch_is_taken(language_model: LanguageModel) -> None:
    (result,) = speech(12, 0, 4).train(language_model, Head(epochs=2))
    assert result.best_epoch == 2
    assert math.isnan(result.valid_score)


def test_heads_are_the_same_alone_and_beside_others(language_model: LanguageModel, tmp_path: Path) -> None:
    task, head = speech(16, 6, 6, folds=2), Head(epochs=2)
    torch.manual_seed(1)
    together = task.train(language_model, head, [7, 3], checkpoints=tmp_path / "together")
    assert [(result.fold, result.seed) for result in together] == [(0, 3), (0, 7), (1, 3), (1, 7)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    alone = [replace(task, folds=task.folds[:1]).train(language_model, head, [seed])[0] for seed in (3, 7)]
    assert same(together[:2], alone)
    assert torch.equal(state, torch.get_rng_state())
    again = task.train(language_model, head, [3, 7], checkpoints=tmp_path / "again")
    assert same(together, again)
    kept = [{path.name: load_file(path) for path in (tmp_path / run).iterdir()} for run in ("together", "again")]
    assert kept[0].keys() == kept[1].keys()
    assert len(kept[0]) == 4
    for name, tensors in kept[0].items():
        assert all(torch.equal(tensor, kept[1][name][key]) for key, tensor in tensors.items())


def test_float16_and_memory_mapped_frames_are_read_as_they_are(language_model: LanguageModel, tmp_path: Path) -> None:
    task, head = speech(12, 4, 4), Head(epochs=2)
    half = [clip.astype(np.float16) for clip in task.frames]
    np.concatenate(half).tofile(tmp_path / "frames")
    mapped = np.memmap(tmp_path / "frames", np.float16, "r").reshape(-1, DIM)
    views = np.split(mapped, np.cumsum([len(clip) for clip in half])[:-1])
    expected = replace(task, frames=[clip.astype(np.float32) for clip in half]).train(language_model, head)
    assert same(replace(task, frames=views).train(language_model, head), expected)


def test_frames_that_are_not_finite_give_no_score(language_model: LanguageModel) -> None:
    task = speech(8, 0, 4)
    task.frames[task.folds[0].test[0]][:] = np.inf
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        task.train(language_model, Head(epochs=1))


def test_a_clip_beyond_the_models_positions_gives_no_score(language_model: LanguageModel) -> None:
    task = speech(8, 0, 4)
    clip = task.folds[0].test[0]
    task.frames[clip] = np.zeros((2048 - 201, DIM), np.float32)
    task.train(language_model, Head(epochs=1))
    task.frames[clip] = np.zeros((2048 - 200, DIM), np.float32)
    with pytest.raises(ScoreUndefinedError, match="the longest clip has 1848 frames, and the language model 2048 positions"):
        task.train(language_model, Head(epochs=1))
