"""Properties of the embeddings: finite, different for different sounds, and of more than one dimension."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .findings import Outcome, failed, passed, skipped, warned
from .model_under_test import Bench, cosines

_CHANGES = 1e-4  # the least change that counts, as a share of the largest value
_COLLAPSED, _COLLAPSED_SHARE = 1.2, 0.002  # in dimensions, and as a share of all dimensions
_NARROW_SHARE = 0.005


def check_finite(bench: Bench, tolerance: float | None) -> Outcome:
    bad = []
    for name, frames in zip(bench.signals, bench.embed_all(bench.signals.values()), strict=True):
        if isinstance(frames, ModelError):
            bad.append(f"{name}: {frames}")
        elif not np.isfinite(frames).all():
            bad.append(f"{name}: {'NaN' if np.isnan(frames).any() else 'infinity'}")
    figure = {"measured": len(bad), "tolerance": 0, "unit": "signals"}
    if bad:
        return failed(
            f"{'; '.join(bad[:3])}" + (f"; and {len(bad) - 3} more" if len(bad) > 3 else ""),
            "guard logarithms, divisions and square roots by a small constant, and keep front ends out of half precision",
            details=tuple(bad),
            **figure,
        )
    return passed(f"finite on {len(bench.signals)} signals, among them silence, DC, an impulse and full scale", **figure)


def check_varies(bench: Bench, tolerance: float | None) -> Outcome:
    limit = _CHANGES if tolerance is None else tolerance
    known = bench.finite()
    if len(known) < 2:
        return skipped("too few signals give finite embeddings")
    scale = max(float(np.abs(frames).max()) for frames in known.values()) or 1.0
    means = np.stack([frames.mean(axis=0, dtype=np.float64) for frames in known.values()])
    over_inputs = float(np.ptp(means, axis=0).max()) / scale
    figure = {"measured": float(f"{over_inputs:.3g}"), "tolerance": f">= {limit:g}", "unit": "of the largest"}
    if over_inputs < limit:
        return failed(
            f"{len(known)} different signals differ by {over_inputs:.1e} of the largest value",
            "look at the last layers: weights lost in the export, or values that saturate",
            **figure,
        )
    if bench.contract.clip_only:
        return passed(f"{len(known)} signals differ by {over_inputs:.2g} of the largest value", **figure)
    moving = [known[name] for name in ("speech-like", "chirp", "pink noise", "clicks") if name in known]
    over_time = max((float(np.ptp(frames, axis=0).max()) for frames in moving if len(frames) > 1), default=np.inf) / scale
    if over_time < limit:
        return failed(
            f"all frames of a clip are the same, though its sound changes: by {over_time:.1e} of the largest value",
            "export frames before they are averaged, or one vector per clip as [batch, dim]",
            **{**figure, "measured": float(f"{over_time:.3g}")},
        )
    return passed(f"signals differ by {over_inputs:.2g}, frames by {over_time:.2g} of the largest value", **figure)


def check_rank(bench: Bench, tolerance: float | None) -> Outcome:
    """Effective rank of all frames together: exp of the entropy of their singular values (Roy and Vetterli 2007)."""
    frames = np.concatenate(list(bench.finite().values()) or [np.zeros((0, bench.contract.dim), np.float32)])
    if len(frames) < 3:
        return skipped("too few frames to tell")
    most = min(bench.contract.dim, len(frames) - 1)
    rank = effective_rank(frames)
    narrow = max(_NARROW_SHARE * most, _COLLAPSED) if tolerance is None else tolerance
    collapsed = max(_COLLAPSED_SHARE * most, _COLLAPSED) if tolerance is None else tolerance
    figure = {"measured": float(f"{rank:.3g}"), "tolerance": f">= {narrow:.3g}", "unit": f"of {most}"}
    remedy = (
        "look for a layer that saturates or was quantised with a wrong scale; `--reference` against the original shows it"
    )
    if rank < collapsed:
        return failed(
            f"collapsed: frames of {len(bench.signals)} signals fill {rank:.2f} of {most} dimensions", remedy, **figure
        )
    if rank < narrow:
        return warned(f"frames of {len(bench.signals)} signals fill {rank:.1f} of {most} dimensions", remedy, **figure)
    return passed(f"frames of {len(bench.signals)} signals fill {rank:.1f} of {most} dimensions", **figure)


def check_gain(bench: Bench, tolerance: float | None) -> Outcome:
    """How far the embedding of the same sound turns at -20 and +6 dB."""
    clip = bench.signals["speech-like"]
    plain = bench.embed(clip)
    gains = (-20, 6)
    alike = {}
    for decibels, louder in zip(gains, bench.embed_all(clip * np.float32(10 ** (gain / 20)) for gain in gains), strict=True):
        if isinstance(louder, ModelError):
            return failed(f"fails at {decibels:+d} dB: {louder}", "let the model take quiet and loud clips")
        alike[decibels] = float(cosines(louder, plain).mean())
    least = 0.0 if tolerance is None else tolerance
    figure = {"measured": round(min(alike.values()), 6), "tolerance": f">= {least:g}", "unit": "mean cosine"}
    says = ", ".join(f"{decibels:+d} dB: cosine {cosine:.4f}" for decibels, cosine in alike.items())
    if min(alike.values()) < least:
        return warned(
            says, "normalise the level inside the model, or declare amplitude or normalize as in training", **figure
        )
    return passed(says, **figure)


def effective_rank(rows: npt.NDArray[np.floating]) -> float:
    """exp of the entropy of the singular values of centred rows (rows, dim): 1 for a line, at most dim."""
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    gram = (
        centred.T @ centred if rows.shape[1] <= len(rows) else centred @ centred.T
    )  # either has these singular values; take the smaller
    if not np.isfinite(gram).all():
        return 0.0
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = values[values > 1e-7 * values.max()] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
