"""Passes over standardised rows on a torch device, for `logistic`; everything else of a fit stays in numpy.

Products are in float32, never in TF32, sums over rows and blocks in float64 in a fixed order, and no operation adds
atomically, so a device gives the same bytes twice. The strength that a device and the CPU choose is the same unless two
strengths score alike to within the solver's tolerance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MachineError, UsageError

if TYPE_CHECKING:
    from .logistic import LossOnDevice
    from .standardised import Design, Floats, Indices, Singles

_WORTH = 1 << 28  # products per pass from which on a device pays: some 5 ms of one CPU core
_SHARE = 0.5  # of the device's free memory that rows may take; further blocks are sent anew in every pass
_ON_THE_CPU = 1 << 30  # bytes of rows, if the device is the CPU


def torch_device(name: str) -> torch.device:
    """The device of torch with this name.

    Raises:
        UsageError: torch knows no such kind of device, or heads do not run on it.
        MachineError: This machine, or this PyTorch, has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is not a device; choose cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"heads do not run on {name!r}; choose cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise MachineError(f"PyTorch sees {count or 'no'} CUDA devices, so heads cannot run on {name!r}; choose cpu")
    return device


def pays(rows: int, dim: int, outputs: int) -> bool:
    """Whether a pass is worth its way to a device."""
    return rows * dim * outputs >= _WORTH


def without_tf32() -> None:
    """TF32 keeps 10 bits of a factor, too few for the tolerance of a fit."""
    torch.backends.cuda.matmul.allow_tf32 = False


class DeviceRows:
    """The rows and targets of a design on a device, block by block; as many blocks stay there as have room."""

    def __init__(self, design: Design, loss: LossOnDevice, device: torch.device) -> None:
        without_tf32()
        self._design, self._loss, self._device = design, loss, device
        self._axes = torch.from_numpy(np.ascontiguousarray(design.axes)).to(device)
        free = _SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _ON_THE_CPU
        self._blocks: list[tuple[Tensor, Tensor]] = []
        for number in range(design.rows.blocks):
            block = self._sent(number)
            free -= sum(tensor.nbytes for tensor in block)
            if free < 0:
                break
            self._blocks.append(block)

    def _sent(self, number: int) -> tuple[Tensor, Tensor]:
        rows, targets = self._design.standardised(number), self._loss.outputs_of(self._design.rows.targets(number))
        return torch.from_numpy(rows).to(self._device), torch.from_numpy(targets).to(self._device)

    @torch.inference_mode()
    def moments(self, theta: Singles, columns: Indices) -> tuple[Floats, Floats]:
        """As `Design.moments`, by the loss's `step_on_device` for some of its outputs."""
        sent = torch.from_numpy(theta).to(self._device).double()
        weight, bias = (self._axes @ sent[:-1]).float(), sent[-1].float()
        chosen = torch.from_numpy(columns).to(self._device)
        moment = torch.zeros(weight.shape, dtype=torch.float64, device=self._device)
        total = torch.zeros(len(columns), dtype=torch.float64, device=self._device)
        sums = torch.zeros(2, len(columns), dtype=torch.float64, device=self._device)
        for number in range(self._design.rows.blocks):
            rows, targets = self._blocks[number] if number < len(self._blocks) else self._sent(number)
            values, of_block = self._loss.step_on_device(torch.addmm(bias, rows, weight), targets, chosen)
            moment += rows.T @ values
            total += values.sum(dim=0, dtype=torch.float64)
            sums += of_block
        gradient: Any = torch.cat([self._axes.T @ moment, total[None]]).cpu().numpy()
        return gradient, sums.cpu().numpy()
