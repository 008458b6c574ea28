"""What scripts/bench.py makes of its readings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lsp_ray.config import GaloreConfig, LoraConfig, LspConfig, RunConfig
from lsp_ray.data.stdlib_docstrings import DocstringPair
from lsp_ray.methods.galore import GaloreShard
from lsp_ray.methods.lora import add_adapters
from lsp_ray.methods.lsp import lsp_units
from lsp_ray.methods.units import full_units
from lsp_ray.models.layers import find_layers
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.run import parse
from scripts.bench import Bench
from scripts.method_bench import bars, page
from scripts.method_bench.memory import TOLERANCE, bytes_by_part, equal_ranks, kept_bytes, shapes_in
from scripts.method_bench.ours import Outcome, Setting
from scripts.method_bench.plot import draw
from scripts.method_bench.readings import DEFAULT_MODEL, Readings, Timed, processor
from scripts.method_bench.tasks import METHODS, Task, options_of, tasks, write_pairs
from tests.tiny import tiny_model

TEXT = Task(name="text", model="m", kind="causal_lm", score="perplexity", num_steps=4, options={})
MOOD = Task(name="mood", model="m", kind="sequence_classification", score="accuracy", num_steps=4, options={})
FOUND = {"text": TEXT, "mood": MOOD}


def outcome(*eval_losses: float, step_s: float = 1.0, **scores: float) -> Outcome:
    """With a step before each eval loss but the first."""
    num_steps = len(eval_losses) - 1
    scores = {"loss": eval_losses[-1], **scores}
    points = tuple(enumerate(eval_losses))
    return Outcome(step_s=(step_s,) * num_steps, losses=(3.0,) * num_steps, scores=scores, eval_losses=points)


def setting(task: str, method: str, **changes: Any) -> Setting:
    return replace(Setting(task=task, method=method, num_steps=4), **changes)


def put(readings: Readings, key: Setting | Timed, one: Outcome) -> None:
    readings.of(key, lambda: one)


def test_the_time_to_the_same_eval_loss_counts_seconds_not_steps() -> None:
    zero = outcome(4.0, 3.0, 2.0, step_s=10.0)
    assert bars.time_to_same_loss(outcome(4.0, 3.0, 2.5, 2.0, 1.0, step_s=2.0), zero) == pytest.approx(6.0 / 20.0)
    assert bars.time_to_same_loss(outcome(4.0, 3.0, 2.5), zero) == math.inf


@pytest.mark.parametrize(("plain", "emulated"), [(True, True), (True, False), (False, True)])
def test_panels_without_a_curve_are_left_out(tmp_path: Path, plain: bool, emulated: bool) -> None:
    curves = {"lsp": outcome(4.0, 3.0, 2.0)}
    widths = []
    for name, ours, slowed in (("some", curves if plain else {}, curves if emulated else {}), ("all", curves, curves)):
        assert draw(ours, slowed, "text", tmp_path / f"{name}.png")  # a warning would be an error here
        header = (tmp_path / f"{name}.png").read_bytes()[16:20]
        widths.append(int.from_bytes(header, "big"))
    assert round(3 * widths[0] / widths[1]) == 2 * plain + emulated


def test_seconds_on_another_processor_are_not_shown_beside_those_of_lsp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "methods.jsonl"
    for method in ("lsp", "native", "lora"):
        put(Readings(path), setting("text", method), outcome(4.0, 3.0, 2.0))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["processor"] = "another"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn: list[list[str]] = []

    def record(*_: Any, elsewhere: list[str]) -> bool:
        drawn.append(elsewhere)
        return True

    monkeypatch.setattr(page, "draw", record)
    page.write_page(Readings(path), {}, tmp_path / "methods.md")
    assert drawn == [["lora"]]
    assert "\nlora: on another processor, so without seconds.\n" in (tmp_path / "methods.md").read_text()


def test_the_rate_with_the_most_seeds_counts_and_so_do_the_longest_runs_alone() -> None:
    outcomes = {
        setting("mood", "lsp", seed=1): outcome(1.0, 0.5, accuracy=0.7),
        setting("mood", "lsp", seed=1, rate_factor=2.0): outcome(1.0, 0.4, accuracy=0.9),
        setting("mood", "lsp", seed=2, rate_factor=2.0): outcome(1.0, 0.6, accuracy=0.8),
        setting("mood", "lsp", seed=1, num_steps=2): outcome(1.0, 0.1, accuracy=1.0),
        setting("text", "native"): outcome(3.0, 2.0, perplexity=7.4),
    }
    readings = Readings(None)
    for key, one in outcomes.items():
        put(readings, key, one)
    readings.of(Timed(name="lsp", round=0, num_steps=3), lambda: outcome(3.0, 2.0, 2.0, 2.0))
    found = page.figures(readings, FOUND)
    assert found["eval_loss"]["mood"] == {"lsp": pytest.approx(0.5)}
    assert found["accuracy"] == {"mood": {"lsp": pytest.approx(0.85)}}
    assert found["step_seconds"] == {"lsp": 1.0}
    assert json.loads(json.dumps(found)) == found
    rows = page.scores_table(outcomes, FOUND)
    assert rows[1][:6] == ["mood", "lsp", "4", "2", "0.0002", "0.5 ± 0.14"]
    assert page.short_table(bars.grouped(outcomes), FOUND)[1:] == [
        ["mood", "eval accuracy", "–", "0.85 ± 0.071", "–", "–"],
        ["text", "eval loss", "2", "–", "–", "–"],
    ]
    assert page.markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_of_rates_run_with_as_many_seeds_the_one_that_is_best_on_average_counts() -> None:
    outcomes = {
        setting("mood", "native", seed=1): outcome(1.0, 0.5),
        setting("mood", "native", seed=2): outcome(1.0, 0.5),
        setting("mood", "native", seed=1, rate_factor=2.0): outcome(1.0, 0.4),  # best on the first seed
        setting("mood", "native", seed=2, rate_factor=2.0): outcome(1.0, 0.9),
        setting("mood", "native", seed=1, rate_factor=4.0): outcome(1.0, 0.1),  # on one seed alone
    }
    assert {chosen.rate_factor for chosen in bars.chosen(outcomes)["mood"]["native"]} == {1.0}


def test_bars_say_what_was_reached_what_was_missed_and_what_was_not_measured() -> None:
    emulated = {"emulate": bars.EMULATED}
    outcomes = {
        setting("text", "native"): outcome(3.0, 2.0),
        setting("text", "lsp"): outcome(3.0, 2.01),
        setting("text", "lora"): outcome(3.0, 2.1),
        setting("text", "galore"): outcome(3.0, 2.2),
        setting("mood", "lsp"): outcome(1.0, 0.5, accuracy=0.8),
        setting("mood", "lora"): outcome(1.0, 0.5, accuracy=0.9),
        setting("mood", "galore"): outcome(1.0, 0.5, accuracy=0.7),
        setting("text", "lsp", **emulated): outcome(3.0, 2.0, step_s=1.0),
        setting("text", "zero_offload", **emulated): outcome(3.0, 2.5, 2.0, step_s=2.0),
    }
    groups = bars.grouped(outcomes)
    step_s = {"lsp": 1.0, "hf_full": 1.0, "hf_lora": 2.0}
    time, won, behind, step = bars.all_bars({"here": step_s}, ("hf_full", "hf_lora", "deepspeed"), groups, FOUND)
    assert (time.value, time.verdict) == (0.25, "reached")
    assert (won.value, won.verdict) == (None, "not measured")
    assert behind.value == pytest.approx(0.005)
    assert behind.verdict == "reached"
    assert (step.value, step.verdict) == (1.0, "missed")
    assert [bar.verdict for bar in bars.all_bars({}, (), {}, FOUND)] == ["not measured"] * 4
    weak = bars.weak_points([time, won, behind, step], groups, FOUND)
    assert len(weak) == 2
    assert weak[0] == "text: LSP's loss is 0.5% worse than that of native (2.01 against 2)."
    assert weak[1] == "mood: LSP's accuracy is 11.1% worse than that of lora (0.8 against 0.9)."


def test_a_run_without_its_tasks_score_is_shown_by_its_perplexity() -> None:
    answers = replace(TEXT, score="answer_accuracy")
    readings = Readings(None)
    put(readings, setting("text", "lsp"), outcome(3.0, 2.0, perplexity=7.4, answer_accuracy=0.25))
    put(readings, setting("text", "lsp", emulate=bars.EMULATED), outcome(3.0, 2.0, perplexity=7.4))  # answers nothing
    assert page.figures(readings, {"text": answers})["accuracy"] == {"text": {"lsp": 0.25}}
    scores = {row[1]: row[6] for row in page.scores_table(readings.scored, {"text": answers})[1:]}
    assert scores == {"lsp": "answer_accuracy 0.25", f"lsp, as {bars.EMULATED}": "perplexity 7.4"}


@pytest.mark.parametrize(("num_won", "verdict"), [(3, "reached"), (2, "missed")])
def test_lsp_must_be_as_good_as_both_on_three_tasks_of_four(num_won: int, verdict: str) -> None:
    rivals = {"lora": [outcome(3.0, 2.0)], "galore": [outcome(3.0, 2.1)]}
    groups = {f"text{at}": {"lsp": [outcome(3.0, 2.0 if at < num_won else 2.05)], **rivals} for at in range(4)}
    found = bars.all_bars({}, (), groups, dict.fromkeys(groups, TEXT))
    (won,) = [bar for bar in found if bar.is_floor]
    assert (won.value, won.verdict) == (num_won, verdict)


def test_a_bench_goes_on_from_its_file_and_measures_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "methods.jsonl"
    timed = replace(outcome(2.0, 1.5, 1.0), note="with torch's AdamW", peak_bytes=7 * 10**8)
    measured: dict[Setting | Timed, Outcome] = {
        setting("mood", "lsp", seed=3): outcome(1.0, 0.5, accuracy=0.9),
        Timed(name="deepspeed", round=1, num_steps=2): timed,
    }
    readings = Readings(path)
    for key, one in measured.items():
        put(readings, key, one)
    again = Readings(path)
    assert {key: again.of(key, lambda: pytest.fail("it is there")) for key in measured} == measured
    assert [*again.scored, *again.timed] == list(measured)
    assert again.circumstances == readings.circumstances
    page.write_page(again, {}, tmp_path / "methods.md")
    text = (tmp_path / "methods.md").read_text()
    for line in ("| `deepspeed` | 1 | 0 | 0.70 GB | with torch's AdamW |", "## What does not work as well"):
        assert line in text


def test_steps_are_compared_with_those_of_the_same_machine_and_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "methods.jsonl"
    steps = {("lsp", ""): 4.0, ("hf_full", ""): 5.0, ("lsp", "large"): 0.2, ("hf_full", "large"): 0.1}
    for (name, model), step_s in steps.items():
        key = Timed(name=name, round=0, num_steps=1, model=f"models/{model}" if model else DEFAULT_MODEL)
        put(Readings(path), key, outcome(4.0, 3.0, step_s=step_s))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    on_gpu = []
    for row in rows[:2]:
        older = {name: row["key"][name] for name in ("name", "round", "num_steps")}  # a file of before has no more
        quicker = row["outcome"] | {"step_s": [row["outcome"]["step_s"][0] ** 2]}
        on_gpu.append(row | {"processor": "a GPU", "key": older, "outcome": quicker})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + on_gpu))
    readings = Readings(path)
    here, there, large = page.benches(readings.timed)
    assert here == f"smollm2-135m, 4 × at most 128 tokens of stdlib-docstrings, {processor()}"
    assert there == "smollm2-135m, 4 × at most 128 tokens of stdlib-docstrings, a GPU"
    assert large == here.replace("smollm2-135m", "large")
    unread = replace(TEXT, model="a model that is nowhere")  # nothing was scored, so nobody needs it
    page.write_page(readings, {"text": unread}, tmp_path / "methods.md")
    heads = [line for line in (tmp_path / "methods.md").read_text().splitlines() if line.startswith("## ")]
    assert heads == ["## Ratios", "## What does not work as well", "## Seconds a step"]
    assert f"- LSP's step over that of the fastest peer: {large}: 2." in " ".join(
        (tmp_path / "methods.md").read_text().split()
    )
    found = page.figures(readings, {})
    assert found["step_seconds"] == {"lsp": 4.0, "hf_full": 5.0}
    ratios = [(bar["what"], bar["value"], bar["verdict"]) for bar in found["bars"] if "fastest peer" in bar["what"]]
    what = "LSP's step over that of the fastest peer: "
    assert ratios == [
        (what + here, 0.8, "reached"),
        (what + there, 0.64, "reached"),
        (what + large, 2.0, "missed"),
    ]


def test_a_line_that_was_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "methods.jsonl"
    put(Readings(path), setting("mood", "lsp"), outcome(1.0, 0.5))
    path.write_text(path.read_text() + path.read_text()[:40])
    with pytest.raises(SystemExit, match=r"methods\.jsonl: line 2 is no reading"):
        Readings(path)


@pytest.mark.parametrize("reference", ["native", "lsp"])  # the latter where native was not timed
def test_a_peer_that_does_another_job_is_found_by_its_first_loss(reference: str) -> None:
    readings = Readings(None)
    for name, loss in {reference: 3.0, "hf_full": 3.005, "hf_lora": 3.012}.items():
        first = replace(outcome(4.0, 3.0), losses=(loss,))
        put(readings, Timed(name=name, round=0, num_steps=1), first)
    with pytest.raises(SystemExit, match=rf"hf_lora: its first loss is 3\.0120, {reference}'s 3\.0000"):
        Bench({}, readings, lambda: None).check_first_losses()


def test_bytes_by_part_are_those_of_the_methods_own_objects() -> None:
    model = tiny_model("bert")
    shapes, full = shapes_in(model), full_units(find_layers(model))
    assert shapes.head == ((2, 64),)
    assert shapes.num_trained == sum(unit.numel for unit in full)

    def bytes_of(shard: OptimizerShard) -> int:
        return sum(state.exp_avg.nbytes + state.exp_avg_sq.nbytes for state in shard.states.values())

    assert bytes_by_part(shapes, "native", {})["optimizer"] == bytes_of(
        OptimizerShard({u.index: u.numel for u in full})
    )
    galore = GaloreShard(full, GaloreConfig(rank=3), full[0].targets[0].leaf.device)
    assert bytes_by_part(shapes, "galore", {"--galore.rank": "3"})["optimizer"] == bytes_of(galore)
    model = tiny_model("bert")
    layers = find_layers(model)
    _, adapted = add_adapters(model, layers, LoraConfig(r=2), task="sequence_classification", seed=0)
    lora = bytes_by_part(shapes, "lora", {"--lora.r": "2"})
    assert lora["optimizer"] == bytes_of(OptimizerShard({unit.index: unit.numel for unit in adapted}))
    model = tiny_model("bert").bfloat16()
    _, wrapped = lsp_units(find_layers(model), LspConfig(subspace_dim=32, nnz_per_row=2), seed=0)
    factors = [factor for _, module in wrapped for factor in (module.projector.left, module.projector.right)]
    held = sum(factor.nbytes for factor in factors)
    assert kept_bytes(shapes, "lsp", {"--lsp.subspace_dim": "32", "--lsp.nnz_per_row": "2"}) == held


def test_the_ranks_keep_equal_bytes_and_every_tasks_options_exist() -> None:
    with torch.device("meta"):  # the shape of SmolLM2-135M
        sizes: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3}
        shapes = shapes_in(LlamaForCausalLM(LlamaConfig(**sizes)))
    ranks = equal_ranks(shapes)
    assert set(ranks) == {"lsp", "lora", "galore"}
    budget = kept_bytes(shapes, "lsp", ranks["lsp"])
    for method, own in ranks.items():
        assert kept_bytes(shapes, method, own) == pytest.approx(budget, rel=TOLERANCE)
    found = tasks(Path("data"), Path("pairs.jsonl"))
    assert set(found) == {"docstrings", "docstring-pairs", "gsm8k", "sst2"}
    every = {name: value for task in found.values() for name, value in task.options.items()}
    assert found["sst2"].warmup(57) == {"--warmup_steps": "5"}
    assert not found["gsm8k"].warmup(57)
    every |= found["sst2"].warmup(57)
    for method in METHODS:
        options = {**every, **options_of(method, rate_factor=0.5, shapes=shapes), "--method": method}
        assert isinstance(parse([word for pair in options.items() for word in pair]), RunConfig)
    assert options_of("lora", rate_factor=0.5) == {"--learning_rate": "0.0005"}


def test_a_pair_is_labelled_by_whether_the_docstring_is_the_functions_own(tmp_path: Path) -> None:
    own = {f"code {at}": f"text {at}" for at in range(20)}
    pairs = [DocstringPair(prompt=code, completion=text) for code, text in own.items()]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert sum(row["label"] for row in rows) == len(rows) // 2 == 10
    assert all((own[row["sentence2"]] == row["sentence1"]) == bool(row["label"]) for row in rows)
