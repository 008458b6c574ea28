"""The paper's figures: golden values of the simulator, and the order that they must keep."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lsp_ray.config import Method, PolicyName
from lsp_ray.hardware import MACHINES, EmulatedMachine
from lsp_ray.sim.cost_model import CostModel
from lsp_ray.sim.forecast import forecast
from lsp_ray.sim.hardware_profile import hardware_names, load_hardware
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.workload import Workload
from scripts.sim_paper import llama, main, paper_figures

GOLDEN = {
    "gpt2-774m: zero, slowdown": 1.6389,
    "gpt2-774m: zero, s": 2.6664,
    "gpt2-774m: lsp (512, 16), s": 1.7199,
    "1.3b: zero, slowdown": 3.7060,
    "llama-3b: zero, slowdown": 1.9778,
    "llama-3b: zero, s": 2.9546,
    "llama-3b: lsp (512, 16), s": 1.5692,
    "llama-7b: zero, slowdown": 3.4458,
    "llama-7b: layer-wise zero, throughput over zero": 2.1417,
    "6.7b: compute, s": 1.6335,
    "6.7b: zero, s": 4.5607,
    "6.7b: lsp (2048, 8), s": 1.7480,
    "6.7b: lsp (256, 8) over native": 1.0182,
    "6.7b: lsp (512, 8) over native": 1.0213,
}
OFF_BY_MORE_THAN_A_FIFTH = {"llama-7b: layer-wise zero, throughput over zero"}


def test_simulated_figures_are_what_they_were() -> None:
    assert {name: figure.simulated for name, figure in paper_figures().items()} == pytest.approx(GOLDEN, abs=5e-4)


def test_all_figures_but_one_are_within_a_fifth_of_the_papers() -> None:
    figures = paper_figures()
    assert {name for name, figure in figures.items() if abs(figure.error) > 0.2} == OFF_BY_MORE_THAN_A_FIFTH


@pytest.mark.parametrize(
    ("name", "model", "pinned"),
    [
        ("rtx4090-threadripper", llama(4096, 11008, 32, 32000), True),
        ("a1000-laptop", llama(2048, 5504, 24, 32256), False),
    ],
)
def test_a_profile_has_the_proportion_of_traffic_to_update_that_its_emulation_has(
    name: EmulatedMachine, model: ModelShape, pinned: bool
) -> None:
    work = Workload(
        method="zero_offload",
        batch_size=1,
        seq_length=8,
        shard_threads=12,
        pinned=pinned,
        plain_updates=True,
    )
    layers = CostModel(model=model, workload=work, hardware=load_hardware(name)).step().layers
    traffic_s, update_s = sum(layer.d2h_s + layer.h2d_s for layer in layers), sum(layer.cpu_s for layer in layers)
    emulated = MACHINES[name].traffic_over_compute / MACHINES[name].update_over_compute
    # the paper's 14 GB count embeddings, which are 4 % and frozen here; its seconds have two digits
    assert traffic_s / update_s == pytest.approx(emulated, rel=0.1)


@pytest.mark.parametrize("name", hardware_names())
def test_native_is_faster_than_the_papers_lsp_and_that_faster_than_zero_layer_by_layer_and_in_sequence(
    name: str,
) -> None:
    # the paper's native updates in 1 ms a layer: its step is the compute alone, all but 2 %
    runs: list[tuple[Method, PolicyName | None]] = [
        ("native", None),
        ("lsp", "layerwise"),
        ("zero_offload", "layerwise"),
        ("zero_offload", "sequential"),
    ]
    machine, model = load_hardware(name), llama(2048, 5504, 24, 32256)
    work = Workload(method="native", batch_size=1, seq_length=256, shard_threads=machine.num_cores, full_gradient=True)
    steps_s = [forecast(model, replace(work, method=method), machine, policy).step_s for method, policy in runs]
    updates = CostModel(model=model, workload=work, hardware=machine).step().layers
    steps_s[0] -= sum(layer.update_s for layer in updates)
    assert steps_s == sorted(steps_s)


def test_the_script_prints_a_row_for_each_figure(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(paper_figures())
