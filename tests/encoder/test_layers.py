"""Layers found in a graph, against what PyTorch's own modules give where their layers end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from dasheng_reference import Reference
from dasheng_reference import save as save_dasheng
from onnx import ModelProto, TensorProto, helper
from onnx_models import value
from random_checkpoints import SPEECH, Plain, save_speech, save_whisper
from torch import Tensor, nn
from torch.nn import functional

from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.encoder.exposure import Exposure, exposing
from xares_onnx.encoder.measuring.layers import layers_of, residual_layers
from xares_onnx.errors import ContractError
from xares_onnx.exporters import export

pytestmark = pytest.mark.usefixtures("shared_process")

DIM, FRAMES, DEPTH = 8, 20, 3


# ---------------------------------------------------------------- architectures, as torch modules whose layers are hooked


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        query, key, values = self.project(x).chunk(3, -1)
        # A bias that is made from the input too, as WavLM's, is no residual.
        scores = query @ key.transpose(-1, -2) + x.mean(-1, keepdim=True)
        mixed: Tensor = self.out(scores.softmax(-1) @ values)
        return mixed


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))


class Layer(nn.Module):
    """One layer; `kind` says how its parts are joined."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attention, self.ffn, self.ffn2 = Attention(), feed_forward(), feed_forward()
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1)
        self.norm, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.gate = nn.Parameter(torch.full((DIM,), 0.5))

    def convolve(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return convolved

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "pre-norm":
                x = x + self.attention(self.norm(x))
                return x + self.ffn(self.norm2(x))
            case "post-norm":
                x = self.norm(x + self.attention(x))
                return self.norm2(self.ffn(x) + x)
            case "conformer":
                x = x + 0.5 * self.ffn(x)
                x = x + self.attention(x)
                x = x + self.convolve(self.norm(x))
                return self.norm2(x + 0.5 * self.ffn2(x))
            case "parallel":
                return x + self.attention(self.norm(x)) + self.ffn(self.norm(x))
            case "alike":  # as many equal parts at its end as there are layers
                x = x + self.attention(x)
                for part in (self.ffn, self.ffn2, self.ffn):
                    x = x + part(x)
                return x
            case "scaled":  # LayerScale
                x = x + self.gate * self.attention(self.norm(x))
                return self.gate * self.ffn(self.norm2(x)) + x
            case "nested":  # a residual inside a branch
                inner = self.norm(x)
                return x + self.ffn(inner + self.convolve(inner))
            case _:  # one join a layer, as ConvNeXt
                return x + self.ffn(self.convolve(x))


class Network(nn.Module):
    """What stands before and behind the layers: a positional convolution, which is a join of its own, and a norm."""

    def __init__(self, kind: str, *, positions: bool = True, norm: bool = True, skip: bool = False) -> None:
        super().__init__()
        self.positions = nn.Conv1d(DIM, DIM, 5, padding=2, groups=2) if positions else None
        self.first = nn.LayerNorm(DIM)
        self.layers = nn.ModuleList(Layer(kind) for _ in range(DEPTH))
        self.last = nn.LayerNorm(DIM) if norm else nn.Identity()
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        if self.positions is not None:
            x = x + functional.gelu(self.positions(x.transpose(1, 2)).transpose(1, 2))
        x = start = self.first(x)
        for layer in self.layers:
            x = layer(x)
        x = self.last(x)
        return x + start if self.skip else x


def hooked(network: Network, features: Tensor) -> list[np.ndarray]:
    """What goes into the first layer, and what comes out of each."""
    found: list[np.ndarray] = []
    handles = [
        network.layers[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].numpy())),
        *(layer.register_forward_hook(lambda *a: found.append(a[2].numpy())) for layer in network.layers),
    ]
    with torch.inference_mode():
        network(features)
    for handle in handles:
        handle.remove()
    return found


def traced(network: nn.Module, opset: int) -> ModelProto:
    buffer = io.BytesIO()
    dynamic = {"x": {0: "batch", 1: "frames"}}
    features = torch.zeros(2, FRAMES, DIM)
    options: dict[str, Any] = {"opset_version": opset, "dynamo": False, "dynamic_axes": dynamic}
    torch.onnx.export(network, (features,), buffer, input_names=["x"], output_names=["y"], **options)
    return onnx.load_model_from_string(buffer.getvalue())


def run(content: bytes, features: Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": features.numpy()}), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("opset", [13, 17])  # below 17 a norm is spread over many nodes
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("pre-norm", {}),
        ("pre-norm", {"norm": False, "positions": False}),
        ("pre-norm", {"skip": True}),
        ("post-norm", {}),
        ("post-norm", {"norm": False}),
        ("conformer", {}),
        ("parallel", {}),
        ("alike", {}),
        ("scaled", {"positions": False}),
        ("nested", {}),
        ("single", {}),
    ],
)
def test_layers_are_where_torch_has_them(kind: str, options: dict[str, Any], opset: int) -> None:
    torch.manual_seed(1)
    network = Network(kind, **options).eval()
    features = torch.randn(2, FRAMES + 3, DIM, generator=torch.Generator().manual_seed(2))
    expected = hooked(network, features)
    exposure = layers_of(model := traced(network, opset), "y")
    found = run(exposing(model, exposure), features)
    assert len(exposure.tensors) == DEPTH + 1
    assert exposure.cuts == ()
    for output, layer in zip(exposure.outputs, expected, strict=True):
        np.testing.assert_allclose(found[output], layer, atol=1e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("network", [Recurrent(), nn.Sequential(Layer("single"))])
def test_what_repeats_no_residual_has_no_layers(network: nn.Module) -> None:
    with pytest.raises(ContractError, match=r"^no chain of residual layers leads to output 'y'; name tensors by --taps"):
        residual_layers(traced(network.eval(), 17), "y")


def test_nodes_out_of_order_are_a_sentence() -> None:
    nodes = [helper.make_node("Abs", ["between"], ["y"]), helper.make_node("Neg", ["x"], ["between"])]
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])])
    with pytest.raises(ContractError, match="out of order"):
        residual_layers(helper.make_model(graph), "y")


def test_a_fused_norm_counts_as_a_join() -> None:
    """ONNX Runtime writes x + f(x) and the norm behind it as one node, whose fourth output is the sum."""
    nodes, stream = [], "x"
    for i in range(3):
        nodes += [
            helper.make_node("MatMul", [stream if i == 0 else f"n{i - 1}", "w"], [f"f{i}"]),
            helper.make_node(
                "SkipLayerNormalization", [stream, f"f{i}", "g"], [f"n{i}", "", "", f"s{i}"], domain="com.microsoft"
            ),
        ]
        stream = f"s{i}"
    nodes.append(helper.make_node("Identity", ["n2"], ["y"]))
    weights = [
        helper.make_tensor("w", TensorProto.FLOAT, [DIM, DIM], np.eye(DIM, dtype=np.float32).ravel().tolist()),
        helper.make_tensor("g", TensorProto.FLOAT, [DIM], [1.0] * DIM),
    ]
    shape: list[str | int] = ["batch", "frames", DIM]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, shape)], weights
    )
    assert residual_layers(helper.make_model(graph), "y") == ["x", "s0", "s1", "s2"]


# ---------------------------------------------------------------- inner tensors as outputs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_exposed_changes_nothing_else() -> None:
    torch.manual_seed(1)
    network = Network("pre-norm").eval()
    features = torch.randn(1, FRAMES, DIM)
    model = traced(network, 17)
    before = run(model.SerializeToString(), features)["y"]
    inner = residual_layers(model, "y")[1]
    found = run(exposing(model, Exposure((inner, "y"))), features)
    assert list(found) == ["y", inner]  # one that is an output stands there once
    np.testing.assert_allclose(found["y"], before, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tensor_that_is_not_there_is_named() -> None:
    model = traced(Network("single").eval(), 17)
    name = residual_layers(model, "y")[1]
    with pytest.raises(ContractError, match=rf"no output or inner tensor '{name}x'; did you mean .*'{name}'"):
        exposing(model, Exposure((f"{name}x",)))


# ---------------------------------------------------------------- known encoders, against transformers' hidden states


def clips(rate: int) -> list[np.ndarray]:
    """Of a second and more, so that nothing is padded."""
    rng = np.random.default_rng(4)
    return [(0.1 * rng.standard_normal(rate + more)).astype(np.float32) for more in (0, 4011, 17_333)]


def check_layers(file: Path, plain: nn.Module, layers: nn.ModuleList, *, last_is_output: bool) -> None:
    """Every tap against what goes into the first of PyTorch's layers, what comes out of each, and the output."""
    with load_encoder(file, taps=["all-layers"]) as encoder:
        names, rate = [tap.name for tap in encoder.info.taps], encoder.contract.sample_rate
        found = {name: encoder.embed(clips(rate), rate, tap=name) for name in names}
    assert names == ["embeddings", *(f"layer.{i}" for i in range(len(layers) + 1 - last_is_output))]
    for number, clip in enumerate(clips(rate)):
        states: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Any = None, states: list[Tensor] = states) -> None:
            given = inputs if output is None else output
            states.append(given if isinstance(given, Tensor) else given[0])

        handles = [layers[0].register_forward_pre_hook(keep), *(layer.register_forward_hook(keep) for layer in layers)]
        with torch.inference_mode():
            output = plain(torch.from_numpy(clip)[None])
        for handle in handles:
            handle.remove()
        for name, state in zip(names, [output, *states], strict=not last_is_output):
            embedding = found[name][number]
            expected = state[0].numpy()[: output.shape[1]]
            np.testing.assert_allclose(embedding.frames, expected, atol=2e-4 * float(np.abs(expected).max()))
            np.testing.assert_array_equal(embedding.times, found["embeddings"][number].times)


@pytest.mark.parametrize("family", SPEECH)
def test_speech_encoders(family: str, tmp_path: Path) -> None:
    folder = save_speech(family, tmp_path / "checkpoint")
    export(family, str(folder), tmp_path / "model.onnx")
    plain = Plain(folder).eval()
    # wav2vec 2.0 as made here norms before each part, and once more behind the last layer.
    check_layers(tmp_path / "model.onnx", plain, plain.model.encoder.layers, last_is_output=family != "wav2vec2")


def test_whisper_s_layers_are_cut_to_the_audio(tmp_path: Path) -> None:
    folder = save_whisper(tmp_path / "checkpoint")
    export("whisper", str(folder), tmp_path / "model.onnx")
    plain = Plain(folder).eval()
    check_layers(tmp_path / "model.onnx", plain, plain.model.layers, last_is_output=False)


def test_dasheng_s_layers(tmp_path: Path) -> None:
    folder = save_dasheng(tmp_path / "checkpoint")
    export("dasheng", str(folder), tmp_path / "model.onnx")
    reference = Reference(folder).eval()
    check_layers(tmp_path / "model.onnx", reference, reference.blocks.layers, last_is_output=False)


def test_eight_bit_layers_are_found(tmp_path: Path) -> None:
    folder = save_speech("hubert", tmp_path / "checkpoint")
    export("hubert", str(folder), tmp_path / "model.onnx", quantize="int8-dynamic")
    with load_encoder(tmp_path / "model.onnx", taps=["all-layers"]) as encoder:
        assert [tap.name for tap in encoder.info.taps] == ["embeddings", "layer.0", "layer.1"]
        assert encoder.contract.batch_coupled
