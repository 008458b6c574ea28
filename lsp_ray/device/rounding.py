"""Add a float32 delta to a weight: exactly for float32, with stochastic rounding for bfloat16.

A plain bfloat16 add loses every delta below half of the weight's last bit; rounding up with a probability equal to the
remainder keeps the sum right on average.
"""

from __future__ import annotations

import torch

from lsp_ray.device.cpu_kernels import add_dense_, has_kernel

NOISE_ELEMENTS = 1 << 21  # one block of random bits, read at a random offset: fresh bits would cost 6 times as much
MAX_ELEMENTS = 1 << 20  # elements of a weight that are rounded at once
_MASK_64 = (1 << 64) - 1


def mixed(*numbers: int) -> int:
    """Return a 63-bit hash of the numbers (splitmix64's finaliser over each): a seed that depends on all of them."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
        state ^= state >> 31
    return state >> 1


class Rounding:
    """Adds deltas to weights. The bits depend on (seed, step, key, first element) alone, never on the order of calls.

    Args:
        seed: The run's seed.
        device: Where the weights are.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(mixed(seed))
        noise = torch.randint(0, 1 << 16, (NOISE_ELEMENTS,), dtype=torch.int32, generator=generator)
        # half the bytes for the CPU's kernels; torch's operators add no uint16
        self._noise = noise.to(device) if device.type != "cpu" else noise.to(torch.uint16)
        self._seed = seed

    def add_(self, weight: torch.Tensor, delta: torch.Tensor, *, keep: float, step: int, key: int, first: int) -> None:
        """weight ← keep · weight + delta, in place.

        Args:
            weight: float32 or bfloat16, any layout, at most MAX_ELEMENTS elements if bfloat16.
            delta: float32 of the same shape.
            keep: 1 − learning rate · weight decay.
            step: Number of the update.
            key: Number of the target within the model.
            first: Position of this part within the target.
        """
        if weight.dtype == torch.float32:
            if keep != 1.0:
                weight.mul_(keep)
            weight.add_(delta)
            return
        assert weight.dtype == torch.bfloat16, f"no rounding for {weight.dtype}"
        noise = self.noise(weight.numel(), step=step, key=key, first=first)
        if has_kernel(weight) and weight.is_contiguous():
            add_dense_(weight.view(-1), delta.reshape(-1), noise, keep)
            return
        exact = weight.float()
        if keep != 1.0:
            exact.mul_(keep)
        exact.add_(delta)
        exact.view(torch.int32).add_(noise.view_as(exact).int()).bitwise_and_(-(1 << 16))
        weight.copy_(exact)

    def noise(self, numel: int, *, step: int, key: int, first: int) -> torch.Tensor:
        """Return flat random integers, uniform in 0 … 2¹⁶ − 1, for a part of a target; see `add_`. uint16 on CPUs."""
        offset = mixed(self._seed, step, key, first) % (NOISE_ELEMENTS - numel + 1)
        return self._noise[offset : offset + numel]
