"""Two models, read and paired. Runs in the worker process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..encoder.contract.contract import Contract
from ..encoder.limits import memory_bytes
from ..encoder.model_file import check_unchanged
from ..encoder.spec import EncoderInfo
from ..encoder.worker import Beat, Tell, limit_memory
from ..progress import Doing
from .graph import Graph
from .pairing import pair, unpaired
from .surgery import cut_out, load

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Paired:
    """Two loaded models and their paired, measured steps: `steps` holds (number in A, number in B)."""

    a: Graph
    b: Graph
    steps: list[tuple[int, int]]
    contracts: tuple[Contract, Contract]

    @property
    def tensors(self) -> dict[str, str]:
        """Tensors of A by those of B."""
        return {self.b.steps[j].output: self.a.steps[i].output for i, j in self.steps}


def open_pair(
    infos: tuple[EncoderInfo, EncoderInfo], threads: int, trust: bool, tell: Tell
) -> tuple[Paired, list[str], list[str]]:
    """Load both models and pair them; also the names of what was not paired in A and in B."""
    limit_memory(memory_bytes(sum(info.scan.solid_bytes for info in infos), trust, threads))
    graphs = []
    for info in infos:
        tell(Doing("reading the model", 60.0))
        check_unchanged(Path(info.path), info.scan.stamps)
        graphs.append(_graph(info, trust))
        tell(Beat())
    tell(Doing("pairing the operators", 120.0))
    a, b = graphs
    pairs = pair(a, b)
    steps = [(i, j) for i, j in sorted(pairs.b_of.items()) if a.steps[i].measured]
    lost = [[f"{s.operator} {s.name}" for s in unpaired(g, k)] for g, k in ((a, pairs.b_of), (b, pairs.a_of))]
    return Paired(a, b, steps, (infos[0].contract, infos[1].contract)), lost[0], lost[1]


def _graph(info: EncoderInfo, trust: bool) -> Graph:
    """The part of a model that leads to its embeddings."""
    graph = Graph(load(Path(info.path), trust=trust))
    output = info.contract.output
    part = cut_out(graph, [output] if output in graph.maker else graph.outputs)
    part.metadata_props.extend(graph.model.metadata_props)
    return Graph(_with_types(part, graph.model))


def _with_types(part: onnx.ModelProto, whole: onnx.ModelProto) -> onnx.ModelProto:
    """A part of a model whose outputs are declared as in the whole."""
    outputs = {value.name: value for value in whole.graph.output}
    names = [value.name for value in part.graph.output]
    del part.graph.output[:]
    part.graph.output.extend(outputs[name] for name in names)
    return part
