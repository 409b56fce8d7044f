"""What weights of 7 and 8 bits cost: how far embeddings are from float32, and how long linear layers take.

    PYTHONPATH=tests/helpers python bench/eight_bits.py FOLDER            # makes the files where they are not there yet
    qemu-x86_64 -cpu Haswell python bench/eight_bits.py FOLDER --untimed    # the same files without VNNI, emulated

Encoders of two random layers, and Resemblyzer where its weights are installed. Takes a minute.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

FAMILIES = ("hubert", "wav2vec2", "wavlm", "data2vec", "whisper", "resemblyzer")
WAYS: dict[str, dict[str, Any]] = {
    "8 bits, one scale": {},
    "7 bits, one scale": {"reduce_range": True},
    "7 bits, a scale per channel": {"reduce_range": True, "per_channel": True},  # as `export` writes them
    "8 bits, unsigned, a scale per channel": {"per_channel": True, "signed": False},
}
LENGTHS = (400, 16_001)
LAYERS = "layers"  # the products of six layers of wav2vec2-base's size, without attention
ROUNDS = 9


def path_of(folder: Path, name: str, way: str) -> Path:
    return folder / f"{name}, {way}.onnx"


def make(folder: Path) -> None:
    """Every file that is not there yet, and the embeddings that the float32 ones give."""
    from random_checkpoints import save_speech, save_whisper

    from xares_onnx.errors import UsageError
    from xares_onnx.exporters import export

    for family in FAMILIES:
        if (folder / f"{family}.npz").exists():
            continue
        checkpoint = None
        if family != "resemblyzer":
            place = folder / family
            checkpoint = str(save_whisper(place) if family == "whisper" else save_speech(family, place))
        try:
            plain = export(family, checkpoint, folder / f"{family}.onnx").path
        except UsageError as error:
            print(f"{family} is left out: {error}")
            continue
        quantize_all(plain, folder, family)
        session = opened(plain)
        audio = {f"{n}": np.random.default_rng(n).uniform(-0.9, 0.9, (1, n)).astype(np.float32) for n in LENGTHS}
        embeddings = {f"{n} embedded": session.run(None, {"audio": clip})[0] for n, clip in audio.items()}
        np.savez(folder / f"{family}.npz", **audio, **embeddings)
    if not (folder / f"{LAYERS}.onnx").exists():
        quantize_all(save_layers(folder / f"{LAYERS}.onnx"), folder, LAYERS)


def save_layers(path: Path) -> Path:
    import onnx
    from onnx import helper, numpy_helper

    random, nodes, tensors, last = np.random.default_rng(0), [], [], "x"
    for number, (rows, columns) in enumerate([*[(768, 768)] * 4, (768, 3072), (3072, 768)] * 6):
        weights = random.standard_normal((rows, columns)).astype(np.float32) / np.float32(rows**0.5)
        tensors.append(numpy_helper.from_array(weights, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [last := f"y{number}"]))
    values = [helper.make_tensor_value_info(name, 1, [1, "frames", 768]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "layers", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def quantize_all(plain: Path, folder: Path, name: str) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # that it was not preprocessed
    for way, options in WAYS.items():
        settings = dict(options)
        kind = QuantType.QInt8 if settings.pop("signed", True) else QuantType.QUInt8
        quantize_dynamic(plain, path_of(folder, name, way), op_types_to_quantize=["MatMul"], weight_type=kind, **settings)


def opened(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def errors(folder: Path) -> None:
    for n in LENGTHS:
        print(f"\nroot mean square error at {n} samples (largest), as a share of that of the embeddings\n")
        print(f"| | {' | '.join(WAYS)} |\n|{'---|' * (1 + len(WAYS))}")
        for family in FAMILIES:
            if not (folder / f"{family}.npz").exists():
                continue
            with np.load(folder / f"{family}.npz") as known:
                audio, expected = known[f"{n}"], known[f"{n} embedded"]
            cells = []
            for way in WAYS:
                off = opened(path_of(folder, family, way)).run(None, {"audio": audio})[0] - expected
                share = np.sqrt((off**2).mean() / (expected**2).mean())
                cells.append(f"{share:.3f} ({np.abs(off).max() / np.abs(expected).max():.3f})")
            print(f"| {family} | {' | '.join(cells)} |")


def speeds(folder: Path) -> None:
    sessions = {"float32": opened(folder / f"{LAYERS}.onnx")}
    sessions |= {way: opened(path_of(folder, LAYERS, way)) for way in WAYS}
    x = np.random.default_rng(1).standard_normal((1, 500, 768)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):  # in turns: on a busy machine all are slow alike
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {"x": x})
            times[name].append(time.perf_counter() - started)
    print("\nmilliseconds of 36 products at 500 frames, one thread, in turns: median, least\n")
    for name, seconds in times.items():
        print(f"{name}: {1000 * np.median(seconds):.0f}, {1000 * min(seconds):.0f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--untimed", action="store_true")
    given = parser.parse_args()
    folder = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{LAYERS}.onnx").exists():
        make(folder)
    errors(folder)
    if not given.untimed:
        speeds(folder)


if __name__ == "__main__":
    main()
