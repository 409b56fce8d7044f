"""Properties of time: which lengths work, whether frames follow one law, and the effect of padding and chunks."""

from __future__ import annotations

import numpy as np

from ..errors import ModelError, ModelLimitError
from .findings import Outcome, failed, passed, skipped, warned
from .model_under_test import Bench, cosines
from .signals import Signal

_LONGEST_SECONDS = 30.0  # a longer declared maximum is not tried
_SHORTEST_SECONDS = 1.0  # shorter pieces are padded to this length anyway


def check_dynamic_time(bench: Bench, tolerance: float | None) -> Outcome:
    contract = bench.contract
    if contract.fixed_window:
        if all(contract.sources.get(key, "").startswith("graph") for key in ("min_samples", "max_samples", "chunk_samples")):
            return failed(
                f"the input's time axis is frozen at {contract.chunk_samples} samples",
                "export with a dynamic samples axis (dynamic_axes or dynamic_shapes in torch.onnx.export), or, if a window "
                f"is meant, declare it by chunk_samples={contract.chunk_samples}",
                measured=contract.chunk_samples,
                tolerance="dynamic",
                unit="samples",
            )
        return skipped(f"the model is declared to take windows of exactly {contract.chunk_samples} samples")
    lengths = _lengths(bench)
    bench.embed_all(_noise(bench, samples) for samples in reversed(lengths))  # the longest first, beside the others
    bad = []
    for samples in lengths:
        try:
            if not np.isfinite(bench.embed(_noise(bench, samples))).all():
                bad.append(f"{samples}: NaN or infinity")
        except ModelLimitError:
            raise
        except ModelError as error:
            bad.append(f"{samples}: {error}")
    if bad:
        return failed(
            f"fails at {len(bad)} of {len(lengths)} lengths; {bad[0]}",
            "export with a dynamic samples axis, and let no operator keep the length of the example",
            measured=len(bad),
            tolerance=0,
            unit="lengths that fail",
            details=tuple(bad),
        )
    listed = ", ".join(map(str, lengths))
    return passed(
        f"runs at {listed} samples, and at all lengths at which the law was measured", measured=0, tolerance=0, unit="failed"
    )


def check_frame_law(bench: Bench, tolerance: float | None) -> Outcome:
    contract = bench.contract
    if contract.clip_only:
        return skipped("the model gives one vector per clip")
    if contract.fixed_window:
        return skipped(f"every window gives {contract.window_frames} frames")
    wrong = []
    for samples in _lengths(bench):
        try:
            frames = len(bench.embed(_noise(bench, samples)))
        except ModelLimitError:
            raise
        except ModelError:
            continue  # dynamic-time reports it
        if frames != (expected := contract.frames_of(samples)):
            wrong.append(f"{samples} samples give {frames} frames, not {expected}")
    law = f"floor((samples - {contract.receptive_field_samples}) / {contract.hop_samples}) + 1"
    if wrong:
        return failed(
            f"{law} does not hold: {wrong[0]}",
            "export so that the frame count follows one law, such as one stride without padding to a multiple",
            measured=len(wrong),
            tolerance=0,
            unit="lengths",
            details=tuple(wrong),
        )
    return passed(f"frames = {law}", measured=0, tolerance=0, unit="lengths off")


def check_min_length(bench: Bench, tolerance: float | None) -> Outcome:
    contract = bench.contract
    if contract.fixed_window:
        return skipped("the model takes one length")
    most = _SHORTEST_SECONDS if tolerance is None else tolerance
    seconds = contract.min_samples / contract.sample_rate
    figure = {"measured": round(seconds, 4), "tolerance": most, "unit": "s"}
    says = f"{contract.min_samples} samples give {contract.frames_of(contract.min_samples)} frame(s)"
    if seconds > most:
        return warned(
            f"{says}, and shorter inputs give none, so clips under {seconds:g} s are padded with zeros",
            "let the model take shorter inputs, if it can",
            **figure,
        )
    by_law = max(contract.receptive_field_samples or 1, 1)
    if contract.sources.get("min_samples") == "measured" and not contract.clip_only and contract.min_samples > by_law:
        return warned(
            f"{says}, but by the law {by_law} samples should give one, and there the model fails or gives NaN",
            f"mend the model at one frame, or declare min_samples={contract.min_samples}",
            **figure,
        )
    return passed(says, **figure)


def check_max_length(bench: Bench, tolerance: float | None) -> Outcome:
    contract = bench.contract
    if contract.fixed_window:
        return skipped("the model takes one length")
    longest = contract.chunk_samples
    if contract.max_samples is not None and contract.max_samples <= _LONGEST_SECONDS * contract.sample_rate:
        longest = contract.max_samples
    seconds = longest / contract.sample_rate
    figure = {"measured": round(seconds, 4), "unit": "s"}
    if longest != contract.chunk_samples:
        try:
            frames = len(bench.embed(_noise(bench, longest)))
        except ModelLimitError:
            raise
        except ModelError as error:
            return failed(
                f"max_samples={longest} is declared, but at that length {error}", "declare the longest that works", **figure
            )
        if frames != (expected := contract.frames_of(longest)):
            return failed(
                f"{longest} samples give {frames} frames, but the law gives {expected}",
                "declare the longest max_samples at which the law holds",
                **figure,
            )
    declared = f"max_samples={contract.max_samples}" if contract.max_samples else "no maximum"
    return passed(f"runs at {seconds:g} s, the longest tried; {declared} declared", **figure)


def check_padding(bench: Bench, tolerance: float | None) -> Outcome:
    """Compare a clip padded with zeros, as short clips are, with the clip alone, on the frames that both have."""
    contract = bench.contract
    if contract.fixed_window:
        return skipped("the model takes one length, so nothing runs without padding")
    length = bench.samples // 2
    short = max(round(0.6 * length), contract.min_samples)
    if short >= length:
        return skipped(f"the model takes no input much shorter than {length} samples")
    clip = bench.signals["speech-like"][:short]
    plain = bench.embed(clip, short)
    padded = bench.embed(np.pad(clip, (0, length - short)), short)
    least = 0.9 if tolerance is None else tolerance
    alike = float(cosines(padded[: len(plain)], plain).mean())
    figure = {"measured": round(alike, 6), "tolerance": f">= {least:g}", "unit": "mean cosine"}
    if alike < least:
        return warned(
            f"zeros after a clip change its own frames: cosine {alike:.4f} to the frames without them",
            "give the model an input `lengths` or `attention_mask` that it respects, or accept that clips under 1 s, and "
            "tails, are embedded with zeros after them",
            **figure,
        )
    return passed(f"zeros after a clip leave its frames at cosine {alike:.4f}", **figure)


def check_chunking(bench: Bench, tolerance: float | None) -> Outcome:
    """Compare two chunks alone with both as one input, on the frames that both have."""
    contract, half = bench.contract, bench.samples
    if contract.fixed_window:
        return skipped("the model takes one length")
    if 2 * half > contract.chunk_samples:
        half = contract.chunk_samples // 2
        half -= half % int(contract.hop_samples or 1)
    if half < max(contract.min_samples, 1):
        return skipped(f"half a chunk of {contract.chunk_samples} samples is less than the model takes")
    together = np.concatenate([bench.signals["speech-like"][:half], bench.signals["chirp"][:half]])
    together = bench.normalized(together)  # over the clip, before it is cut
    whole = bench.embed(together, normalized=True)
    first, second = (bench.embed(part, normalized=True) for part in (together[:half], together[half:]))
    if contract.clip_only:
        alike = cosines((first + second) / 2, whole)
    else:
        offset = half // int(contract.hop_samples or 1)
        known = min(len(second), len(whole) - offset)
        alike = np.concatenate(
            [cosines(first[:offset], whole[: len(first[:offset])]), cosines(second[:known], whole[offset : offset + known])]
        )
    least = 0.5 if tolerance is None else tolerance
    mean = float(alike.mean())
    figure = {"measured": round(mean, 6), "tolerance": f">= {least:g}", "unit": "mean cosine"}
    says = f"{len(alike)} frames at cosine {mean:.4f} to those of the whole, the least {float(alike.min()):.4f}"
    if mean < least:
        return warned(
            f"frames depend on where chunks begin: {says}",
            "declare the chunk_samples that the encoder was trained with; scores change with the chunk length",
            **figure,
        )
    return passed(says, **figure)


def _lengths(bench: Bench) -> list[int]:
    """Lengths to try: the shortest, the longest with as many frames, and two odd ones of about one and two seconds.

    Measuring the contract has tried the length of a chunk already.
    """
    contract = bench.contract
    hop, rate = int(contract.hop_samples or 1), contract.sample_rate
    least, most = contract.min_samples, contract.chunk_samples
    wanted = (least, least + hop - 1, (least + rate) | 1, (2 * rate + hop // 3) | 1)
    return sorted({samples for samples in wanted if least <= samples <= most})


def _noise(bench: Bench, samples: int) -> Signal:
    """Seeded noise of any length; the same samples at the start of each."""
    noise = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    return np.asarray(np.clip(noise * np.float32(0.1), -1, 1))
