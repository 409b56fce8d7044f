"""How many frames an input gives: a law that is fitted to counts, or read from a symbolic dimension."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable

import msgspec


class FrameLaw(msgspec.Struct, frozen=True):
    """frames(n) = floor((n - receptive_field) / hop) + 1, in samples.

    `receptive_field` is the constant of this law: padding makes it shorter than what a frame sees, down to 0 and below.
    """

    hop: int
    receptive_field: int

    def frames(self, samples: int) -> int:
        """How many frames an input of samples gives; 0 if it is too short for one."""
        return max(0, (samples - self.receptive_field) // self.hop + 1)

    def first_length_with(self, frames: int) -> int:
        """The shortest input that gives this many frames, in samples."""
        return self.receptive_field + (frames - 1) * self.hop


def fit_frame_law(frames: Callable[[int], int], low: int, high: int) -> FrameLaw | None:
    """The law behind a frame count, from two of its jumps between `low` and `high` samples.

    The jumps are found by bisection, so `frames` is called about 2 log2(high - low) times. It must not decrease.

    Args:
        frames: The frame count for an input of samples.
        low: The shortest input to try, in samples.
        high: The longest.

    Returns:
        The law, or None if the count follows none. `law_holds` confirms it.
    """
    at_low, at_high = frames(low), frames(high)
    if at_high < at_low + 2 or at_low < 1:
        return None
    first = _first_length(frames, at_low + 1, low, high)
    last = _first_length(frames, at_high, first, high) if at_high > at_low + 1 else first
    hop, remainder = divmod(last - first, at_high - at_low - 1)
    if remainder or hop < 1 or frames(first) != at_low + 1:
        return None
    return FrameLaw(hop, first - at_low * hop)


def law_holds(law: FrameLaw, frames: Callable[[int], int], low: int, high: int) -> bool:
    """Whether a frame count follows the law: on both sides of its jumps next to `low` and `high`, and in between."""
    edges = [law.first_length_with(law.frames(low) + 1), law.first_length_with(law.frames(high))]
    lengths = {low, high, (low + high) // 2 | 1, *edges, *(edge - 1 for edge in edges)}
    return all(frames(n) == law.frames(n) for n in sorted(lengths) if low <= n <= high)


def _first_length(frames: Callable[[int], int], count: int, low: int, high: int) -> int:
    """The shortest length in (low, high] with at least `count` frames."""
    too_short, enough = low, high
    if frames(low) >= count:
        return low
    while enough - too_short > 1:
        middle = (too_short + enough) // 2
        too_short, enough = (too_short, middle) if frames(middle) >= count else (middle, enough)
    return enough


_MAX_EXPRESSION = 300  # characters


def frames_of_dimension(expression: str, samples_name: str) -> Callable[[int], int] | None:
    """The frame count by input length, from a symbolic dimension such as `((samples//160)) + 1`.

    The grammar is whole numbers, the one name `samples_name`, + - * // / and floor, ceil, min, max; nothing is ever
    evaluated as Python. For anything else the result is None, and the count has to be measured.
    """
    if len(expression) > _MAX_EXPRESSION:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(_FUNCTIONS)
        if names != {samples_name}:
            return None
        _calculate(tree, 16_000)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None

    def frames(samples: int) -> int:
        try:
            return math.floor(_calculate(tree, samples))
        except (ValueError, ArithmeticError):  # such as a division by zero at just this length
            return 0

    return frames


_FUNCTIONS: dict[str, Callable[..., float]] = {"floor": math.floor, "ceil": math.ceil, "min": min, "max": max}


_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Div: lambda a, b: a / b,
}


def _calculate(node: ast.expr, samples: int) -> float:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name not in _FUNCTIONS:
            return samples
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_calculate(operand, samples)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_calculate(left, samples), _calculate(right, samples))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_calculate(argument, samples) for argument in arguments))
    raise ValueError("outside the grammar")
