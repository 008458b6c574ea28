"""LSPAdamW: LSP in one process, as an optimizer for training loops that are there already.

    optimizer = LSPAdamW.for_model(model, lr=1e-4)
    trainer = Trainer(model, arguments, ..., optimizers=(optimizer, None))

Autograd leaves full gradients on the weights; `step` projects each, takes AdamW's step in the (d, d) subspace and adds
the decompressed delta. So the device holds weights, full gradients and a small state, where a run of `lsp_ray.run`
holds neither gradients nor state. The maths is a run's; two differences follow from seeing whole gradients only:

    projectors are learned from the first step's gradient, not from calibration batches before it
    at every check the bias of every matrix is measured, and one above the bound is fitted anew at once

Legend: M rows, N columns of a weight, D × E what Adam sees, R non-zeros a row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lsp_ray.config import LspConfig
from lsp_ray.device.addition import Addition
from lsp_ray.device.kernels import Adder
from lsp_ray.device.rounding import Rounding, mixed
from lsp_ray.device.unit import Update
from lsp_ray.errors import ConfigError
from lsp_ray.methods.moments import Moments
from lsp_ray.methods.parameter_groups import parameter_groups
from lsp_ray.methods.projected_matrix import ProjectedMatrix, check_form, learned
from lsp_ray.optim.adamw import AdamWHyper
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector

_DTYPES = (torch.float32, torch.bfloat16)


class LSPAdamW(Optimizer):
    """AdamW, in a projector's subspace for every group with a `subspace_dim`; other groups get plain AdamW.

    Weights are float32, or bfloat16, which is rounded stochastically; moments are float32. A matrix whose gradient is
    zero or not finite is left as it is until there is something to learn a projector from. On several devices every
    replica makes the same step from the same gradients; sharded weights (FSDP, ZeRO 3) are not supported.

    Args:
        params: Parameters or groups, as any optimizer takes them, float32 or bfloat16; matrices (M, N) in groups with a
            `subspace_dim`. A group may have options of its own.
        lr: Learning rate; full fine-tuning's carries over, for a classifier at most a quarter of it.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: Decoupled weight decay.
        subspace_dim: Size d of what Adam sees, for each side at most half of it; None: plain AdamW.
        nnz_per_row: R.
        balance: See `fit_factor`.
        check_every: Steps between measurements of bias; 0: none.
        max_bias: Relative bias above which a matrix gets new projectors.
        seed: Of positions, sketches and rounding.

    Raises:
        ConfigError: A value cannot work, or a weight is of another dtype or no matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        subspace_dim: int | None = None,
        nnz_per_row: int = LspConfig.nnz_per_row,
        balance: bool = LspConfig.balance,
        check_every: int = LspConfig.check_every,
        max_bias: float = LspConfig.max_bias,
        seed: int = 42,
    ) -> None:
        adamw = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        lsp = {"subspace_dim": subspace_dim, "nnz_per_row": nnz_per_row, "balance": balance}
        super().__init__(params, adamw | lsp | {"check_every": check_every, "max_bias": max_bias, "seed": seed})

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        lr: float = 1e-4,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        optim_args: str = "",
        weight_decay: float = 0.0,
        **options: Any,
    ) -> Self:
        """Return an optimizer for a model, which is changed in one way: its embeddings and output layer are frozen.

        Args:
            model: Of transformers. Parameters that are frozen already stay so.
            lr: Learning rate.
            target_modules: Linears that are projected: `all-linear`, the ends of their names, or a regular expression
                for whole names. What else is trained, and matrices too small for a projector, gets plain AdamW.
            optim_args: As in `d=256,r=4,check_every=200`; also `max_bias` and `balance`.
            weight_decay: Of matrices; biases and norms have none, as in a run.
            options: Others of this class: `betas`, `eps`, `seed`.

        Raises:
            ConfigError: `target_modules` matches no linear, or `optim_args` cannot work.
        """
        groups = parameter_groups(model, target_modules, optim_args, weight_decay=weight_decay)
        return cls(groups, lr=lr, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient, in place; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._announce()
        for key, (group, weight) in enumerate(self._weights()):
            if weight.grad is not None:
                step_of = self._plain_step if group["subspace_dim"] is None else self._projected_step
                step_of(weight, weight.grad, group, key)
        return loss

    def _announce(self) -> None:
        """Say once why the first step takes longer than the others."""
        if self.__dict__.setdefault("_has_announced", bool(self.state)):
            return
        self.__dict__["_has_announced"] = True
        num = sum(len(group["params"]) for group in self.param_groups if group["subspace_dim"] is not None)
        if num:
            line = f"LSPAdamW: learning the projectors of {num} matrices from this first gradient, which takes a while"
            print(line, file=sys.stderr)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `Optimizer.load_state_dict`; exact, where torch's would cast the state to the weights' dtype.

        Raises:
            ConfigError: An older version wrote it, with projectors of another form; nothing has changed then.
        """
        for of_weight in state_dict["state"].values():
            check_form(of_weight)
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, (_, weight) in zip(saved, self._weights(), strict=True):
            tensors: Mapping[str, torch.Tensor] = state_dict["state"].get(index, {})
            if tensors:
                self.state[weight] = {
                    name: tensor if name == "step" else tensor.to(weight.device) for name, tensor in tensors.items()
                }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was saved; what follows from it is made when it is needed."""
        super().__setstate__(state)
        self._matrices.clear()

    @property
    def _matrices(self) -> dict[torch.Tensor, ProjectedMatrix]:
        """What the state of each projected weight stands for."""
        cache: dict[torch.Tensor, ProjectedMatrix] = self.__dict__.setdefault("_matrix_cache", {})
        return cache

    def _weights(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            for weight in group["params"]:
                yield group, weight

    def _plain_step(self, weight: nn.Parameter, grad: torch.Tensor, group: dict[str, Any], key: int) -> None:
        if not self.state[weight]:
            self.state[weight] = Moments.zeros(tuple(weight.shape), weight.device).state()
        moments = Moments.from_state(self.state[weight])
        update = self._update(group, moments)
        delta = moments.delta(grad, learning_rate=update.learning_rate, hyper=_hyper(group))
        self._add(Addition(weight), delta, update, key)

    def _projected_step(self, weight: nn.Parameter, grad_MN: torch.Tensor, group: dict[str, Any], key: int) -> None:
        matrix = self._matrix(weight, grad_MN, group, key)
        if matrix is None:
            return
        compressed_DE = matrix.projector.compress(grad_MN).float()
        update = self._update(group, matrix.moments)
        if group["check_every"] and update.step and update.step % group["check_every"] == 0:
            bias = matrix.relative_bias(grad_MN, compressed_DE)
            new = _learned(grad_MN, group, key, update.step) if bias is not None and bias > group["max_bias"] else None
            if new is not None:
                matrix.take(new)
                self.state[weight] = matrix.state()
                compressed_DE = new.compress(grad_MN).float()
        delta_DE = matrix.moments.delta(compressed_DE, learning_rate=update.learning_rate, hyper=_hyper(group))
        self._add(Addition(weight, matrix.projector, matrix.update_scale), delta_DE, update, key)

    def _add(self, addition: Addition, delta: torch.Tensor, update: Update, key: int) -> None:
        adders: dict[int, Adder] = self.__dict__.setdefault("_adders", {})
        adders.setdefault(key, Adder()).add_(
            [addition],
            delta.view(-1),
            update.rounding.of_step(update.step),
            first_key=key,
            learning_rate=update.learning_rate,
            weight_decay=update.weight_decay,
        )

    def _matrix(
        self, weight: nn.Parameter, grad_MN: torch.Tensor, group: dict[str, Any], key: int
    ) -> ProjectedMatrix | None:
        if weight not in self._matrices:
            if self.state[weight]:
                self._matrices[weight] = ProjectedMatrix.from_state(self.state[weight])
            else:
                projector = _learned(grad_MN, group, key, 0)
                if projector is None:
                    return None
                self._matrices[weight] = ProjectedMatrix.fresh(projector, weight.device)
                self.state[weight] = self._matrices[weight].state()
        return self._matrices[weight]

    def _update(self, group: dict[str, Any], moments: Moments) -> Update:
        roundings: dict[torch.device, Rounding] = self.__dict__.setdefault("_roundings", {})
        if moments.device not in roundings:
            roundings[moments.device] = Rounding(group["seed"], moments.device)
        return Update(
            step=int(moments.step),
            learning_rate=float(group["lr"]),
            weight_decay=group["weight_decay"],
            rounding=roundings[moments.device],
        )


def _learned(grad_MN: torch.Tensor, group: dict[str, Any], key: int, step: int) -> SparseProjector | None:
    generator = torch.Generator().manual_seed(mixed(group["seed"], key, step))
    rows, columns = grad_MN.shape
    sizes = ProjectorSizes.of((rows, columns), group["subspace_dim"], group["nnz_per_row"])
    return learned(grad_MN, sizes, generator, balanced=group["balance"])


def _hyper(group: dict[str, Any]) -> AdamWHyper:
    beta1, beta2 = group["betas"]
    return AdamWHyper(beta1=beta1, beta2=beta2, eps=group["eps"])


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "check_every", "max_bias"):
        if not float(group[name]) >= 0.0:
            raise ConfigError(name, "be at least 0", group[name])
    if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ConfigError("betas", "be at least 0 and below 1", group["betas"])
    for weight in group["params"]:
        if weight.dtype not in _DTYPES:
            raise ConfigError("params", "be float32 or bfloat16", weight.dtype)
        if group["subspace_dim"] is not None:
            _check_projected(weight, group)


def _check_projected(weight: torch.Tensor, group: dict[str, Any]) -> None:
    shape = tuple(weight.shape)
    nnz_per_row = group["nnz_per_row"]
    if len(shape) != 2:
        raise ConfigError("params", "be matrices in a group with a subspace_dim", shape)
    bound = min(group["subspace_dim"], min(shape) // 2)
    if not 1 <= nnz_per_row <= bound:
        raise ConfigError(
            "nnz_per_row", f"be at least 1 and at most subspace_dim and half a side ({bound})", nnz_per_row
        )
