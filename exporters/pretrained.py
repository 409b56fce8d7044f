"""Checkpoints in the layout of `transformers`: a local folder, or a model in its local cache.

Nothing is downloaded, no code of a checkpoint runs, and weights are read from safetensors files alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import Tensor, nn

from xares_onnx.errors import UsageError

__all__ = ["Checkpoint", "LastHiddenState"]

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"


class LastHiddenState(nn.Module):
    """A `transformers` encoder as a module from its one input to its last hidden state, a plain tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.model(inputs).last_hidden_state
        return hidden


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the config, preprocessor config and weights of one model; `source` names it in metadata."""

    folder: Path
    source: str

    @classmethod
    def find(cls, family: str, checkpoint: str | None, *others: str) -> Checkpoint:
        """Find a checkpoint.

        Args:
            family: The `model_type` that its config must have, unless it has one of the `others`.
            checkpoint: A folder, or the name of a model in the local cache.

        Raises:
            UsageError: There is no such folder or cached model, or it is of another family.
        """
        if checkpoint is None:
            raise UsageError(f"{family} needs a checkpoint: a local folder, or the name of a model in the local cache")
        if Path(checkpoint).is_dir():
            result = cls(Path(checkpoint), Path(checkpoint).resolve().name)
        else:
            try:
                folder = Path(hf_hub_download(checkpoint, _CONFIG, local_files_only=True)).parent
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"there is no folder {checkpoint} and no model of that name in the local cache; download it first"
                ) from error
            result = cls(folder, f"{checkpoint}@{folder.name}")
        if (model_type := result.config().get("model_type")) not in (family, *others):
            raise UsageError(
                f"{checkpoint} holds a model of type {model_type!r}, not {family!r}; export it as its own family"
            )
        return result

    @property
    def license(self) -> str:
        """As the head of the model card states it."""
        card = self.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        stated = re.match(r"---\n(?:(?!---).*\n)*?license:[ \t]*(\S+)", text)
        return stated[1].strip("\"'") if stated else "not stated"

    def config(self) -> dict[str, Any]:
        return self._json(_CONFIG)

    def preprocessor(self) -> dict[str, Any]:
        """The preprocessor's settings. They are half of the encoder, so no default replaces them."""
        return self._json(_PREPROCESSOR)

    def load(self, part: str = "", config: transformers.PreTrainedConfig | None = None) -> Any:
        """Load the model in float32, for inference.

        Args:
            config: Instead of the checkpoint's own, of a type that `transformers` knows.
            part: Every weight whose name starts with this must be in the file, since `transformers` would draw it at random.

        Raises:
            UsageError: A weight is missing or has another shape, or the checkpoint cannot be loaded.
        """
        with _quiet_transformers():
            try:
                model, loading = transformers.AutoModel.from_pretrained(
                    self.folder,
                    **({"config": config} if config is not None else {}),
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    attn_implementation="eager",
                    dtype=torch.float32,
                    output_loading_info=True,
                )
            except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
                detail = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise UsageError(f"{self.folder} cannot be loaded; it needs safetensors weights: {detail}") from error
        # The embedding of masked frames belongs to the training; checkpoints fine-tuned by others lack it.
        missing = {name for name in loading["missing_keys"] if name.startswith(part)} - {"masked_spec_embed"}
        if unusable := sorted(missing | {f"{name}" for name, *_ in loading["mismatched_keys"]}):
            raise UsageError(
                f"{self.folder} lacks weights of the encoder, or has them in another shape, {unusable[0]} first of "
                f"{len(unusable)}; use the checkpoint as it was published"
            )
        return model.eval()

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UsageError(f"{self.folder} has no {name}; use the checkpoint as it was published") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{self.folder / name} cannot be read as json: {error}") from error
        if not isinstance(content, dict):
            raise UsageError(f"{self.folder / name} is not a json object")
        return content


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars, and no reports of unused heads: missing weights become an error instead."""
    logging: Any = transformers.utils.logging  # half of it has no types
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
