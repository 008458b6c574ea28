"""Compiled blocks: the gradients of the same blocks operator by operator, few graphs, hooks outside of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import lookup_backend

from lsp_ray.config import RunConfig, RuntimeConfig
from lsp_ray.device.compiled_blocks import CompiledBlocks, check_compiler
from lsp_ray.device.fused_norms import fuse_norms
from lsp_ray.device.projected_linear import BiasProbe, ProjectedLinear
from lsp_ray.errors import ConfigError
from scripts.launches import LaunchCount, as_on_a_gpu
from tests.test_block_graphs import NUM_BLOCKS, NUM_STEPS, Run, batch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler

CPU = torch.device("cpu")
Graph = Callable[..., Any]
MOST_GRAPHS = 3  # of a run: for the first size of a batch, for all others, and one to spare
ROUNDING = 1e-5  # of float32 weights, losses and norms of size 1, after some steps at a learning rate of 1e-2


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What other tests compiled, and what these did."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A backend of torch.compile that counts graphs, and how often their forwards run."""

    def __init__(self, name: str = "aot_eager") -> None:
        self.num_graphs = self.num_calls = 0
        self._backend = lookup_backend(name)

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Graph:
        self.num_graphs += 1
        compiled = self._backend(module, inputs)

        def called(*args: Any) -> Any:
            self.num_calls += 1
            return compiled(*args)

        return called


def compiled_run(backend: str | Callable[..., Any], **options: Any) -> tuple[Run, CompiledBlocks]:
    run = Run(recorded=False, **options)
    return run, CompiledBlocks(run.layers, CPU, backend)


def assert_equal_within_rounding(ours: Run, theirs: Run, accumulation: int, steps: int) -> None:
    found, expected = (run.train(accumulation, steps) for run in (ours, theirs))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=ROUNDING, atol=ROUNDING)
    weights = theirs.weights()
    for name, tensor in ours.weights().items():
        torch.testing.assert_close(tensor, weights[name], rtol=ROUNDING, atol=ROUNDING, msg=name)


@pytest.mark.parametrize(
    ("method", "accumulation", "checkpointed", "renews"),
    [
        ("lsp", 1, False, True),
        ("lsp", 2, True, False),
        ("apart", 2, True, False),
        ("native", 1, True, False),
        ("native", 2, False, False),
    ],
)
def test_compiled_blocks_train_as_their_operators_do_in_few_graphs(
    method: str, accumulation: int, checkpointed: bool, renews: bool
) -> None:
    steps = NUM_STEPS if renews else 3
    backend = Counting()
    options: dict[str, Any] = {"method": method, "checkpointed": checkpointed, "renews": renews}
    if method == "apart":
        options |= {"method": "lsp", "delta": "apart"}
    ours, blocks = compiled_run(backend, **options)
    theirs = Run(recorded=False, **options)
    assert_equal_within_rounding(ours, theirs, accumulation, steps)
    assert 1 <= backend.num_graphs <= MOST_GRAPHS
    if not renews:  # else some steps are observed
        forwards = (1 + checkpointed) * accumulation * NUM_BLOCKS
        assert backend.num_calls == forwards * (steps - 1)  # memory is measured over one step
    blocks.close()
    assert all("forward" not in vars(unit.readers[0]) for unit in ours.loop.worker.units)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_inductors_blocks_train_as_their_operators_do() -> None:
    backend = Counting("inductor")
    ours, _ = compiled_run(backend)
    assert_equal_within_rounding(ours, Run(recorded=False), accumulation=1, steps=1)
    assert (backend.num_graphs, backend.num_calls) == (1, NUM_BLOCKS)


def test_blocks_that_are_observed_and_those_without_gradients_run_operator_by_operator() -> None:
    backend = Counting()
    run, _ = compiled_run(backend)
    with torch.no_grad():
        run.model(**batch(0, 8))
    for module in run.model.modules():
        if isinstance(module, ProjectedLinear):
            module.probe = BiasProbe()
    run.model(**batch(0, 8))
    assert backend.num_calls == 0


def test_blocks_share_one_graph_where_linears_are_joined_and_norms_fused() -> None:
    backend = Counting()
    with as_on_a_gpu(LaunchCount()):
        run, _ = compiled_run(backend)
        assert fuse_norms(run.model) == 2 * NUM_BLOCKS + 1
        run.model(**batch(0, 8), use_cache=False).loss.backward()
    assert (backend.num_graphs, backend.num_calls) == (1, NUM_BLOCKS)
    assert all(target.leaf.grad is not None for unit in run.loop.worker.units for target in unit.targets)


def test_a_block_that_cannot_be_compiled_is_named_in_one_line() -> None:
    def fails(_module: torch.fx.GraphModule, _inputs: Sequence[torch.Tensor]) -> Graph:
        raise NotImplementedError("no such operator\nmore")

    run, _ = compiled_run(fails)
    message = r"^torch_compile must be false .*: model\.layers\.0 cannot be compiled, got True; NotImplementedError: no"
    with pytest.raises(ConfigError, match=message) as raised:
        run.train(steps=1)
    assert "\n" not in str(raised.value)


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_compiler("cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^torch_compile must be false on a machine without a C\+\+ compiler"):
        check_compiler("cpu")


def test_compiled_blocks_and_graphs_are_one_or_the_other() -> None:
    assert RunConfig().uses_graphs
    assert not RunConfig(torch_compile=True).uses_graphs
    assert not RunConfig(torch_compile=True, runtime=RuntimeConfig(cuda_graphs=False)).uses_graphs
    with pytest.raises(
        ConfigError, match=r"^runtime\.cuda_graphs must be false or left out with torch_compile, got True$"
    ):
        RunConfig(torch_compile=True, runtime=RuntimeConfig(cuda_graphs=True))
