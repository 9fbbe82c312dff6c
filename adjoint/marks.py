"""Is a recomputed step the step that was computed? A few sums of the first sweep's states are kept and compared."""

from __future__ import annotations

import torch

from adjoint.tensors import State, differentiable


class Marks:
    """Sums of the states at a few steps: all of the first 32, and about 32 between a power of two and the next.

    The same step gives the same bits, unless kernels are not deterministic: half the digits are compared.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._sums: dict[int, list[float]] = {}

    def pass_by(self, step: int, state: State, first: bool) -> None:
        """Note the state at this step, or compare it with what was noted; RuntimeError if it is another."""
        stride = 1 << max(0, step.bit_length() - 6)
        if step & (stride - 1):
            return
        if first:
            self._sums[step] = _sums(state)
        elif step in self._sums:
            self._compare(step, _sums(state))

    def _compare(self, step: int, found: list[float]) -> None:
        for old, new in zip(self._sums[step], found, strict=True):
            if abs(new - old) > 1e-4 * max(abs(old), abs(new)):
                raise RuntimeError(
                    f"{self._label} gives other values when it is called again (step {step - 1} was computed again); the "
                    f"gradient would be wrong. It must depend on nothing but its arguments and tensors that stay as they are: "
                    f"no counters, no memory of earlier calls"
                )


def _sums(state: State) -> list[float]:
    """For each leaf the sum of its sizes, and a sum in which places count; not a number counts as nothing."""
    sums = []
    for x in state:
        if not x.is_meta and x.numel():
            sizes = torch.nan_to_num((x.detach().abs() if differentiable(x) else x).double(), posinf=0.0).reshape(-1)
            sums += [float(sizes.sum()), float(sizes[::2].sum())]
    return sums
