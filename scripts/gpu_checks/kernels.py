"""Checks of what is computed on the device: against the CPU's results, in double precision where there is a formula.

Legend: T tokens, M rows (out), N columns (in), D × E what is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lsp_ray.config import LspConfig
from lsp_ray.device import gpu_kernels
from lsp_ray.device.addition import Addition
from lsp_ray.device.calibrate import fit_projectors
from lsp_ray.device.fits import ClosedFormFit
from lsp_ray.device.kernels import Adder
from lsp_ray.device.projected_linear import ProjectedLinear
from lsp_ray.device.rounding import Rounding
from lsp_ray.methods.lsp import lsp_units
from lsp_ray.models.layers import find_layers
from lsp_ray.models.loss import num_targets, summed_loss
from lsp_ray.models.shared_inputs import shared_inputs
from lsp_ray.optim.adamw import AdamWHyper, AdamWState, adamw_delta_
from lsp_ray.projection.bias import relative_bias
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector
from lsp_ray.trace import WorkStream
from scripts.gpu_checks.check import Bench, Check, relative_error, require

DTYPES = (torch.float32, torch.bfloat16)
NNZ_PER_ROW = 4
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of a sum of products: its terms' own rounding, and some to spare
NUM_ROUNDED = 64
NUM_FITTING = 4
NUM_TIMED = 50
NUM_LENGTHS = 9
MOST_FOR_NEW = 5.0  # of the time of a known length; a plan takes a hundred times as much


class Draw(Protocol):
    """Makes projectors, as `SparseProjector.random` does."""

    def __call__(self, sizes: ProjectorSizes, generator: torch.Generator) -> SparseProjector:
        """Return a projector on the CPU."""
        ...


def kernel_checks(bench: Bench) -> list[tuple[str, Check]]:
    """All of them, by name."""
    by_dtype = {
        "compress": compression,
        "projected linear": projected_linear,
        "decompress and add": added_delta,
    }
    checks: list[tuple[str, Check]] = [
        (f"{name}, {str(dtype).removeprefix('torch.')}", partial(check, bench, dtype))
        for name, check in by_dtype.items()
        for dtype in DTYPES
    ]
    return [
        *checks,
        ("stochastic rounding, to the bit", partial(rounding, bench)),
        ("AdamW on the device", partial(adamw_step, bench)),
        ("projectors fitted side by side", partial(fitted_together, bench)),  # torch's solvers are not loaded yet
        ("fit of a projector", partial(fitted, bench)),
        ("checkpointed activations", partial(checkpointing, bench)),
        ("attention of ever new lengths", partial(new_lengths, bench)),
    ]


def compression(bench: Bench, dtype: torch.dtype, draw: Draw = SparseProjector.random) -> str:
    """(dY P)ᵀ (X Q) from the block products, against Pᵀ (dYᵀ X) Q from dense ones in float64."""
    projector, grad_output_TM, input_TN = _drawn(bench, dtype, draw)
    on_device = projector.to(bench.device)
    projected_TE = on_device.right.project(input_TN.to(bench.device))
    found_DE = on_device.compress_outer(grad_output_TM.to(bench.device), projected_TE)
    left_MD, right_ND = projector.left.dense().double(), projector.right.dense().double()
    expected_DE = (grad_output_TM.double() @ left_MD).t() @ (input_TN.double() @ right_ND)
    return relative_error(found_DE, expected_DE, BOUND[dtype])


def projected_linear(bench: Bench, dtype: torch.dtype) -> str:
    """Output, input gradient and g of the layer's own backward, against autograd's of a plain linear in float64."""
    projector, grad_output_TM, input_TN = _drawn(bench, dtype, SparseProjector.random)
    plain = nn.Linear(bench.sizes.columns, bench.sizes.rows)
    with torch.no_grad():
        plain.weight.copy_(_normal(*plain.weight.shape, seed=4) / bench.sizes.columns**0.5)
        plain.bias.zero_()
    plain = plain.to(dtype)
    module = ProjectedLinear(_copied(plain, bench.device), transposed=False, projector=projector.to(bench.device))
    found_input_TN = input_TN.clone().to(bench.device).requires_grad_()
    found_TM = module(found_input_TN)
    found_TM.backward(grad_output_TM.to(bench.device))
    exact, exact_input_TN = plain.double(), input_TN.double().requires_grad_()
    exact_TM = exact(exact_input_TN)
    exact_TM.backward(grad_output_TM.double())
    assert found_input_TN.grad is not None
    assert exact_input_TN.grad is not None
    assert exact.weight.grad is not None
    assert module.leaf.grad is not None
    relative_error(found_TM, exact_TM.detach(), BOUND[dtype])
    relative_error(found_input_TN.grad, exact_input_TN.grad, BOUND[dtype])
    expected_DE = projector.left.dense().double().t() @ exact.weight.grad @ projector.right.dense().double()
    return relative_error(module.leaf.grad, expected_DE, BOUND[dtype])


def added_delta(bench: Bench, dtype: torch.dtype) -> str:
    """A unit's deltas as a step adds them: the bits of the CPU, in one launch where there is a kernel."""
    host, delta_dtypes = torch.device("cpu"), DTYPES
    launches = []
    for is_transposed in (False, True):
        unit = _unit(bench, dtype, is_transposed=is_transposed)
        numel = sum(addition.numel for addition in unit)
        there, adder = [_moved(addition, bench.device) for addition in unit], Adder()
        for step, delta_dtype in enumerate(delta_dtypes):
            delta = (_normal(1, numel, seed=6)[0] * 1e-2).to(delta_dtype)
            add, add_on_cpu = (
                partial(
                    by.add_,
                    weights,
                    delta.to(device),
                    Rounding(7, device).of_step(step),
                    first_key=2,
                    learning_rate=2e-2,
                    weight_decay=0.05,
                )
                for by, weights, device in ((adder, there, bench.device), (Adder(), unit, host))
            )
            add_on_cpu()
            if step and bench.on_gpu:
                with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                    add()
                    torch.cuda.synchronize(bench.device)
                kernels = [event for event in profiled.key_averages() if event.device_type.name == "CUDA"]
                launches += [sum(event.count for event in kernels)]
            else:
                add()
            for position, (expected, found) in enumerate(zip(unit, there, strict=True)):
                is_equal = torch.equal(found.weight.cpu(), expected.weight)
                require(is_equal, f"weight {position}, transposed: {is_transposed}: not the CPU's bits in step {step}")
    if not gpu_kernels.has_kernel(there[0].weight):
        return "equal bits, one weight after the other"
    require(max(launches) == 1, f"{max(launches)} launches for a unit of {len(unit)} weights")
    return f"equal bits of {len(unit)} weights, one launch; {_seconds(bench, add) * 1e6:.0f} µs of the host"


def _unit(bench: Bench, dtype: torch.dtype, *, is_transposed: bool) -> list[Addition]:
    """On the CPU: two matrices with projectors, of which one is balanced and one has groups of two sizes, two norms."""
    shapes = (bench.sizes.rows, bench.sizes.columns), (bench.sizes.columns + 3, bench.sizes.rows + 1)
    unit = [Addition(_normal(1, bench.sizes.rows, seed=4)[0].to(dtype), decays=False)]
    for seed, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        projector = SparseProjector.random(ProjectorSizes.of(shape, bench.sizes.dim, NNZ_PER_ROW), generator)
        left, right = projector.to(torch.device("cpu"), dtype).left, projector.right.to(torch.device("cpu"), dtype)
        if seed:
            left = BlockFactor(left.value_FR, left.groups, torch.ones(shape[0]))
        weight_MN = _normal(*shape, seed=5).to(dtype)
        weight_MN = weight_MN.t().contiguous().t() if is_transposed else weight_MN
        unit.append(Addition(weight_MN, SparseProjector(left, right), projector.update_scale))
    return [*unit, Addition(_normal(1, 3, seed=7)[0].to(dtype))]


def _moved(addition: Addition, device: torch.device) -> Addition:
    projector = addition.projector and addition.projector.to(device)
    return addition._replace(weight=addition.weight.clone().to(device), projector=projector)


def _seconds(bench: Bench, work: Callable[[], object]) -> float:
    """Of the host, for one of many calls."""
    bench.backend.record(WorkStream.GPU).synchronize()
    start_s = time.monotonic()
    for _ in range(NUM_TIMED):
        work()
    return (time.monotonic() - start_s) / NUM_TIMED


def rounding(bench: Bench, make: type[Rounding] = Rounding) -> str:
    """The bits are the CPU's, and the mean of many roundings is the exact sum."""
    weight, delta = _normal(1, 4096, seed=8)[0].bfloat16(), _normal(1, 4096, seed=9)[0] * 1e-3
    ours, theirs = make(1, bench.device), Rounding(1, torch.device("cpu"))
    exact, total = weight.double() + delta.double(), torch.zeros(4096, dtype=torch.float64)
    for step in range(NUM_ROUNDED):
        found, expected = weight.clone().to(bench.device), weight.clone()
        for weight_there, by in ((found, ours), (expected, theirs)):
            Adder().add_(
                [Addition(weight_there)],
                delta.to(weight_there.device),
                by.of_step(step),
                first_key=5,
                learning_rate=0.0,
                weight_decay=0.0,
            )
        require(torch.equal(found.cpu(), expected), f"bits differ from the CPU's in step {step}")
        total += expected.double()
    mean_error = float((total / NUM_ROUNDED - exact).mean())
    require(abs(mean_error) < 1e-4, f"the mean of {NUM_ROUNDED} roundings is off by {mean_error:.1g}")
    return f"{NUM_ROUNDED} × 4096 weights; mean off by {abs(mean_error):.0e}"


def adamw_step(bench: Bench) -> str:
    """Native's fused AdamW on the device, three steps, against the CPU's."""
    answers = []
    for device in (bench.device, torch.device("cpu")):
        state, delta = AdamWState.zeros(4096, device), torch.empty(4096, device=device)
        for step in range(3):
            grad = _normal(1, 4096, seed=10 + step)[0].to(device)
            adamw_delta_(delta, grad, state, learning_rate=1e-3, hyper=AdamWHyper())
        answers.append(delta)
    return relative_error(answers[0], answers[1], BOUND[torch.float32])


def fitted(bench: Bench) -> str:
    """Projectors learned on the device lose no more of a gradient than those learned on the CPU."""
    sizes = _sizes(bench)
    rows, columns = sizes.shape
    # a gradient of low rank, which learning finds and chance does not
    grad_MN = _normal(rows, bench.sizes.dim // 2, seed=13) @ _normal(bench.sizes.dim // 2, columns, seed=14)
    biases = []
    for device in (bench.device, torch.device("cpu")):
        fit, generator = ClosedFormFit(balanced=False), torch.Generator().manual_seed(0)
        sketch = fit.lesson(sizes.shape, generator)
        sketch.add_full(grad_MN.to(device))
        projectors = fit.learn([sketch], [sizes], generator, device)
        require(projectors is not None, f"nothing was learned on {device}")
        assert projectors is not None
        compressed_DE = projectors[0].to(torch.device("cpu")).compress(grad_MN)
        bias = relative_bias(compressed_DE, float(grad_MN.double().square().sum()))
        require(bias is not None, f"the bias of what was learned on {device} is not finite")
        assert bias is not None
        biases.append(bias)
    figure = f"bias {biases[0]:.3f}, the CPU's {biases[1]:.3f}"
    require(biases[0] <= biases[1] + 0.02, figure)
    return figure


def fitted_together(bench: Bench) -> str:
    """Several threads learn projectors from a backward, as at the start of a run."""
    model = small_llama(bench)
    shared = shared_inputs(model)
    _, linears = lsp_units(find_layers(model), LspConfig(subspace_dim=16, nnz_per_row=2), seed=0, shared=shared)
    unfitted = fit_projectors(
        model, linears, [_batch(bench)], ClosedFormFit(balanced=True), seed=0, num_threads=NUM_FITTING
    )
    require(not unfitted, f"nothing was learned for {', '.join(unfitted)}")
    return f"{len(linears)} matrices, {NUM_FITTING} at once"


def checkpointing(bench: Bench) -> str:
    """Every gradient is the same whether activations are kept or computed again."""
    gradients = []
    for is_checkpointed in (False, True):
        model = small_llama(bench)
        layers = find_layers(model)
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        units, _ = lsp_units(layers, LspConfig(subspace_dim=16, nnz_per_row=2), seed=0)
        batch = _batch(bench)
        (summed_loss(model, batch) / num_targets(batch)).backward()
        leaves = [target.leaf.grad for unit in units for target in unit.targets]
        gradients.append(torch.cat([leaf.reshape(-1).float() for leaf in leaves if leaf is not None]))
    require(gradients[0].shape == gradients[1].shape, "some matrices got no gradient")
    return relative_error(gradients[1], gradients[0], BOUND[torch.float32])


def new_lengths(bench: Bench) -> str:
    """A batch of a length that was not seen before takes no longer: no kernel is planned or compiled for it."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for length in range(33, 33 + NUM_LENGTHS):
        for is_known in (False, True):
            parts = (_normal(4 * length, 64, seed=part).view(1, 4, length, 64) for part in range(3))
            query, key, value = (part.to(bench.device, torch.bfloat16).requires_grad_() for part in parts)
            bench.backend.record(WorkStream.GPU).synchronize()
            start_s = time.monotonic()
            scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
            bench.backend.record(WorkStream.GPU).synchronize()
            seconds[is_known].append(time.monotonic() - start_s)
    new_s, known_s = median(seconds[False]), median(seconds[True])
    figure = f"{1e3 * new_s:.2f} ms where it is new, {1e3 * known_s:.2f} where it is known"
    require(not bench.on_gpu or new_s < MOST_FOR_NEW * known_s, figure)
    return figure


def small_llama(bench: Bench) -> PreTrainedModel:
    """Two blocks of 64 features with random weights, on the device, in training mode."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.to(bench.device)  # type: ignore[arg-type]
    model.train()
    return model


def _batch(bench: Bench) -> dict[str, torch.Tensor]:
    ids_BS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2)).to(bench.device)
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": ids_BS}


def _drawn(bench: Bench, dtype: torch.dtype, draw: Draw) -> tuple[SparseProjector, torch.Tensor, torch.Tensor]:
    """A projector, dY (T, M) and X (T, N), on the CPU."""
    sizes = _sizes(bench)
    projector = draw(sizes, torch.Generator().manual_seed(0))
    grad_output_TM, input_TN = (
        _normal(bench.sizes.num_tokens, side, seed=seed).to(dtype) for seed, side in enumerate(sizes.shape)
    )
    return projector.to(torch.device("cpu"), dtype), grad_output_TM, input_TN


def _sizes(bench: Bench) -> ProjectorSizes:
    return ProjectorSizes.of((bench.sizes.rows, bench.sizes.columns), bench.sizes.dim, NNZ_PER_ROW)


def _normal(rows: int, columns: int, *, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _copied(plain: nn.Linear, device: torch.device) -> nn.Linear:
    copy = nn.Linear(plain.in_features, plain.out_features, dtype=plain.weight.dtype)
    copy.load_state_dict(plain.state_dict())
    return copy.to(device)
