from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lsp_ray.errors import ConfigError
from lsp_ray.methods.lsp import projector_sizes
from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_model, load_skeleton, load_tokenizer
from lsp_ray.models.loss import num_targets, summed_loss
from lsp_ray.models.save import save_model
from lsp_ray.projection.projector_file import load_projectors
from lsp_ray.runtime.drive.event_log import MAX_STEPS, EventLog, read_event_log
from lsp_ray.schedule.delta_room import DeltaRoom
from lsp_ray.schedule.ops import DeltaDue, GradientReady
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.trace_file import read_trace
from tests.tiny import CLASSIFIERS, Family
from tests.tiny_jobs import assert_same_bits, run_on_threads, saved_weights, tiny_job, weights_after


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma", "opt", "mistral", "bert", "roberta"])
def test_every_family_learns_and_its_checkpoint_is_one_that_transformers_loads(tmp_path: Path, family: Family) -> None:
    job = tiny_job(tmp_path, family, max_steps=30, learning_rate=5e-3)
    summary, _ = run_on_threads(job, tmp_path / "out")
    assert summary.eval_loss_after < 0.9 * summary.eval_loss_before
    auto = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"
    batches = job.micro_batches.eval_batches()
    with torch.no_grad():
        total = sum(float(summed_loss(model, batch)) for batch in batches)
    assert total / sum(map(num_targets, batches)) == pytest.approx(summary.eval_loss_after, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "bf16", "payload_dtype"),
    [
        ("lsp", False, "bfloat16"),
        ("lsp", True, "int8"),
        ("zero_offload", False, "int8"),
        ("zero_offload", True, "float32"),
    ],
)
def test_neither_shards_nor_policy_change_a_bit(tmp_path: Path, method: str, bf16: bool, payload_dtype: str) -> None:
    runtime: dict[str, Any] = {"policy": "layerwise", "payload_dtype": payload_dtype}
    base = weights_after(tmp_path, "one", method=method, bf16=bf16, runtime=runtime)
    for shards, policy in ((1, "sequential"), (2, "layerwise"), (3, "layerwise_fcfs"), (2, "earliest_deadline")):
        runtime |= {"num_shards": shards, "policy": policy}
        name = f"{shards}-{policy}"
        assert_same_bits(base, weights_after(tmp_path, name, method=method, bf16=bf16, runtime=runtime))


def test_delayed_updates_neither_depend_on_shards_nor_equal_those_in_time_and_that_is_said(tmp_path: Path) -> None:
    notes = []
    for name, shards in (("one", 1), ("two", 2)):
        job = tiny_job(tmp_path, runtime={"policy": "delayed", "num_shards": shards}, **REFITS)
        _, listener = run_on_threads(job, tmp_path / name)
        notes += listener.notes
    one, two = (saved_weights(job, tmp_path / name) for name in ("one", "two"))
    assert_same_bits(one, two)
    in_time = weights_after(tmp_path, "in time", **REFITS)
    assert any(not torch.equal(tensor, in_time[name]) for name, tensor in one.items())
    assert notes.count("policy delayed: every update is added 1 step late, which changes losses") == 2


def test_native_and_zero_offload_end_with_the_same_weights(tmp_path: Path) -> None:
    native = weights_after(tmp_path, "native", method="native", weight_decay=0.1)
    runtime = {"payload_dtype": "float32"}
    zero = weights_after(tmp_path, "zero", method="zero_offload", weight_decay=0.1, runtime=runtime)
    assert_same_bits(native, zero)


@pytest.mark.parametrize("method", ["lsp", "zero_offload"])
def test_a_coarse_payload_trains_as_well_as_an_exact_one(tmp_path: Path, method: str) -> None:
    losses = {}
    for payload_dtype in ("float32", "bfloat16", "int8"):
        runtime = {"payload_dtype": payload_dtype}
        job = tiny_job(tmp_path, method=method, max_steps=30, runtime=runtime)
        losses[payload_dtype] = run_on_threads(job, tmp_path / payload_dtype)[0].eval_loss_after
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.005)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.005)


def test_gradient_checkpointing_changes_no_weight(tmp_path: Path) -> None:
    plain = weights_after(tmp_path, "plain")
    assert_same_bits(plain, weights_after(tmp_path, "recomputed", gradient_checkpointing=True))


def test_accumulation_equals_one_larger_batch(tmp_path: Path) -> None:
    # calibration micro-batches would be of another size; gradients in bfloat16 differ where sums round differently
    random = {"max_steps": 3, "lsp": {"fit": "random"}, "runtime": {"payload_dtype": "float32"}}
    large = weights_after(tmp_path, "large", per_device_train_batch_size=4, **random)
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    small = weights_after(tmp_path, "small", **halves, **random)
    for name, tensor in large.items():
        assert float((tensor - small[name]).norm() / tensor.norm()) <= 1e-6, name


def test_a_recorded_run_replays_to_the_same_actions(tmp_path: Path) -> None:
    for name in POLICIES:
        job = tiny_job(tmp_path, runtime={"policy": name, "num_shards": 2})
        run_on_threads(job, tmp_path / name)
        policy, decisions = read_event_log(tmp_path / name / "internals" / "events.jsonl")
        replayed = [(policy.handle(decision.event), decision.actions) for decision in decisions]
        num_told = 3  # of costs: after 1, 2 and 4 of the 6 steps
        assert len(replayed) == 4 * job.num_steps * len(job.payload_sizes) + num_told
        assert all(ours == logged for ours, logged in replayed)


@pytest.mark.parametrize("name", ["layerwise_fcfs", "sequential", "delayed"])
def test_little_room_for_deltas_changes_no_bit_and_pauses_for_checkpoints_as_ever(tmp_path: Path, name: str) -> None:
    free = tiny_job(tmp_path, method="zero_offload", save_steps=2, runtime={"policy": name, "num_shards": 2})
    sizes = tuple(2 * size for size in free.payload_sizes)
    bounded = replace(free, delta_room=DeltaRoom(sizes=sizes, num_bytes=2 * max(sizes)))
    assert free.delta_room is None
    for job, folder in ((free, tmp_path / "free"), (bounded, tmp_path / "bounded")):
        run_on_threads(job, folder)
    assert_same_bits(*(saved_weights(free, tmp_path / folder) for folder in ("free", "bounded")))
    policy, decisions = read_event_log(tmp_path / "bounded" / "internals" / "events.jsonl")
    told = list(decisions)
    assert policy.room == bounded.delta_room
    assert all(policy.handle(decision.event) == decision.actions for decision in told)
    due = {decision.event for decision in told if isinstance(decision.event, DeltaDue)}
    assert due >= {DeltaDue(step=step, layer=layer) for step in range(4) for layer in range(len(sizes))}


def test_a_run_leaves_the_files_and_keys_it_promises(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=3, gradient_accumulation_steps=2)
    summary, listener = run_on_threads(job, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines == [asdict(metrics) for metrics in listener.steps]
    assert set(lines[0]) == {
        *("step", "loss", "grad_norm", "grad_scale", "learning_rate", "num_tokens", "tokens_per_second", "step_time_s"),
        *("gpu_busy_s", "d2h_busy_s", "cpu_busy_s", "h2d_busy_s"),
        *("exposed_d2h_s", "exposed_cpu_s", "exposed_h2d_s", "bytes_d2h", "bytes_h2d"),
        *(
            "bias",
            "bias_by_layer",
            "num_refitted",
            "eval_loss",
            "exposed_peers_s",
            "exposed_weights_s",
            "exposed_activations_s",
        ),
        "computed_s_by_gpu",
    }
    for line in lines:
        assert line["bytes_d2h"] == line["bytes_h2d"] == job.bytes_each_way == 2 * sum(job.payload_sizes)
        busy_and_exposed = line["gpu_busy_s"] + line["exposed_d2h_s"] + line["exposed_cpu_s"] + line["exposed_h2d_s"]
        assert busy_and_exposed == pytest.approx(line["step_time_s"])
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written == asdict(summary)
    assert set(written) == {
        *("method", "policy", "device", "num_shards", "eval_loss_before", "eval_loss_after", "step_time_s_median"),
        *("eval_before", "eval_after"),
        *("tokens_per_second", "overlap_fraction", "peak_device_bytes", "bytes_d2h_per_step", "bytes_h2d_per_step"),
        *("sample_before", "sample_after", "sample_expected", "duration_s", "num_steps", "best_step"),
        *("model", "dataset", "num_train_examples", "num_eval_examples"),
        *("emulated_compute_s", "num_clipped", "num_skipped"),
    }
    assert (written["num_train_examples"], written["num_eval_examples"]) == (180, 20)
    assert written["peak_device_bytes"] > 0
    dims = json.loads((tmp_path / "out" / "internals" / "subspace_dims.json").read_text())
    assert {name: tuple(sides) for name, sides in dims.items()} == job.subspace_dims
    weights = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert weights == {"model.safetensors"}  # loaders take every such file for a part of the model
    assert 0 <= written["overlap_fraction"] <= 1


def test_a_runs_trace_holds_every_layers_work_on_every_stream_once_a_step(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=4, runtime={"num_shards": 2, "policy": "sequential"})
    _, listener = run_on_threads(job, tmp_path / "out")
    trace = read_trace(tmp_path / "out" / "internals" / "trace.json")
    found = Counter((span.category, span.step, span.layer) for span in trace.spans if span.category != "wait")
    layers = range(len(job.payload_sizes))
    once = [
        (name, step, layer)
        for name in ("forward", "backward", "d2h", "cpu", "h2d")
        for step in range(4)
        for layer in layers
    ]
    assert found == Counter(once) + Counter(("apply", step, layer) for step in (1, 2, 3) for layer in layers)
    for metrics in listener.steps:
        first_s, last_s = trace.steps[metrics.step - 1]
        assert last_s - first_s == pytest.approx(metrics.step_time_s, abs=1e-5)
        waits = [span for span in trace.spans if span.category == "wait" and first_s <= span.start_s < last_s]
        assert sum(span.end_s - span.start_s for span in waits) == pytest.approx(metrics.exposed_s, abs=1e-5)


def test_the_gradient_norm_is_the_same_wherever_the_update_runs(tmp_path: Path) -> None:
    _, native = run_on_threads(tiny_job(tmp_path, method="native"), tmp_path / "native")
    job = tiny_job(tmp_path, method="zero_offload", runtime={"payload_dtype": "float32"})
    _, offloaded = run_on_threads(job, tmp_path / "zero")
    norms = [[metrics.grad_norm for metrics in listener.steps] for listener in (native, offloaded)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert all(norm > 0 for norm in norms[0])


REFITS: dict[str, Any] = {"max_steps": 24, "lsp": {"check_every": 6, "max_bias": 0.0, "calibration_batches": 2}}


def test_refits_are_measured_reported_and_take_over(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, **REFITS)
    _, listener = run_on_threads(job, tmp_path / "out")
    measured = {metrics.step: metrics for metrics in listener.steps if metrics.bias is not None}
    assert list(measured) == [7, 13, 19]  # steps 6, 12, 18, counted from 1 in the metrics
    for metrics in measured.values():
        assert metrics.bias is not None
        assert 0 < metrics.bias <= 1
        assert metrics.num_refitted in (1, 2, 3)  # one of 8 groups: q, k and v; o; gate and up; or down
        assert metrics.bias_by_layer is not None
        assert metrics.bias_by_layer in [{str(unit): metrics.bias} for unit in range(len(job.payload_sizes))]
    layers = find_layers(load_skeleton(job.model_folder, task="causal_lm"))
    shapes = projector_sizes(layers, job.config.lsp)
    before, after = (load_projectors(folder, shapes) for folder in (_unrefitted(tmp_path), tmp_path / "out"))
    changed = [name for name in before if not torch.equal(before[name].left.dense(), after[name].left.dense())]
    refitted = [metrics.num_refitted or 0 for metrics in measured.values()]
    assert max(refitted) <= len(changed) <= sum(refitted)  # the same group may be drawn twice


def _unrefitted(folder: Path) -> Path:
    run_on_threads(tiny_job(folder, max_steps=1), folder / "unrefitted")
    return folder / "unrefitted"


def test_with_refits_neither_shards_nor_policy_change_a_bit(tmp_path: Path) -> None:
    base = weights_after(tmp_path, "one", **REFITS)
    other = weights_after(tmp_path, "two", runtime={"num_shards": 2, "policy": "sequential"}, **REFITS)
    assert_same_bits(base, other)


@pytest.mark.parametrize("balance", [True, False], ids=["balanced", "plain"])
def test_refits_make_no_jump_in_the_loss_curve(tmp_path: Path, balance: bool) -> None:
    changes: dict[str, Any] = {"max_steps": 30, "learning_rate": 3e-4}  # at higher rates a single batch jumps by itself
    refits = {"check_every": 6, "max_bias": 0.0, "balance": balance}
    _, refitted = run_on_threads(tiny_job(tmp_path, **changes, lsp=refits), tmp_path / "refitted")
    _, never = run_on_threads(
        tiny_job(tmp_path, **changes, lsp={"check_every": 0, "balance": balance}), tmp_path / "never"
    )
    assert sum(metrics.num_refitted or 0 for metrics in refitted.steps) > 0
    ratios = [ours.loss / theirs.loss for ours, theirs in zip(refitted.steps, never.steps, strict=True)]
    assert max(ratios) <= 1.02
    assert min(ratios) < 1  # new subspaces, and on this data they help


def test_a_bound_that_nothing_exceeds_changes_nothing(tmp_path: Path) -> None:
    never = weights_after(tmp_path, "never", max_steps=24, lsp={"check_every": 0})
    unexceeded = weights_after(tmp_path, "unexceeded", max_steps=24, lsp={"check_every": 6, "max_bias": 1.0})
    assert_same_bits(never, unexceeded)


def test_layers_without_a_gradient_keep_random_projectors_and_that_is_said_once(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=2)
    model = load_model(job.model_folder, dtype=torch.float32, task="causal_lm")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").get_parameter("weight").zero_()
    save_model(model, load_tokenizer(job.model_folder), job.model_folder)
    _, listener = run_on_threads(job, tmp_path / "out")
    said = [note for note in listener.notes if "random" in note]
    assert said == [
        "2 of 14 projectors stay random, as calibration gave their layers no gradient: "
        "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj"
    ]


def test_a_run_that_starts_from_anothers_projectors_trains_in_the_same_subspaces(tmp_path: Path) -> None:
    first = weights_after(tmp_path, "first")
    job = tiny_job(tmp_path, lsp={"init_from": str(tmp_path / "first")})
    _, listener = run_on_threads(job, tmp_path / "again")
    assert not [phase for phase in listener.phases if "projectors" in phase]
    assert_same_bits(first, saved_weights(job, tmp_path / "again"))


def test_the_projectors_of_another_model_are_refused_before_any_actor(tmp_path: Path) -> None:
    run_on_threads(tiny_job(tmp_path), tmp_path / "llama run")
    with pytest.raises(ConfigError, match=r"lsp\.init_from must hold transformer\.h\.0\..*; there it is missing"):
        tiny_job(tmp_path, "gpt2", lsp={"init_from": str(tmp_path / "llama run")})


def test_an_event_log_ends_before_its_first_event_past_the_last_step_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("w", encoding="utf-8") as file:
        log = EventLog(file, "delayed", [0, 0], POLICIES["delayed"]([0, 0]))
        for step in (MAX_STEPS - 1, MAX_STEPS, MAX_STEPS - 1):
            log.write(GradientReady(step=step, layer=0), [])
    _, decisions = read_event_log(path)
    assert [decision.event for decision in decisions] == [GradientReady(step=MAX_STEPS - 1, layer=0)]
