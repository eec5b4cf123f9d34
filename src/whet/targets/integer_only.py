"""Integer-only inference: a deployed file run without floating point, as a microcontroller would.

It is the reference that the runtimes' int8 results are held against. It is no `Target`: a target
also runs the float network, beside which the compressed one is timed, and this runs nothing but
codes, in numpy, at the speed of numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from whet.targets.fixedpoint import Integers
from whet.targets.integer_lowering import Lowering, span


class IntegerNetwork:
    """The integer program of a deployed file.

    Args:
        file: the .onnx file, or the model itself, with quantized layers.

    Attributes:
        steps: the program, in order.
        doors: for each input, the grids it comes in on.
        exits: for each output, its codes; a layer's accumulators are on one scale there.
        codes: the value of the program that holds the codes of each quantized value in the file.

    Raises:
        TargetFailed: something in it does not run on integers; it names the operator.
    """

    def __init__(self, file: Path | ModelProto) -> None:
        lowering = Lowering(onnx.load(str(file)) if isinstance(file, Path) else file)
        self.steps, self.codes = lowering.steps, lowering.codes
        self.doors = [lowering.doors.get(name, []) for name in lowering.inputs]
        self.exits = lowering.exits

    def enter(self, inputs: Sequence[np.ndarray]) -> dict[str, Integers]:
        """The codes of the inputs: the last floats."""
        found = {}
        for array, doors in zip(inputs, self.doors, strict=True):
            for value, grid in doors:
                codes = np.rint(array / np.float32(grid.scale)) + grid.zero_point
                found[value] = np.clip(codes, grid.low, grid.high).astype(span(grid).dtype)
        return found

    def values(
        self, codes: Mapping[str, Integers], instead: Mapping[str, Integers] | None = None
    ) -> dict[str, Integers]:
        """Every value of the program.

        Args:
            codes: of the inputs.
            instead: what the steps read in the place of what these codes and other steps make.
        """
        found, read = dict(codes), {**codes, **(instead or {})}
        for step in self.steps:
            found[step.made] = step(read)
            read.setdefault(step.made, found[step.made])
        return found

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs S (q - Z) for one batch of the deployed size."""
        found = self.values(self.enter(inputs))
        return [
            (found[value].astype(np.float64) - grid.zero_point) * grid.scale
            for value, grid in self.exits
        ]
