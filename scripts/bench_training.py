#!/usr/bin/env python3
"""Eval loss of full fine-tuning and of low-memory methods, trained alike: same rows, schedule, rounding and AdamW.

    OMP_NUM_THREADS=1 python scripts/bench_training.py --methods full,lsp --learning_rates 1e-4,2e-4 --out curves.jsonl

One process without Ray; every finished run adds a JSON line to --out. Embeddings stay frozen, norms train as they are.
Updates are norm-matched to full fine-tuning's; lora's linears take ten times the learning rate asked for instead.

Legend: M rows (out), N columns (in), D subspace, K rank.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import get_args

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lsp_ray.config import PayloadDtype, RunConfig
from lsp_ray.device.backend import CpuBackend
from lsp_ray.device.calibrate import fit_projectors
from lsp_ray.device.evaluate import mean_loss
from lsp_ray.device.fits import ClosedFormFit
from lsp_ray.device.projected_linear import InSubspace
from lsp_ray.device.rounding import Rounding, mixed
from lsp_ray.device.unit import RawTarget, Target, Unit
from lsp_ray.device.worker import DeviceWorker
from lsp_ray.errors import NonFiniteLossError
from lsp_ray.methods.lsp import lsp_units, take_projectors
from lsp_ray.methods.units import as_units, full_units, raw_targets
from lsp_ray.models.layers import Layer, find_layers
from lsp_ray.models.load import load_model
from lsp_ray.models.loss import num_targets, summed_loss
from lsp_ray.models.shared_inputs import shared_inputs
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.runtime.prepare.job import prepare_job

GALORE_RANK = 8  # (M + N) · 8 bfloat16 are the bytes of LSP at r = 8
LORA_RANK, LORA_ALPHA, LORA_RATE = 8, 16, 10.0
OVERSAMPLING, POWER_ITERATIONS = 16, 4
LSP = ("lsp", "lsp_unbalanced")  # as shipped, and with --lsp.balance false
METHODS = ("full", *LSP, "random", "galore", "galore_one_sided", "lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMap:
    """Stands between a target's payload G and Adam, which sees LᵀGR; the target gets scale · L δ Rᵀ. None is I."""

    shape: tuple[int, ...]
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def numel(self) -> int:
        """Elements that Adam sees."""
        sides = zip((self.left, self.right), self.shape, strict=False)
        return math.prod(size if factor is None else factor.shape[1] for factor, size in sides)

    def down(self, grad: torch.Tensor) -> torch.Tensor:
        """LᵀGR, flat."""
        small = grad.view(self.shape)
        small = small if self.left is None else self.left.t() @ small
        return (small if self.right is None else small @ self.right).reshape(-1)

    def up(self, delta: torch.Tensor) -> torch.Tensor:
        """scale · L δ Rᵀ, flat."""
        rows = self.shape[0] if self.left is None else self.left.shape[1]
        large = delta.view(rows, -1) * self.scale
        large = large if self.left is None else self.left @ large
        return (large if self.right is None else large @ self.right.t()).reshape(-1)


class MappedShard(OptimizerShard):
    """An optimizer shard whose Adam runs behind the maps of each unit's targets."""

    is_plain = False

    def __init__(self, maps_of_unit: Mapping[int, Sequence[DenseMap]]) -> None:
        super().__init__({unit: sum(part.numel for part in maps) for unit, maps in maps_of_unit.items()})
        self._maps_of_unit = maps_of_unit

    def update(
        self,
        layer: int,
        grads: Sequence[torch.Tensor],
        delta: torch.Tensor,
        *,
        learning_rate: float,
        grad_scale: float = 1.0,
    ) -> None:
        """See `OptimizerShard`; of one gradient."""
        (grad,) = grads
        maps = self._maps_of_unit[layer]
        parts = grad.split([math.prod(part.shape) for part in maps])
        small = torch.cat([part.down(grad_part) for part, grad_part in zip(maps, parts, strict=True)])
        step = torch.empty_like(small)
        super().update(layer, [small], step, learning_rate=learning_rate, grad_scale=grad_scale)
        steps = step.split([part.numel for part in maps])
        torch.cat([part.up(step_part) for part, step_part in zip(maps, steps, strict=True)], out=delta)


class SentShard(OptimizerShard):
    """An optimizer shard to which gradients and deltas go as they cross the link."""

    is_plain = False

    def __init__(self, sizes: Mapping[int, int], payload_dtype: PayloadDtype, seed: int) -> None:
        self._wire, self._rounding = Codec(payload_dtype), Rounding(seed, torch.device("cpu"))
        super().__init__(sizes, codec=self._wire)

    def update(
        self,
        layer: int,
        grads: Sequence[torch.Tensor],
        delta: torch.Tensor,
        *,
        learning_rate: float,
        grad_scale: float = 1.0,
    ) -> None:
        """See `OptimizerShard`; of one gradient, float32 here, as the delta is."""
        (grad,) = grads
        down, up = (torch.empty(self._wire.wire_numel(grad.numel()), dtype=self._wire.dtype) for _ in range(2))
        noise = self._rounding.noise(step=int(self.states[layer].step), key=layer)
        self._wire.encode_(down, grad, noise if self._wire.is_coarse else None)
        super().update(layer, [down], up, learning_rate=learning_rate, grad_scale=grad_scale)
        delta.copy_(self._wire.decode(up, grad.numel()))


class LoraLinear(nn.Module):
    """W x + (α/k) B A x with frozen W; A and B are float32 and multiply in the input's dtype."""

    def __init__(self, module: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = module.get_parameter("weight").requires_grad_(False)
        rows, columns = self.weight.shape
        bound = columns**-0.5  # kaiming_uniform_ with a = √5, as in the reference
        self.down_KN = nn.Parameter((torch.rand(LORA_RANK, columns, generator=generator) * 2 - 1) * bound)
        self.up_MK = nn.Parameter(torch.zeros(rows, LORA_RANK))

    def forward(self, input_TN: torch.Tensor) -> torch.Tensor:
        """(..., N) to (..., M)."""
        down_KN, up_MK = self.down_KN.to(input_TN.dtype), self.up_MK.to(input_TN.dtype)
        return linear(input_TN, self.weight) + linear(linear(input_TN, down_KN), up_MK) * (LORA_ALPHA / LORA_RANK)


class Bench:
    """A job and what its runs share: fitted projectors and GaLore's bases."""

    def __init__(
        self, *, num_steps: int, seed: int, dataset: str, max_seq_length: int, payload_dtype: PayloadDtype
    ) -> None:
        config = RunConfig(
            max_steps=num_steps,
            learning_rate=1.0,
            seed=seed,
            bf16=True,
            dataset=dataset,
            max_seq_length=max_seq_length,
        )
        self.payload_dtype = payload_dtype
        self.job = prepare_job(replace(config, runtime=replace(config.runtime, device="cpu")), print)
        self.seed = seed
        self.calibration = self.job.micro_batches.calibration(config.lsp.calibration_batches)
        self.fit_s: dict[str, float] = {}
        self._projectors: dict[bool, dict[str, SparseProjector]] = {}

    def load(self) -> PreTrainedModel:
        """The pretrained model in training mode."""
        model = load_model(self.job.model_folder, dtype=self.job.dtype, task=self.job.task)
        model.train()
        return model

    def projectors(self, *, balanced: bool) -> dict[str, SparseProjector]:
        """One for every linear, by name, learned in closed form from the calibration batches."""
        if balanced not in self._projectors:
            self._projectors[balanced] = self._learned(balanced=balanced)
        return self._projectors[balanced]

    def _learned(self, *, balanced: bool) -> dict[str, SparseProjector]:
        start_s, model = time.monotonic(), self.load()
        _, linears = self._wrapped(model, find_layers(model))
        unfitted = fit_projectors(
            model, linears, self.calibration, ClosedFormFit(balanced=balanced), seed=self.seed, num_threads=1
        )
        self.fit_s["lsp"] = time.monotonic() - start_s
        assert not unfitted, f"no gradient reaches {unfitted}"
        return {name: module.projector for name, module in linears}

    @cached_property
    def galore_bases(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Leading left (M, K) and right (N, K) singular vectors of the calibration gradients, by linear."""
        start_s, model = time.monotonic(), self.load()
        sites = [site for layer in find_layers(model) for site in layer.linears]
        weights = [site.module.get_parameter("weight") for site in sites]
        losses = (summed_loss(model, batch) / num_targets(batch) for batch in self.calibration)
        gradients = zip(*(torch.autograd.grad(loss, weights) for loss in losses), strict=True)
        generator = torch.Generator().manual_seed(self.seed)
        bases = {site.name: _bases(grads, generator) for site, grads in zip(sites, gradients, strict=True)}
        self.fit_s["galore"] = time.monotonic() - start_s
        return bases

    def run(self, method: str, learning_rate: float) -> dict[str, object]:
        """Train once; the answer goes into --out."""
        model = self.load()
        units, shard = self._prepared(method, model)
        factor = learning_rate * (LORA_RATE if method == "lora" else 1.0)
        rates = tuple(rate * factor for rate in self.job.learning_rates)
        worker = DeviceWorker(
            model,
            units,
            CpuBackend(),
            learning_rates=rates,
            weight_decay=0.0,
            seed=self.seed,
            on_gradients=lambda _ready: None,
            local_shard=shard,
            measured_step=-1,  # watching memory changes time and rounding
        )
        row: dict[str, object] = {"method": method, "learning_rate": factor, "steps": len(rates), "seed": self.seed}
        eval_batches = self.job.micro_batches.eval_batches()
        row["eval_before"] = mean_loss(model, eval_batches)
        reports, cpu_s = [], []
        try:
            for step in range(len(rates)):
                micro_batches, start_cpu_s = self.job.micro_batches.step(step), time.process_time()
                reports.append(worker.run_step(step, micro_batches))
                cpu_s.append(time.process_time() - start_cpu_s)
                if step + 1 == len(rates) // 2:
                    row["eval_half"] = mean_loss(model, eval_batches)
            row["eval_after"] = mean_loss(model, eval_batches)
        except NonFiniteLossError as error:
            row["diverged"] = str(error)
        fit_s = self.fit_s.get("lsp" if method in LSP else method.removesuffix("_one_sided"), 0.0)
        row |= {"step_s_median": median(report.end_s - report.start_s for report in reports), "fit_s": fit_s}
        return row | {"step_cpu_s_median": median(cpu_s), "train_losses": [report.loss for report in reports]}

    def _prepared(self, method: str, model: PreTrainedModel) -> tuple[list[Unit], OptimizerShard]:
        """Put the method's modules in place; returns what trains and where Adam runs."""
        layers = find_layers(model)
        maps: dict[int, DenseMap] = {}  # by the id of the leaf that it stands behind
        if method in LSP or method == "random":
            units = self._lsp(method, model, layers)
        elif method == "lora":
            units = self._lora(layers, maps)
        else:
            units = full_units(layers)
            if method != "full":
                self._galore(layers, maps, one_sided=method == "galore_one_sided")
        if not maps:
            sizes = {unit.index: unit.numel for unit in units}
            return units, OptimizerShard(sizes) if method == "full" else SentShard(sizes, self.payload_dtype, self.seed)
        leaves = {unit.index: [target.leaf for target in unit.targets] for unit in units}
        maps = {id(leaf): DenseMap(shape=leaf.shape) for unit in leaves.values() for leaf in unit} | maps
        return units, MappedShard({index: [maps[id(leaf)] for leaf in unit] for index, unit in leaves.items()})

    def _lsp(self, method: str, model: PreTrainedModel, layers: Sequence[Layer]) -> list[Unit]:
        units, linears = self._wrapped(model, layers)
        if method != "random":
            take_projectors(linears, self.projectors(balanced=method == "lsp"))
        return units

    def _wrapped(
        self, model: PreTrainedModel, layers: Sequence[Layer]
    ) -> tuple[list[Unit], list[tuple[str, InSubspace]]]:
        return lsp_units(layers, self.job.config.lsp, seed=self.seed, shared=shared_inputs(model))

    def _lora(self, layers: Sequence[Layer], maps: dict[int, DenseMap]) -> list[Unit]:
        generator = torch.Generator().manual_seed(mixed(self.seed))
        targets_of_layer: list[list[Target]] = [[] for _ in layers]
        for layer, targets in zip(layers, targets_of_layer, strict=True):
            for site in layer.linears:
                module = LoraLinear(site.module, generator)
                setattr(site.parent, site.attribute, module)
                targets += [RawTarget(module.down_KN, module), RawTarget(module.up_MK, module)]
            for norm in layer.parameters:
                targets += raw_targets(norm)
                maps[id(norm.parameter)] = DenseMap(shape=norm.parameter.shape, scale=1 / LORA_RATE)
        return as_units(layers, targets_of_layer)

    def _galore(self, layers: Sequence[Layer], maps: dict[int, DenseMap], *, one_sided: bool) -> None:
        for site in (site for layer in layers for site in layer.linears):
            rows, columns = site.shape
            left, right = self.galore_bases[site.name]
            small = DenseMap(shape=site.shape, left=left[:, :GALORE_RANK], right=right[:, :GALORE_RANK])
            if one_sided:
                sides = (None, right) if rows > columns else (left, None)
                small = DenseMap(shape=site.shape, left=sides[0], right=sides[1])
            scale = math.sqrt(rows * columns / small.numel)  # the factors' columns are orthonormal
            maps[id(site.module.get_parameter("weight"))] = replace(small, scale=scale)


def _bases(gradients: Sequence[torch.Tensor], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the gradients side by side and on top of each other; as wide as the bytes allow on the shorter side alone."""
    rows, columns = gradients[0].shape
    width = GALORE_RANK * (rows + columns) // min(rows, columns)
    sides = torch.cat(list(gradients), dim=1).float(), torch.cat(list(gradients)).t().float()
    return _leading(sides[0], width, generator), _leading(sides[1], width, generator)


def _leading(wide: torch.Tensor, width: int, generator: torch.Generator) -> torch.Tensor:
    """The leading left singular vectors, by power iterations on a random start (Halko, Martinsson and Tropp 2011)."""
    basis = wide @ torch.randn(wide.shape[1], width + OVERSAMPLING, generator=generator)
    for _ in range(POWER_ITERATIONS):
        basis = wide @ (wide.t() @ torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    return torch.mm(basis, torch.linalg.svd(basis.t() @ wide, full_matrices=False).U[:, :width])


def main() -> None:
    """Run every method at every learning rate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--learning_rates", default="5e-5,1e-4,2e-4,4e-4", help="peaks; lora takes ten times as much")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dataset", default="stdlib-docstrings", help="as a run's option")
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--payload_dtype", choices=get_args(PayloadDtype), default="bfloat16", help="what lsp sends")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    options = parser.parse_args()
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods must be of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    bench = Bench(
        num_steps=options.steps,
        seed=options.seed,
        dataset=options.dataset,
        max_seq_length=options.max_seq_length,
        payload_dtype=options.payload_dtype,
    )
    for learning_rate in map(float, options.learning_rates.split(",")):
        for method in methods:
            row = bench.run(method, learning_rate)
            with options.out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            print({name: value for name, value in row.items() if name != "train_losses"}, flush=True)


if __name__ == "__main__":
    main()
