#!/usr/bin/env python3
"""Writes docs/hardware.md: which model and method fits which card, forecast by lsp_ray.plan from shapes alone.

python scripts/hardware_guide.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from lsp_ray.config import Bits, Method, PolicyName
from lsp_ray.plan.options import PlanConfig, PlanLspConfig, PlanRuntimeConfig
from lsp_ray.plan.plan import Plan, choices_of, make_plan, workload_of
from lsp_ray.plan.skeleton import shape_of
from lsp_ray.sim.forecast import Forecast, forecast
from lsp_ray.sim.hardware_profile import RESERVE_BYTES, HardwareProfile, load_hardware
from lsp_ray.sim.hiding import WAITS, hiding_batch
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.workload import Workload

PAGE = Path(__file__).resolve().parent.parent / "docs" / "hardware.md"
MACHINE = "rtx3060"  # decides how many payloads and deltas are on the device at one time, and nothing else here
CARDS_GB = (4, 8, 12, 16, 24, 32, 80)
CARDS_4_BIT_GB = (4, 6, 8, 12, 16, 24)
LENGTHS = (512, 2048)
SHORT = 64  # tokens of an example, to say from how many of them the link is hidden
METHODS: tuple[tuple[Method, PolicyName | None], ...] = (
    ("native", None),
    ("galore", None),
    ("lora", None),
    ("zero_offload", "sequential"),
    ("lsp", "layerwise"),
)
CARDS_STREAMED: dict[tuple[int, str], tuple[int, ...]] = {  # with whose rates, and GB of main memory beside them
    (4, "a1000-laptop"): (16, 32),
    (6, "a1000-laptop"): (16, 32, 64),
    (8, "rtx4060"): (16, 32, 64),
    (12, "rtx3060"): (32, 64, 128),
    (12, "rtx4070"): (32, 64, 128),
    (16, "rtx4080"): (32, 64, 128),
    (24, "rtx4090"): (64, 128),
}
METHODS_4_BIT: tuple[tuple[Method, PolicyName | None], ...] = (("lora", None), ("lsp", "layerwise"))


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **{"vocab_size": 49152, "tie_word_embeddings": True, **others},
    )


MODELS: dict[str, PreTrainedConfig] = {  # shapes as in the models' own config.json
    "SmolLM2-135M": _llama(576, 1536, 30, 9, 3),
    "SmolLM2-360M": _llama(960, 2560, 32, 15, 5),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, vocab_size=128256),
    "SmolLM2-1.7B": _llama(2048, 8192, 24, 32, 32),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, vocab_size=128256, head_dim=128),
    "Qwen2.5-7B": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, vocab_size=128256, tie_word_embeddings=False),
}


def _qwen(hidden: int, intermediate: int, layers: int, heads: int = 40) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
    )


LARGER_MODELS: dict[str, PreTrainedConfig] = {  # for the table of 4 bits alone
    "Qwen2.5-14B": _qwen(5120, 13824, 48),
    "Mistral-Small-24B": _llama(5120, 32768, 40, 32, 8, vocab_size=131072, head_dim=128, tie_word_embeddings=False),
    "Qwen2.5-32B": _qwen(5120, 27648, 64),
}
_UNTIED = {"vocab_size": 32000, "tie_word_embeddings": False}
LARGEST_MODELS: dict[str, PreTrainedConfig] = {  # for the table of weights in main memory alone
    "Llama-2-7B": _llama(4096, 11008, 32, 32, 32, **_UNTIED),
    "Llama-2-13B": _llama(5120, 13824, 40, 40, 40, **_UNTIED),
    "CodeLlama-34B": _llama(8192, 22016, 48, 64, 8, **_UNTIED),
    "Llama-2-70B": _llama(8192, 28672, 80, 64, 8, **_UNTIED),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8, **{**_UNTIED, "vocab_size": 128256}),
    "Qwen2.5-72B": _qwen(8192, 29568, 80, 64),
    "Mistral-Large-123B": _llama(12288, 28672, 88, 96, 8, **{**_UNTIED, "vocab_size": 32768}, head_dim=128),
}

HEAD = f"""# What fits which card

Forecasts, not measurements: `scripts/hardware_guide.py` wrote this page from the models' shapes
with the planner's Python API. The forecast of device memory was within 3 % in eleven of twelve
settings that were run on a CPU, and within 5 % in five on an H100
([figures](benchmarks/gpu.md)).

Batches of 1 example in bfloat16, d = 256, r = 8, a target for every token. Of the two figures in a
column the second is with `--gradient_checkpointing`. A card is large enough where the peak leaves
{RESERVE_BYTES / 1e9:.0f} GB of it free. GB are 10⁹ bytes, a card's own as well. LoRA's rank is 8, GaLore's 128: their
defaults.

Host memory is slots, Adam's moments and processes, and the weights on their way to the GPU. A
larger d adds 12 d² bytes a matrix to it, and little to the device. Twice the examples in a
micro-batch cost what twice the tokens cost; `--gradient_accumulation_steps` costs nothing.

For another model, length or card:

```bash
python -m lsp_ray.plan --model_name_or_path ~/models/my-llama --hardware rtx3060 --max_seq_length 1024
```
"""


HEAD_4_BIT = """## In 4 bits

With `--load_in_4bit` the matrices of blocks are NF4, 0.52 bytes a value; embeddings, output layer
and norms stay bfloat16. `lsp` keeps its updates apart, 2 d² bytes a matrix on the device, and
16 d² in main memory; `lora` is QLoRA. Either leaves an adapter for the same base. The largest of the
models below that fits a card, with `--gradient_checkpointing`:
"""


_STREAMED_COMMAND = (
    "python -m lsp_ray.plan --model_name_or_path ~/models/my-70b --hardware rtx4070 --host_memory_gb 64 --method lsp "
    f"--load_in_4bit --runtime.weights host --lsp.subspace_dim 256 --max_seq_length {LENGTHS[0]} --bf16"
)
HEAD_STREAMED = f"""## With the weights in main memory

With `--runtime.weights host` beside `--load_in_4bit` blocks, embeddings and output layer stay in
main memory, and blocks come up while the one before computes. So main memory decides how large a
model may be; the card has to hold two blocks and activations, and what is left of it holds more
blocks. Each row has the largest that fits a card and the main memory beside it, of the models above
and of the shapes of Llama-2-7B, -13B, -70B, CodeLlama-34B, Llama-3.1-70B, Qwen2.5-72B and
Mistral-Large-123B. All of it is a forecast, by the rates of the card that is named; no GPU has run
it.

*Examples* are those of a micro-batch × micro-batches of a step, of {LENGTHS[0]} tokens each, as the planner
chooses them: four, more where that hides the link. *Waits* is the part of such a step in which the
device waits for weights; it is below {100 * WAITS:.0f} % from the tokens of a micro-batch on that *hidden from*
says, counted in examples of {SHORT}. Every micro-batch brings all blocks up twice, so larger ones hide
the link and `--gradient_accumulation_steps` does not. All but the last column is what this says:

```bash
{_STREAMED_COMMAND}
```
"""


def main() -> int:
    """Write the page; returns the exit code."""
    written = page(MODELS, LARGER_MODELS, LARGEST_MODELS, lambda name: print(name, flush=True))
    PAGE.write_text(written, encoding="utf-8")
    return 0


def page(
    models: Mapping[str, PreTrainedConfig],
    larger: Mapping[str, PreTrainedConfig],
    largest: Mapping[str, PreTrainedConfig],
    say: Callable[[str], None],
) -> str:
    """Return the page for these models, the larger ones in 4 bits alone, the largest with weights in main memory alone.

    `say` is told each name first.
    """
    machine, shapes = load_hardware(MACHINE), dict[str, ModelShape]()
    for name, config in {**models, **larger, **largest}.items():
        say(name)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            shapes[name] = shape_of(Path(folder))
    dense, in_4_bit = ({name: shapes[name] for name in names} for names in (models, {**models, **larger}))
    sections = [_section(dense, length, machine) for length in LENGTHS]
    return "\n".join([HEAD, *sections, _section_4_bit(in_4_bit, machine), _section_streamed(shapes)])


def _section_streamed(shapes: Mapping[str, ModelShape]) -> str:
    rows = []
    for (card_gb, name), hosts_gb in CARDS_STREAMED.items():
        title = f"{card_gb} GB, {name}"
        for host_gb in hosts_gb:
            rows.append(
                f"| {title} | {host_gb} GB | {_streamed_cells(shapes, streamed_config(card_gb, name, host_gb))} |"
            )
            title = ""
    heads = ["card", "main memory", "largest model", "examples", "device, GB", "host, GB", "step, s", "tokens/s"]
    heads += ["waits", "hidden from"]
    return "\n".join(
        [HEAD_STREAMED, f"| {' | '.join(heads)} |", f"|---|---:|---|{'---:|' * (len(heads) - 3)}", *rows, ""]
    )


def streamed_config(card_gb: float, name: str, host_gb: float) -> PlanConfig:
    """The planner's options for a machine with weights in main memory, in 4 bits."""
    return PlanConfig(
        hardware=name,
        gpu_memory_gb=card_gb,
        host_memory_gb=host_gb,
        method="lsp",
        max_seq_length=LENGTHS[0],
        load_in_4bit=True,
        bf16=True,
        lsp=PlanLspConfig(subspace_dim=256),
        runtime=PlanRuntimeConfig(weights="host"),
    )


def largest_streamed(shapes: Mapping[str, ModelShape], config: PlanConfig) -> tuple[str, Plan] | None:
    """The model with the most parameters that fits, and its plan; None where none does."""
    machine = config.machine
    assert machine is not None, "it is named"
    for name, model in sorted(shapes.items(), key=lambda item: -item[1].num_parameters):
        work = workload_of(config, num_units=len(model.layers), cores=machine.num_cores, on_gpu=True)
        plan = make_plan(model, work, machine, choices_of(config))
        if plan.reason is None:
            return name, plan
    return None


def _streamed_cells(shapes: Mapping[str, ModelShape], config: PlanConfig) -> str:
    found = largest_streamed(shapes, config)
    if found is None:
        return "none | – | – | – | – | – | – | –"
    name, plan = found
    best, link = plan.advice.recommended, plan.link
    assert best is not None, "it fits"
    assert link is not None, "it streams"
    short = replace(best.workload, batch_size=1, seq_length=SHORT)
    cells = (
        name,
        f"{best.workload.batch_size} × {best.workload.num_micro_batches}",
        f"{best.longest_bytes / 1e9:.1f}",
        f"{best.host.total_bytes / 1e9:.1f}",
        f"{best.step_s:.1f}",
        f"{best.tokens_per_s:.0f}",
        f"{100 * link.share:.0f} %",
        f"{hiding_batch(plan.model, short, plan.hardware) * SHORT} tokens",
    )
    return " | ".join(cells)


def _section_4_bit(shapes: Mapping[str, ModelShape], machine: HardwareProfile) -> str:
    cells = [(method, length) for length in LENGTHS for method, _ in METHODS_4_BIT]
    fitting: dict[tuple[Method, int, int], str] = {}
    rows = []
    for name, model in shapes.items():
        title = f"{name} ({model.num_parameters / 1e9:.2f} · 10⁹)"
        for method, policy in METHODS_4_BIT:
            figures, host = [], ""
            for length in LENGTHS:
                pair = [
                    _forecast(model, length, machine, method, policy, is_kept, is_4_bit=True)
                    for is_kept in (True, False)
                ]
                figures.append(_pair(pair))
                host = f"{pair[1].host.total_bytes / 1e9:.1f}"
                for card in CARDS_4_BIT_GB:
                    if pair[1].longest_bytes + RESERVE_BYTES <= card * 1e9:
                        fitting[method, length, card] = name
            rows.append(f"| {title} | `{method}` | {' | '.join(figures)} | {host} |")
            title = ""
    heads = " | ".join(f"`{method}`, {length} tokens" for method, length in cells)
    cards = [
        f"| {card} GB | {' | '.join(fitting.get((method, length, card), 'none') for method, length in cells)} |"
        for card in CARDS_4_BIT_GB
    ]
    return "\n".join(
        [
            HEAD_4_BIT,
            f"| card | {heads} |",
            f"|---|{'---|' * len(cells)}",
            *cards,
            "",
            f"| model | method | {' | '.join(f'device, {length} tokens, GB' for length in LENGTHS)} | host, GB |",
            f"|---|---|{'---:|' * len(LENGTHS)}---:|",
            *rows,
            "",
        ]
    )


def _section(shapes: Mapping[str, ModelShape], length: int, machine: HardwareProfile) -> str:
    lines = [
        f"## {length} tokens\n",
        "| model | method | device, GB | smallest card | host, GB |",
        "|---|---|---:|---:|---:|",
    ]
    for name, model in shapes.items():
        title = f"{name} ({model.num_parameters / 1e9:.2f} · 10⁹)"
        for method, policy in METHODS:
            pair = [_forecast(model, length, machine, method, policy, is_kept) for is_kept in (True, False)]
            lines.append(
                f"| {title} | `{method}` | {_pair(pair)} | {_cards(pair)} | {pair[0].host.total_bytes / 1e9:.1f} |"
            )
            title = ""
    return "\n".join([*lines, ""])


def _forecast(
    model: ModelShape,
    length: int,
    machine: HardwareProfile,
    method: Method,
    policy: PolicyName | None,
    is_kept: bool,
    *,
    is_4_bit: bool = False,
) -> Forecast:
    bits: Bits | None = 4 if is_4_bit else None
    work = Workload(method=method, batch_size=1, seq_length=length, gradient_checkpointing=not is_kept, bits=bits)
    return forecast(model, work, machine, policy)


def _pair(pair: Sequence[Forecast]) -> str:
    return " / ".join(f"{entry.longest_bytes / 1e9:.1f}" for entry in pair)


def _cards(pair: Sequence[Forecast]) -> str:
    return " / ".join(smallest_card(entry.longest_bytes) for entry in pair)


def smallest_card(peak_bytes: float) -> str:
    """The smallest of the cards that holds it, with something to spare."""
    fitting = [card for card in CARDS_GB if peak_bytes + RESERVE_BYTES <= card * 1e9]
    return f"{fitting[0]} GB" if fitting else "none"


if __name__ == "__main__":
    sys.exit(main())
