"""Give back, before step 1, what rounding to fewer bits has taken from a base's outputs, as far as updates can.

A base that is quantised as it is loaded computes with Ŵ = W − E. Updates begin with the D whose P D Qᵀ comes nearest to
E in what it does to inputs X of calibration, in place of zeros:

    min ‖X (E − P D Qᵀ)ᵀ‖² + λ ‖E − P D Qᵀ‖²,   D = P⁺ E H (Qᵀ H)⁻¹ with H = (XᵀX + λ I) Q

So the model starts near the one that was asked for. LoftQ (Li et al. 2023) begins the factors of LoRA with the error's
leading directions, CLoQ (Deng et al. 2025) with those of its outputs; here P and Q are given, learned from gradients.

Legend: T tokens, M rows (out), N columns (in), D × E what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lsp_ray.device.calibrate import by_right_factor, passes
from lsp_ray.device.delta_linear import DeltaLinear
from lsp_ray.device.projected_linear import InSubspace
from lsp_ray.models.loss import Batch, is_token, summed_loss
from lsp_ray.models.quantized import dense_weight, is_quantized_linear

DAMPING = 0.1  # λ, of the mean of XᵀX's diagonal: some thousand tokens do not tell all directions apart
LARGEST_ERROR = 0.5  # ‖E‖ / ‖W‖; what is further from Ŵ is another weight

_CPU = torch.device("cpu")
_Named = tuple[str, DeltaLinear]


def give_back_(
    model: PreTrainedModel,
    linears: Sequence[tuple[str, InSubspace]],
    batches: Sequence[Batch],
    folder: Path,
    on_done: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Let the D of linears whose base was quantised begin as above.

    A weight at a time is made whole, on the CPU.

    Args:
        model: On its device.
        linears: Names and modules, with the projectors that they will have; others are left alone.
        batches: Calibration micro-batches, on any device.
        folder: That the base was loaded from, with its weights before rounding.
        on_done: Called with the number of linears done and their total.

    Returns:
        Names of linears whose weights are not found in the folder; their D stays.
    """
    rounded = [(name, own) for name, own in linears if isinstance(own, DeltaLinear) and is_quantized_linear(own.base)]
    weights, missing, done = _Weights(folder), list[str](), 0
    for groups in passes(by_right_factor(rounded), _moment_bytes):
        with _seen([group[0][1] for group in groups]) as moments:
            _forward_all(model, batches, moments)
        for group, moment in zip(groups, moments, strict=True):
            for name, linear in group:
                error_MN = weights.error_of(name, linear)
                if error_MN is None:
                    missing.append(name)
                else:
                    linear.delta_DE.copy_(moment.nearest(error_MN, linear))
                done += 1
                if on_done is not None:
                    on_done(done, len(rounded))
    return missing


class _Moment:
    """XᵀX Q of what a linear has got: float32 (N, E) on the CPU, and the sum of squares of X.

    Attributes:
        is_token: Of the batch that is seen: which rows are no padding.
    """

    def __init__(self, linear: DeltaLinear) -> None:
        self._right = linear.projector.right
        self._sum_NE = torch.zeros(self._right.num_rows, self._right.dim)
        self._squares = 0.0
        self.is_token = torch.ones(0, dtype=torch.bool)

    def see(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Add an input (…, N), as a hook before the forward."""
        input_TN = inputs[0].reshape(-1, self._right.num_rows).float()
        if input_TN.shape[0] == self.is_token.numel():  # else it is of some of the tokens, as an expert's is
            input_TN = input_TN[self.is_token]
        self._sum_NE += (input_TN.t() @ self._right.project(input_TN)).to(_CPU)
        self._squares += float(input_TN.square().sum())

    def nearest(self, error_MN: torch.Tensor, linear: DeltaLinear) -> torch.Tensor:
        """The D for a float32 error of this linear, float64."""
        right = self._right.to(_CPU, torch.float64)
        left_DN = linear.projector.left.to(_CPU, torch.float32).solve(error_MN).double()
        damping = DAMPING * self._squares / right.num_rows or 1.0
        damped_NE = self._sum_NE.double() + damping * right.dense()
        gram_EE = right.project(damped_NE.t())
        nearest_DE: torch.Tensor = torch.linalg.solve(gram_EE, (left_DN @ damped_NE).t()).t()
        return nearest_DE


class _Weights:
    """Those of a folder, as they were before they were rounded."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as content:
                self._files |= dict.fromkeys(content.keys(), file)

    def error_of(self, name: str, linear: DeltaLinear) -> torch.Tensor | None:
        """W − Ŵ of a linear of this name, float32 (M, N) on the CPU; None where W is not found."""
        key = self._key(f"{name}.weight")
        if key is None:
            return None
        with safe_open(self._files[key], framework="pt") as content:
            whole_MN = content.get_tensor(key).float()
        if getattr(linear.base, "source_cls", None) is Conv1D:  # in the folder as (in, out)
            whole_MN = whole_MN.t()
        rounded_MN = dense_weight(linear.base, linear.projector.dtype).to(_CPU, torch.float32)
        if whole_MN.shape != rounded_MN.shape:
            return None
        error_MN = whole_MN - rounded_MN
        return error_MN if float(error_MN.norm()) <= LARGEST_ERROR * float(whole_MN.norm()) else None

    def _key(self, name: str) -> str | None:
        """The name in the folder: the same, or the one that ends like it, as folders of other heads have it."""
        if name in self._files:
            return name
        tail = name
        while "." in tail:
            tail = tail.partition(".")[2]
            found = [key for key in self._files if key == tail or key.endswith(f".{tail}")]
            if found:
                return found[0] if len(found) == 1 else None
        return None


@contextmanager
def _seen(linears: Sequence[DeltaLinear]) -> Iterator[list[_Moment]]:
    """Within the context what these linears get is added up."""
    moments = [_Moment(linear) for linear in linears]
    hooks = [linear.register_forward_pre_hook(own.see) for linear, own in zip(linears, moments, strict=True)]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def _moment_bytes(group: list[_Named]) -> int:
    projector = group[0][1].projector
    return projector.right.num_rows * projector.right.dim * torch.float32.itemsize


def _forward_all(model: PreTrainedModel, batches: Sequence[Batch], moments: Sequence[_Moment]) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        for position, batch in enumerate(batches):
            torch.manual_seed(position)
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            for moment in moments:
                moment.is_token = is_token(on_device).flatten()
            summed_loss(model, on_device)
