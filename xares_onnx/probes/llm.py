"""Train the adapter of the `llm` head: frames into a frozen language model that writes the transcript.

Batches of whole clips, in an order drawn anew each epoch; Adam on the adapter alone, at `training.learning_rate` or at the
constant rates of a sweep. Otherwise X-ARES's arithmetic, except that neither padding nor the neighbours of a clip matter.

The epoch is chosen as X-ARES chooses it: the likeliest token at every position of the text given the true text before it,
decoded, cut to the characters of the reference, lower-cased, and 1 - WER over all validation clips (lower-cased too). This
is quick to compute, but not a recogniser's word error rate. The score is of text that the chosen adapter writes freely.

Training takes hours, so it can be killed: see `train_llm`. On the CPU the same inputs give the same bytes (with one version
of torch, on one machine, with one number of threads); on CUDA some sums run in no fixed order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import ScoreUndefinedError
from ..files import write_aside
from ..models.llm import MOST_NEW_TOKENS, Adapter, LanguageModel
from .sweep import Clock, Sweep, swept
from .training import HeadResult, Indices, OnEpoch, Rows, Selection, Settings, check_finite, generator, learning_rate

Frames = Sequence[npt.NDArray[Any]]
SWEEP = Sweep(rates=(1e-4, 5e-4, 2e-3, 1e-2), batch_size=4, epochs=20, patience=3)
_FRAMES_AT_ONCE = 4096  # in training, with padding; activations of Qwen2.5-0.5B take 3 MB per frame in float32
_CLIPS_AT_ONCE = 16  # in scoring, which keeps no gradient; of similar lengths, so that little is padding


def train_llm(
    frames: Frames,
    transcripts: Sequence[str],
    folds: Sequence[Rows],
    settings: Settings | Sweep,
    seeds: Sequence[int],
    *,
    language_model: LanguageModel,
    checkpoints: Path | None,
    name: str,
    least_score: float = -math.inf,
    on_epoch: OnEpoch = lambda epoch: None,
) -> list[HeadResult]:
    """Train an adapter for every fold and seed, one after the other.

    A later call with the same arguments resumes from the checkpoints and gives the same result, bit for bit on the CPU. A
    checkpoint holds the adapter without the language model, and is written before `on_epoch` is called. A damaged file, or
    one of another training, is ignored and written anew.

    Args:
        frames: A (frames, dim) array per clip, float16 or float32, at least one frame; read batch by batch.
        transcripts: The text to write, one per clip; those of validation clips are not empty.
        folds: Clip numbers.
        settings: With a `Sweep`, rates and epochs are chosen on the validation clips. All scores of a rate are
            teacher-forced, because writing freely would take longer than training.
        seeds: One adapter each per fold.
        language_model: Reads the adapted frames; frozen.
        checkpoints: Folder for a checkpoint of each training after each epoch.
        name: Names the encoder, the data and the task in a checkpoint: it stands for the content of `frames`.
        least_score: Lower bound of the score (1 - WER) that chooses the epoch: 0 in X-ARES.
        on_epoch: Called after each epoch of this call, and as a sweep's trainings end.

    Returns:
        Results sorted by fold and seed; `predictions` is a list of the generated texts.

    Raises:
        ScoreUndefinedError: An adapter gives NaN or infinity, or the longest clip leaves the language model no positions to
            write in.
        DiskFullError, MachineError: A checkpoint cannot be written.
    """
    _check_positions(frames, folds, language_model)
    results: list[HeadResult] = []
    clock = Clock(settings, len(folds), len(seeds), on_epoch) if isinstance(settings, Sweep) else None
    for number, rows in enumerate(folds):

        def training(seed: int, rate: float, fold: int = number, rows: Rows = rows) -> _Training:
            learner = _Training(frames, transcripts, rows, settings, rate, language_model, fold, seed, least_score)
            if checkpoints is not None:
                learner.resume(checkpoints / f"{learner.digest(name)}.safetensors")
            return learner

        if isinstance(settings, Sweep):
            assert clock is not None
            results += swept(training, number, rows, seeds, settings, clock)
        else:
            results += [training(seed, settings.learning_rate).run(settings, on_epoch) for seed in sorted(seeds)]
    return results


class _Training:
    """One adapter in training: its last weights, its best ones, Adam's moments."""

    def __init__(
        self,
        frames: Frames,
        transcripts: Sequence[str],
        rows: Rows,
        settings: Settings | Sweep,
        rate: float,
        language_model: LanguageModel,
        fold: int,
        seed: int,
        least_score: float,
    ) -> None:
        self._frames, self._transcripts, self._rows = frames, transcripts, rows
        self._settings, self._language_model = settings, language_model
        self._fold, self._seed, self._least_score = fold, seed, least_score
        self._adapter: Adapter = language_model.adapter(frames[rows.train[0]].shape[1], generator(seed, fold))
        self._adam: torch.optim.Adam | None = torch.optim.Adam(self._adapter.parameters(), lr=rate)
        self._best = _copied(self._adapter)
        self._base_rate = self._rate = rate
        self._path: Path | None = None
        self.epoch, self.selection = 0, Selection()

    def run(self, settings: Settings, on_epoch: OnEpoch) -> HeadResult:
        """Train as X-ARES does."""
        while self.epoch < settings.epochs:
            self.epoch += 1
            self._rate = learning_rate(self.epoch, settings.epochs, settings.learning_rate)
            self.train()
            if self.selection.better(self._teacher_forced(self._rows.valid), self.epoch):
                self.keep()
            self.save()
            on_epoch(self.epoch)
        self.finish()
        return HeadResult(self._fold, self._seed, *self.predict(), self.selection.epoch, self.selection.score)

    def train(self) -> None:
        assert self._adam is not None
        for group in self._adam.param_groups:
            group["lr"] = self._rate
        # Drawn from the epoch's own number, so that a resumed training does not need the epochs before.
        order = np.random.default_rng([self._seed, self._fold, self.epoch]).permutation(self._rows.train)
        for start in range(0, len(order), self._settings.batch_size):
            batch = order[start : start + self._settings.batch_size]
            self._adam.zero_grad()
            tokens = 0
            for part in self._parts(batch):
                losses = self._language_model.losses(self._adapted(part), self._texts(part))
                losses.sum().backward()  # type: ignore[no-untyped-call]
                tokens += len(losses)
            for parameter in self._adapter.parameters():
                if parameter.grad is not None:
                    parameter.grad /= tokens
            self._adam.step()

    def _parts(self, batch: Indices) -> list[Indices]:
        """A batch in pieces whose activations fit into memory; the mean over its tokens is the same."""
        parts: list[list[int]] = [[]]
        for clip in batch:
            longest = max(len(self._frames[other]) for other in (*parts[-1], clip))
            if parts[-1] and longest * (len(parts[-1]) + 1) > _FRAMES_AT_ONCE:
                parts.append([])
            parts[-1].append(clip)
        return [np.array(part) for part in parts]

    def selected(self) -> tuple[float, float]:
        return self._teacher_forced(self._rows.valid), self._valid_loss()

    @torch.no_grad()
    def _valid_loss(self) -> float:
        """Mean over the tokens."""
        total, tokens = 0.0, 0
        for clips in self._blocks(np.unique(self._rows.valid)):
            losses = self._language_model.losses(self._adapted(clips), self._texts(clips))
            total, tokens = total + float(losses.double().sum()), tokens + len(losses)
        return total / tokens if tokens else math.nan

    def keep(self) -> None:
        self._best = _copied(self._adapter)

    def finish(self) -> None:
        self._adapter.load_state_dict(self._best)
        self._adapter.zero_grad()
        self._adam, self._best = None, {}

    def score(self, rows: Indices) -> float:
        return max(0.0, self._teacher_forced(rows))

    def predict(self) -> tuple[Indices, list[str]]:
        examples = np.unique(self._rows.test)
        return examples, self._in_blocks(examples, lambda adapted, texts: self._language_model.generate(adapted))

    def _teacher_forced(self, rows: Indices) -> float:
        """1 - WER, not below `least_score`; nan without clips."""
        clips = np.unique(rows)
        if not len(clips):
            return math.nan
        references = self._texts(clips)
        written = self._in_blocks(clips, self._language_model.teacher_forced)
        cut = [text[: len(reference)].lower() for text, reference in zip(written, references, strict=True)]
        return max(self._least_score, 1 - jiwer.wer([reference.lower() for reference in references], cut))

    def _in_blocks(self, clips: Indices, write: Callable[[Sequence[Tensor], Sequence[str]], list[str]]) -> list[str]:
        """The text that `write` gives for each clip, in the order of `clips`."""
        texts: dict[int, str] = {}
        for block in self._blocks(clips):
            with torch.no_grad():
                adapted = self._adapted(block)
            check_finite(torch.cat(list(adapted)))
            texts |= zip(block.tolist(), write(adapted, self._texts(block)), strict=True)
        return [texts[clip] for clip in clips.tolist()]

    def _blocks(self, clips: Indices) -> list[Indices]:
        """Clips in blocks to score at once, of similar lengths."""
        by_length = clips[np.argsort([len(self._frames[clip]) for clip in clips], kind="stable")]
        return [by_length[start : start + _CLIPS_AT_ONCE] for start in range(0, len(clips), _CLIPS_AT_ONCE)]

    def _adapted(self, clips: Indices) -> Sequence[Tensor]:
        """Adapted frames (frames, hidden) per clip."""
        frames = [torch.from_numpy(np.array(self._frames[clip], np.float32)) for clip in clips]
        adapted: Tensor = self._adapter(torch.cat(frames).to(self._language_model.device))
        return torch.split(adapted, [len(part) for part in frames])

    def _texts(self, clips: Indices) -> list[str]:
        return [self._transcripts[clip] for clip in clips]

    def digest(self, name: str) -> str:
        """sha256 of everything that influences the training: the name of its checkpoint."""
        rows = self._rows
        influences = {
            "name": name,
            "seed": self._seed,
            "fold": self._fold,
            "settings": [self._settings.epochs, self._settings.batch_size, self._base_rate],
            **({"patience": self._settings.patience} if isinstance(self._settings, Sweep) else {}),
            **({"least score": self._least_score} if math.isfinite(self._least_score) else {}),
            "language model": {key: text for key, text in self._language_model.described().items() if key != "name"},
            "torch": torch.__version__,
            "train": [(int(clip), self._frames[clip].shape, self._transcripts[clip]) for clip in rows.train],
            "valid": [(int(clip), self._frames[clip].shape, self._transcripts[clip]) for clip in rows.valid],
        }
        return hashlib.sha256(json.dumps(influences).encode()).hexdigest()

    def save(self) -> None:
        if self._path is None:
            return
        assert self._adam is not None
        tensors: dict[str, Tensor] = {}
        for key, parameter in self._adapter.named_parameters():
            moments = self._adam.state[parameter]
            tensors |= {f"adapter.{key}": parameter, f"best.{key}": self._best[key]}
            tensors |= {f"adam.{key}.{moment}": moments[moment] for moment in ("step", "exp_avg", "exp_avg_sq")}
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        state = {
            "training": self._path.stem,
            "epoch": str(self.epoch),
            "best_epoch": str(self.selection.epoch),
            "score": repr(self.selection.score),
            "loss": repr(self.selection.loss),
            "lowest_loss": repr(self.selection.lowest_loss),
            "improved": str(self.selection.improved),
            "sha256": _content_digest(tensors),
        }
        write_aside(self._path, save(tensors, state), anew=True)

    def resume(self, path: Path) -> None:
        """Keep this training's checkpoint at `path`, and resume from it if it is whole and of this training."""
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                state = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return
        if state.get("training") != path.stem or state.get("sha256") != _content_digest(tensors):
            return
        assert self._adam is not None
        device = self._language_model.device
        self._adapter.load_state_dict({key: tensors[f"adapter.{key}"] for key in self._best})
        self._best = {key: tensors[f"best.{key}"].to(device) for key in self._best}
        for key, parameter in self._adapter.named_parameters():
            moments = {moment: tensors[f"adam.{key}.{moment}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
            # Adam keeps its count on the CPU.
            self._adam.state[parameter] = {k: m if k == "step" else m.to(device) for k, m in moments.items()}
        self.epoch = int(state["epoch"])
        self.selection.epoch, self.selection.score = int(state["best_epoch"]), float(state["score"])
        if isinstance(self._settings, Sweep):
            self.selection.loss, self.selection.lowest_loss = float(state["loss"]), float(state["lowest_loss"])
            self.selection.improved = int(state["improved"])
        else:  # `run` selects without losses
            self.selection.loss = self.selection.lowest_loss = 0.0


def _check_positions(frames: Frames, folds: Sequence[Rows], language_model: LanguageModel) -> None:
    positions = language_model.most_positions
    clips = np.concatenate([part for rows in folds for part in (rows.train, rows.valid, rows.test)])
    longest = max((len(frames[clip]) for clip in clips), default=0)
    if positions is not None and longest + 1 + MOST_NEW_TOKENS > positions:
        raise ScoreUndefinedError(
            f"the longest clip has {longest} frames, and the language model {positions} positions"
            f" for them and up to {MOST_NEW_TOKENS} tokens of text; choose one with more"
        )


def _copied(adapter: Adapter) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in adapter.state_dict().items()}


def _content_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].numpy().data)
    return digest.hexdigest()
