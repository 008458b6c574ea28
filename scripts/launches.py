#!/usr/bin/env python3
"""Counts, on a CPU, what a step of a Llama in bfloat16, unpadded, launches on a GPU and where it makes the host wait.

    python scripts/launches.py [--json PATH]
    python scripts/launches.py --kernels     # builds them for every card, and tells registers and spills

Every operator counts as the kernels that CUDA launches for it (`LAUNCHES`), views and allocations as none, and every
launch of a kernel in lsp_ray/device/gpu_kernels.py as one, which here does nothing. The step is counted with 2 and with
4 layers: the difference is `per_layer`, the rest `fixed`. `syncs` are a step's with 2 layers; the copies of a batch to
the device are not among them, as a CPU makes none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import get_ident
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import rms_norm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lsp_ray.device import compiled_blocks, cpu_kernels, gpu_kernels, gpu_products
from lsp_ray.device.backend import CpuBackend, Fence
from lsp_ray.device.compiled_blocks import CompiledBlocks
from lsp_ray.models.layers import Layer, find_layers
from lsp_ray.models.loss import Batch, num_targets, num_tokens
from lsp_ray.projection.block_factor import is_launched
from lsp_ray.projection.sparse_projector import product_float32
from lsp_ray.runtime.actors import device_side
from lsp_ray.trace import WorkStream
from scripts.gpu_bench_parts.builds import CAPABILITIES, Variant, built, has_assembler, variant_of
from scripts.gpu_bench_parts.compiled import CountingBackend, mm_float32
from scripts.gpu_bench_parts.ours import run_ours
from scripts.gpu_bench_parts.phases import Phase
from scripts.gpu_bench_parts.random_model import random_examples, random_model, write_folder
from scripts.gpu_bench_parts.settings import SIZES, Setting, Size

METHODS = ("lsp", "lsp_compiled", "native", "hf")
NUM_LAYERS = (2, 4)
KERNELS = (gpu_kernels, gpu_products)  # where they are
WARM_UP, COUNTED = 2, 2  # steps
CPU = torch.device("cpu")
LAUNCHES: Mapping[str, int] = {
    "_foreach_norm": 3,  # ATen's sources: a kernel for the parts, one for their sums, and a fill
    "_local_scalar_dense": 0,  # a copy
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,  # as CUDA's: a product, the gradients, a conversion
    "nll_loss_backward": 2,
    "nonzero": 5,
    "project_together": 0,  # tells its own kernel
}
FOREACH_CHUNK, FOREACH_CHUNKS = 65536, 320  # elements that a block copies, and blocks of a launch
BY_MASK = 6  # launches of indexing by booleans: nonzero, and the gather
_FREE = ("_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_SYNCS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique")


Graphs = Callable[[Callable[[], None]], Callable[[], None]]


class LaunchCount(TorchDispatchMode):
    """Counts while it is entered; see `Watch`, of which it has the methods.

    Attributes:
        launches: By operator, or by kernel of our own.
        syncs: By what waits.
        variants: Of our own kernels, with the kernel.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.variants: dict[Variant, Any] = {}
        self._thread = 0  # that launches; 0: nobody is watched

    def start(self) -> None:
        """See `Watch`."""
        self.__enter__()  # type: ignore[no-untyped-call]
        self._thread = get_ident()

    def stop(self) -> None:
        """See `Watch`."""
        self._thread = 0
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def launched(self, kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note one of our own kernels."""
        if self.is_watching:
            variant = variant_of(kernel, args, kwargs)
            self.launches[variant.kernel] += 1
            self.variants[variant] = kernel

    def operated(self, name: str, number: int = 1) -> None:
        """Note an operator that a CPU does not have."""
        self.launches[name] += number * self.is_watching

    def waited(self, what: str) -> None:
        """Note that a thread waits; only the one that launches holds the device up."""
        self.syncs[what] += self.is_watching

    @property
    def is_watching(self) -> bool:
        """Whether what this thread launches is counted."""
        return get_ident() == self._thread

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context the thread works on the host's own tensors, if it is watched at all."""
        with _disable_current_modes() if self.is_watching else nullcontext():
            yield

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        by_mask = name in ("index", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in _SYNCS or by_mask:
            self.syncs["index by booleans" if by_mask else name] += 1
        number = BY_MASK if by_mask else LAUNCHES.get(name, 0 if _is_free(func, name) else 1)
        if name == "cat" and len({result.dtype, *(part.dtype for part in args[0])}) > 1:
            number = len(args[0])
        if name == "_foreach_copy_":
            number = -(-sum(-(-part.numel() // FOREACH_CHUNK) for part in args[0]) // FOREACH_CHUNKS)
        if number:
            self.launches[name] += number
        return result


def _is_free(func: Any, name: str) -> bool:
    """Whether nothing is computed: memory is named anew or allocated."""
    views = any(part.alias_info is not None and not part.alias_info.is_write for part in func._schema.returns)
    return views or name in _FREE


class _CountedKernel:
    """Stands for a Triton kernel: `kernel[grid](…)` is a launch that does nothing, but that a product is zero."""

    def __init__(self, kernel: Any, count: LaunchCount) -> None:
        self._kernel, self._count = kernel, count

    def __getitem__(self, _grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        self._count.launched(self._kernel, args, kwargs)
        if self._kernel.fn.__name__ == "_project":
            with self._count.paused():
                args[0].zero_()


class _CountedFence:
    def __init__(self, count: LaunchCount) -> None:
        self._count = count

    def synchronize(self) -> None:
        self._count.waited("Fence.synchronize")


@contextmanager
def as_on_a_gpu(
    count: LaunchCount, graphs: Graphs | None = None, norm: Callable[..., torch.Tensor] | None = None
) -> Iterator[None]:
    """Within the context weights on the CPU are added to by the GPU's kernels, which count and do nothing.

    `graphs` records blocks; default: they run operator by operator. `norm` takes the fused norm's place; default: one
    that counts.
    """

    class Counted(CpuBackend):
        has_graphs = graphs is not None

        def record_graph(self, run: Callable[[], None], *, apart: bool) -> Callable[[], None]:
            assert graphs is not None
            return graphs(run)

        def record(self, stream: WorkStream) -> Fence:
            return _CountedFence(count) if stream is WorkStream.GPU else super().record(stream)

    def wide_product(left_DT: torch.Tensor, right_TE: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            wide: torch.Tensor = mm_float32(left_DT, right_TE)
            return wide
        if not count.is_watching:
            return torch.mm(left_DT, right_TE).float()
        count.operated("mm.dtype")
        with count.paused():
            return (left_DT @ right_TE).float()

    changes: list[tuple[ModuleType, dict[str, Any]]] = [
        (module, {name: _CountedKernel(kernel, count) for name, kernel in kernels().items() if name in vars(module)})
        for module in KERNELS
    ]
    changes += [(gpu_kernels, {"has_kernel": lambda _weight: True, "runs_on": lambda _device: True})]
    changes += [(cpu_kernels, {"has_kernel": lambda _weight: False}), (device_side, {"CpuBackend": Counted})]
    changes += _everywhere(is_launched, lambda _table: True) + _everywhere(product_float32, wide_product)
    changes += _everywhere(rms_norm, norm or partial(_counted_norm, count)) + _on_the_host(count)
    with _changed(changes):
        yield


@contextmanager
def _changed(changes: Sequence[tuple[ModuleType, Mapping[str, Any]]]) -> Iterator[None]:
    """Within the context modules have other names in place of theirs."""
    before = [(module, {name: vars(module)[name] for name in names}) for module, names in changes]
    try:
        for module, names in changes:
            vars(module).update(names)
        yield
    finally:
        for module, names in before:
            vars(module).update(names)


def _counted_norm(
    count: LaunchCount, input_TN: torch.Tensor, shape: Sequence[int], weight_N: torch.Tensor, eps: float
) -> torch.Tensor:
    """The kernel that a CPU does not have: one launch, and two of its gradients (ATen's sources)."""
    if torch.compiler.is_compiling():
        return rms_norm(input_TN, shape, weight_N, eps)

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, input_TN: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(input_TN, weight_N)
            count.operated("_fused_rms_norm")
            with count.paused():
                return rms_norm(input_TN, shape, weight_N, eps)

        @staticmethod
        def backward(ctx: Any, grad_TN: torch.Tensor) -> tuple[torch.Tensor, ...]:
            count.operated("_fused_rms_norm_backward", 2)
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with count.paused(), torch.enable_grad():
                return torch.autograd.grad(rms_norm(inputs[0], shape, inputs[1], eps), inputs, grad_TN)

    normed: torch.Tensor = Norm.apply(input_TN, weight_N)  # type: ignore[no-untyped-call]
    return normed


def _on_the_host(count: LaunchCount) -> list[tuple[ModuleType, dict[str, Any]]]:
    """What tells a batch's targets and tokens, wherever it is known, uncounted: the batch is on the host there."""

    def uncounted(function: Callable[[Batch], int]) -> Callable[[Batch], int]:
        def called(batch: Batch) -> int:
            with count.paused():
                return function(batch)

        return called

    return [change for told in (num_targets, num_tokens) for change in _everywhere(told, uncounted(told))]


def _everywhere(function: object, other: object) -> list[tuple[ModuleType, dict[str, Any]]]:
    """Another one in a function's place, wherever it is known."""
    ours = [module for name, module in sys.modules.items() if name.startswith("lsp_ray.")]
    return [
        (module, {name: other}) for module in ours for name, value in list(vars(module).items()) if value is function
    ]


def kernels() -> dict[str, Any]:
    """The kernels that are launched, by name; what they call is compiled with them."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from triton.runtime import JITFunction

    compiled = {
        name: value for module in KERNELS for name, value in vars(module).items() if isinstance(value, JITFunction)
    }
    bodies = [value.src.split("):", 1)[1] for value in compiled.values()]
    used = {name for name in compiled if any(re.search(rf"\b{name}\b", body) for body in bodies)}
    return {name: value for name, value in compiled.items() if name not in used}


def counted(method: str, num_layers: int, **options: Any) -> LaunchCount:
    """Run some steps of a small model and count; options are a RunConfig's."""
    tiny = SIZES["tiny"]
    shape = {**tiny.shape, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": num_layers}
    size = replace(tiny, shape=shape, gradient_checkpointing=False)
    count = LaunchCount()
    with tempfile.TemporaryDirectory() as folder:
        made = write_folder(Path(folder) / "model", size)
        if method == "hf":
            _plain_steps(made, size, count)
        else:
            is_compiled = method == "lsp_compiled"
            setting = Setting(size="tiny", name="lsp" if is_compiled else method, dim=64)
            phases = [Phase(num_steps=WARM_UP), Phase(num_steps=COUNTED, watch=count)]
            with as_on_a_gpu(count), compiled(count) if is_compiled else nullcontext():
                options |= {"torch_compile": is_compiled}
                run_ours(setting, size, made, CPU, phases, **options)
    return count


@contextmanager
def compiled(count: LaunchCount) -> Iterator[None]:
    """Within `as_on_a_gpu`, blocks that are to be compiled count as what torch's compiler would launch of them."""

    def ran(launches: Mapping[str, int]) -> None:
        for name, number in launches.items():
            count.operated(name, number)

    def unwatched(compiled: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with count.paused():
                return compiled(*args, **kwargs)

        return run

    class Counted(CompiledBlocks):
        def __init__(self, layers: Sequence[Layer], device: torch.device) -> None:
            super().__init__(layers, device, CountingBackend(ran, count.paused, LAUNCHES))
            for block in self._blocks:
                block._compiled = unwatched(block._compiled)

    changes = _everywhere(CompiledBlocks, Counted)
    is_watched = compiled_blocks._is_watched
    with _changed([*changes, (compiled_blocks, {"_is_watched": lambda: is_watched() and not count.is_watching})]):
        yield


def _plain_steps(folder: Path, size: Size, count: LaunchCount) -> None:
    """Transformers' forward, its backward and torch's fused AdamW."""
    model = random_model(folder, torch.bfloat16, CPU)
    find_layers(model)  # freezes the embeddings, as all that we compare with
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    rows = random_examples(size)[: size.batch_size]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    for step in range(WARM_UP + COUNTED):
        if step == WARM_UP:
            count.start()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    count.stop()


def launches_of(few: LaunchCount, many: LaunchCount) -> dict[str, Any]:
    """`per_layer`, `fixed` and `syncs` of a step, and what they consist of, from the counts of NUM_LAYERS."""
    more = NUM_LAYERS[1] - NUM_LAYERS[0]
    names = sorted({*few.launches, *many.launches})
    by_layer = {name: (many.launches[name] - few.launches[name]) / more / COUNTED for name in names}
    outside = {name: few.launches[name] / COUNTED - NUM_LAYERS[0] * by_layer[name] for name in names}
    return {
        "per_layer": sum(by_layer.values()),
        "fixed": sum(outside.values()),
        "syncs": sum(few.syncs.values()) / COUNTED,
        "launches_per_layer": {name: number for name, number in by_layer.items() if number},
        "launches_fixed": {name: number for name, number in outside.items() if number},
        "syncs_of": {name: number / COUNTED for name, number in few.syncs.items() if number},
    }


def launched_variants(*, every: bool = True) -> dict[Variant, Any]:
    """Kernels as steps of a small model launch them; every variant also in float32 and where nothing is aligned."""
    found: dict[Variant, Any] = {}
    for method in ("lsp", "native"):
        found |= counted(method, 1).variants
        if every:
            found |= counted(method, 1, bf16=False).variants
            found |= {replace(variant, aligned=()): kernel for variant, kernel in found.items()}
    return found


def print_builds() -> int:
    """Build every kernel for every card, and say what it takes; returns 1 if one cannot be built."""
    if not has_assembler():
        print("error: there is no ptxas, which Triton's wheels for Linux bring", file=sys.stderr)
        return 2
    print("registers of a thread, + bytes of its stack (spilled), by compute capability")
    print(f"{'':<14}", *(f"{capability:>6}" for capability in CAPABILITIES), "pointers")
    for variant, kernel in launched_variants().items():
        builds = [built(kernel, variant, capability) for capability in CAPABILITIES]
        shown = [f"{build.registers}" + (f"+{build.stack_bytes}" if build.stack_bytes else "") for build in builds]
        types = variant.types if variant.aligned else f"{variant.types}, not aligned"
        print(f"{variant.kernel:<14}", *(f"{figure:>6}" for figure in shown), types, flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python scripts/launches.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="Also write the counts there.")
    parser.add_argument("--kernels", action="store_true", help="Build every kernel for every card, and count nothing.")
    options = parser.parse_args(argv)
    if not kernels():
        print("error: Triton is not installed, so that there are no kernels to count", file=sys.stderr)
        return 2
    return print_builds() if options.kernels else print_launches(options.json)


def print_launches(json_path: Path | None) -> int:
    """Count every method's launches, and write them down as well if there is a path; returns 0."""
    print(f"{'':<8} {'per layer':>9} {'fixed':>6} {'syncs':>6}")
    found = {}
    for method in METHODS:
        found[method] = launches = launches_of(*(counted(method, num_layers) for num_layers in NUM_LAYERS))
        print(
            f"{method:<8} {launches['per_layer']:>9.1f} {launches['fixed']:>6.1f} {launches['syncs']:>6.1f}", flush=True
        )
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
