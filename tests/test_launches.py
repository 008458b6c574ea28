"""scripts/launches.py: what a step launches on a GPU does not grow, and every kernel can be built for every card."""

from __future__ import annotations

import pytest
import torch

from lsp_ray.device.unit import copy_parts
from scripts.gpu_bench_parts.builds import CAPABILITIES, built, has_assembler, variant_of
from scripts.launches import NUM_LAYERS, LaunchCount, counted, kernels, launches_of

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler

# launches a layer, launches outside of the layers, waits of the host: lower them as they fall; the loss launches 23
# for each piece of the vocabulary, of which there is one here
MOST = {
    "lsp": (75, 68, 1),
    "lsp_compiled": (51, 69, 1),
    "native": (75, 69, 1),
    "hf": (111, 42, 1),
}


@pytest.fixture(scope="module")
def counts() -> dict[str, tuple[LaunchCount, LaunchCount]]:
    few, many = NUM_LAYERS
    return {method: (counted(method, few), counted(method, many)) for method in MOST}


@pytest.mark.parametrize("method", MOST)
def test_launches_and_waits_of_a_step_do_not_grow(
    counts: dict[str, tuple[LaunchCount, LaunchCount]], method: str
) -> None:
    found = launches_of(*counts[method])
    numbers = tuple(found[name] for name in ("per_layer", "fixed", "syncs"))
    assert all(number > 0 for number in numbers)
    assert all(number <= most for number, most in zip(numbers, MOST[method], strict=True)), found


def test_a_layer_of_lsp_launches_no_more_than_one_of_native(counts: dict[str, tuple[LaunchCount, LaunchCount]]) -> None:
    lsp, native = (launches_of(*counts[method])["per_layer"] for method in ("lsp", "native"))
    assert lsp <= native


@pytest.mark.skipif(not has_assembler(), reason="ptxas is not there")
def test_every_kernel_is_launched_and_builds_for_every_card(
    counts: dict[str, tuple[LaunchCount, LaunchCount]],
) -> None:
    launched = {
        variant.kernel: variant
        for method in ("lsp", "native")
        for count in counts[method]
        for variant in count.variants
    }
    assert set(launched) == set(kernels())
    for name, variant in launched.items():
        for capability in CAPABILITIES:
            build = built(kernels()[name], variant, capability)
            assert 0 < build.registers <= 255, (name, capability)
            assert build.stack_bytes == 0, (name, capability)


def test_operators_count_as_launches_but_for_views_and_allocations() -> None:
    count, table = LaunchCount(), torch.ones(4, 4)
    count.start()
    table.view(-1).split(2)
    torch.empty_like(table)
    assert not count.launches
    assert float((table.t() @ table)[0, 0]) == 4.0
    count.stop()
    assert float(table.sum()) == 16.0
    assert (dict(count.launches), dict(count.syncs)) == ({"mm": 1}, {"_local_scalar_dense": 1})


def test_joining_other_types_is_a_launch_for_each_and_copying_them_one_for_all() -> None:
    count, parts = LaunchCount(), [torch.ones(3, dtype=torch.bfloat16) for _ in range(4)]
    joined = torch.empty(12)
    count.start()
    torch.cat(parts, out=joined)
    copy_parts(joined.split(3), parts)
    torch.cat(parts)
    count.stop()
    assert dict(count.launches) == {"cat": 5, "_foreach_copy_": 1}


def test_indexing_by_booleans_makes_the_host_wait() -> None:
    count, table = LaunchCount(), torch.ones(4)
    count.start()
    table[torch.tensor([0, 1])]
    assert not count.syncs
    table[table > 0]
    count.stop()
    assert dict(count.syncs) == {"index by booleans": 1}


def test_a_variant_has_the_types_of_a_launch() -> None:
    kernel = kernels()["_add"]
    table, block = torch.zeros(32, dtype=torch.int64), torch.zeros(32, dtype=torch.int16)
    args = (table, torch.zeros(32, dtype=torch.bfloat16), block, 48, 0.5, 1.0)
    constants = dict.fromkeys(("WEIGHTS", "FIELDS", "SIZE", "ROWS", "COLUMNS", "WEIGHT", "VECTOR", "NNZ"), 64)
    variant = variant_of(kernel, args, constants | {"FACTOR": 1, "HAS_ROWS": True, "enable_fp_fusion": False})
    assert variant.types == "*i64 *bf16 *i16"
    assert dict(variant.signature)["keep"] == "fp32"
    assert dict(variant.constants) == {**dict.fromkeys(range(6, 14), 64), 14: 1, 15: True}
    assert 3 not in variant.aligned  # the state of the noise is any number
    assert 1 in variant.aligned
    assert variant.options == (("enable_fp_fusion", False),)
