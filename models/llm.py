"""A frozen causal language model that transcribes speech, and the trainable adapter in front of it (X-ARES's ASR head).

One sequence per utterance: its adapted frames, a separator, the tokens of its text, the end token. The language model reads
the frames in place of token embeddings.

`transformers` is imported only to load a language model.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MachineError, UsageError
from .device import torch_device

MOST_NEW_TOKENS = 200
REPETITION_PENALTY = 1.1  # Keskar et al. 2019, CTRL, arXiv:1909.05858, section 4.1
_SEPARATOR = "<|vision_end|>"  # a token of Qwen2.5's that its training on text has left unused
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Adapter(nn.Module):
    """silu(W1 x) * (W2 x), then W3, each with a bias: frames (frames, dim) to token embeddings (frames, hidden)."""

    def __init__(self, dim: int, inner: int, hidden: int, rng: np.random.Generator) -> None:
        """Draw the weights from `rng`, as torch draws an `nn.Linear`: uniform within 1/sqrt(inputs)."""
        super().__init__()
        self.gate = _drawn_linear(dim, inner, rng)
        self.value = _drawn_linear(dim, inner, rng)
        self.output = _drawn_linear(inner, hidden, rng)

    def forward(self, frames: Tensor) -> Tensor:
        adapted: Tensor = self.output(nn.functional.silu(self.gate(frames)) * self.value(frames))
        return adapted


def _drawn_linear(inputs: int, outputs: int, rng: np.random.Generator) -> nn.Linear:
    bound = 1 / math.sqrt(inputs)
    layer = nn.Linear(inputs, outputs, device="meta")  # torch draws nothing there
    layer.weight = nn.Parameter(torch.from_numpy(rng.uniform(-bound, bound, (outputs, inputs))).float())
    layer.bias = nn.Parameter(torch.from_numpy(rng.uniform(-bound, bound, outputs)).float())
    return layer


class LanguageModel:
    """A causal language model and its tokenizer: frozen, without dropout, from local files alone.

    The weights are float32; on CUDA the products are in bfloat16 (float16 if the GPU lacks it) under torch's autocast. Only
    safetensors are read, never a pickle, and no code that comes with the model runs.

    Padding is on the left, masked, and takes no position: an utterance's text does not depend on its batch, up to rounding,
    because products of another shape may be summed in another order. In float32 logits agree to about 1e-5 of their size. So
    a text is the same alone and in any batch unless two tokens are that nearly equally likely: then either may be written.
    The same batch, machine and version of torch always give the same text.
    """

    def __init__(self, source: str | Path, device: str = "auto") -> None:
        """Load a language model and its tokenizer.

        Args:
            source: A Hugging Face folder, or the name of a model in the local Hugging Face cache.
            device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".

        Raises:
            UsageError: transformers is missing, or `source` is not a causal language model with its tokenizer and
                safetensors weights.
            MachineError: The machine lacks the device, or the device the memory.
        """
        transformers = _transformers()
        folder = _folder(source)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch_device(device)
        with _quiet(transformers):
            self.tokenizer, self.model = _load(transformers, folder)
        try:
            self.model.to(self.device)
        except RuntimeError as error:  # versions of torch have no common type for lack of memory
            raise MachineError(f"the language model cannot be moved to {self.device} ({_first_line(error)})") from error
        config = self.model.config.get_text_config(decoder=True)
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            raise UsageError(
                f"the language model in {folder} does not support logits_to_keep, which the llm head needs; choose another"
            )
        if not isinstance(getattr(config, "intermediate_size", None), int):
            raise UsageError(
                f"the config of the language model in {folder} has no intermediate_size, which is the adapter's inner width"
            )
        self.hidden_size: int = config.hidden_size
        self.intermediate_size: int = config.intermediate_size
        self.most_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.name = folder.resolve().name if Path(source).is_dir() else str(source)
        self.digest = _digest(folder)
        self._embed = self.model.get_input_embeddings()
        self._end = _end_token(self.tokenizer, folder)
        self.separator = self._separator_token()
        self._separator_id: int = self.tokenizer.convert_tokens_to_ids(self.separator)
        if max(self.tokenizer.get_vocab().values()) >= self._embed.num_embeddings:
            raise UsageError(
                f"the tokenizer in {folder} has more tokens than the language model beside it; save the model's own"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the language model's products are computed."""
        if self.device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    def described(self) -> dict[str, str]:
        """The language model's fields in a record. `digest` is the sha256 of its config, tokenizer and weight files."""
        return {
            "name": self.name,
            "digest": self.digest,
            "separator": self.separator,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }

    def adapter(self, dim: int, rng: np.random.Generator) -> Adapter:
        """A fresh adapter for frames of `dim`, as wide inside as the model's feed-forward layers, like X-ARES's."""
        return Adapter(dim, self.intermediate_size, self.hidden_size, rng).to(self.device)

    def losses(self, adapted: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Cross-entropy (tokens,) of every separator, text and end token of a batch, in the order of the utterances.

        Args:
            adapted: (frames, hidden) per utterance, at least one frame.
            texts: Text of each utterance.
        """
        logits, labels = self._text_logits(adapted, texts)
        counted = labels != -100
        return nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="none")

    @torch.no_grad()
    def teacher_forced(self, adapted: Sequence[Tensor], texts: Sequence[str]) -> list[str]:
        """The likeliest token at every position of text and end, each given the true ones before it, decoded."""
        logits, labels = self._text_logits(adapted, texts)
        chosen = logits.argmax(dim=2)
        # The first label of an utterance is the separator, not text.
        return [self._decoded(row[label != -100][1:]) for row, label in zip(chosen, labels, strict=True)]

    @torch.no_grad()
    def generate(self, adapted: Sequence[Tensor]) -> list[str]:
        """The text that the model writes behind the separator: always its likeliest token, at most 200, up to the end token.

        Before each choice, the logits of tokens already in the text are divided by 1.1 if positive and multiplied by it if
        negative. A text depends on its batch only if two tokens are equally likely up to rounding (see the class).
        """
        inputs, mask, positions = self._sequences(adapted, [[self._separator_id]] * len(adapted))
        tokens = torch.empty((len(adapted), 0), dtype=torch.int64, device=self.device)
        ended = torch.zeros(len(adapted), dtype=torch.bool, device=self.device)
        cache = None
        for _ in range(MOST_NEW_TOKENS):
            output = self._run(inputs, mask, positions, 1, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            written = logits.gather(1, tokens)
            penalised = torch.where(written > 0, written / REPETITION_PENALTY, written * REPETITION_PENALTY)
            chosen = logits.scatter(1, tokens, penalised).argmax(dim=1).masked_fill(ended, self._end)
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
            ended |= chosen == self._end
            if bool(ended.all()):
                break
            inputs, positions = self._embed(chosen[:, None]), positions[:, -1:] + 1
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        return [self._decoded(row) for row in tokens]

    def _text_logits(self, adapted: Sequence[Tensor], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Logits (batch, tokens, vocabulary) and the labels (batch, tokens) that they predict; -100 for padding."""
        texts_ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        ids = [[self._separator_id, *text_ids, self._end] for text_ids in texts_ids]
        longest = max(map(len, ids))
        labels = torch.full((len(ids), longest), -100, device=self.device)
        for label, row in zip(labels, ids, strict=True):
            label[longest - len(row) :] = torch.tensor(row, device=self.device)
        # The logits of the frames would take gigabytes. A token is predicted one position before its own.
        logits: Tensor = self._run(*self._sequences(adapted, ids), longest + 1, use_cache=False).logits[:, :-1]
        return logits, labels

    def _sequences(self, adapted: Sequence[Tensor], ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (batch, length, hidden), attention mask (batch, length), positions (batch, length), padded on the left."""
        rows = [
            torch.cat((frames, self._embed(torch.tensor(row, device=self.device))))
            for frames, row in zip(adapted, ids, strict=True)
        ]
        length = max(map(len, rows))
        inputs = torch.stack([nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        starts = torch.tensor([length - len(row) for row in rows], device=self.device)[:, None]
        positions = torch.arange(length, device=self.device) - starts
        return inputs, (positions >= 0).long(), positions.clamp(min=0)

    def _run(self, inputs: Tensor, mask: Tensor, positions: Tensor, last: int, **options: Any) -> Any:
        """The model's output, with the logits of the `last` positions only."""
        with self._autocast():
            return self.model(
                inputs_embeds=inputs, attention_mask=mask, position_ids=positions, logits_to_keep=last, **options
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", dtype=self.dtype) if self.device.type == "cuda" else nullcontext()

    def _decoded(self, tokens: Tensor) -> str:
        text: str = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return text

    def _separator_token(self) -> str:
        """Qwen2.5's, if the tokenizer has it; else the token that begins a sequence, else the one that ends it."""
        if _SEPARATOR in self.tokenizer.get_vocab():
            return _SEPARATOR
        return str(self.tokenizer.bos_token or self.tokenizer.eos_token)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError("the llm head needs transformers: pip install 'xares-onnx[llm]'") from error


def _folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(str(source), local_files_only=True))
    except (OSError, ValueError) as error:
        raise UsageError(f"{source} is neither a folder nor a model in the local Hugging Face cache") from error


def _load(transformers: Any, folder: Path) -> tuple[Any, Any]:
    """(tokenizer, model), the model frozen, on the CPU."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json, so it is not a language model; name a Hugging Face folder")
    # transformers makes up an empty tokenizer if there is none.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(f"the language model in {folder} has no tokenizer beside it: save the tokenizer to the same folder")
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"there are no safetensors weights in {folder}; others are pickles, which are never read")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **local)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
        )
    except Exception as error:  # a stranger's files may make transformers raise anything
        raise UsageError(f"the language model in {folder} cannot be loaded ({_first_line(error)})") from error
    if report["missing_keys"]:  # transformers would leave them random
        raise UsageError(
            f"the weights in {folder} lack {min(report['missing_keys'])}, so the language model is incomplete; save it again"
        )
    return tokenizer, model.eval().requires_grad_(False)


def _end_token(tokenizer: Any, folder: Path) -> int:
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer in {folder} has no end token (eos_token), so nothing would end a transcript")
    return int(tokenizer.eos_token_id)


def _digest(folder: Path) -> str:
    """sha256 over names and contents of the config, tokenizer and weight files, in order of their names."""
    contents = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".safetensors") and path.is_file():
            with path.open("rb") as file:
                contents[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' progress bars and load reports: whatever matters in them is raised."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
