"""Bytes that a block's forward keeps for its backward."""

from __future__ import annotations

from lsp_ray.sim.model_shape import LayerShape, ModelShape
from lsp_ray.sim.workload import Workload


def activation_bytes(model: ModelShape, workload: Workload, layer: LayerShape) -> float:
    """Return the bytes kept for each token; 0 outside the blocks.

    After Korthikanti et al. 2022, Section 4, with attention that keeps no scores, and counted from the linears' shapes:

    - what the linears give out, but for the two that end in the residual stream;
    - the answer of the activation function, as wide as the widest linear, and of attention;
    - keys and values once more for all heads where heads share them and attention gets a mask (transformers);
    - both norms: their input in float32 and what they scale;
    - the linears' inputs (both norms' answers, attention's, the widest), or X Q of each in their place, and beside it
      what linears that are not projected read; with bfloat16 each of LoRA's adapters keeps its input in float32 for
      itself, as PEFT does, and X A of R columns.

    Norms that are frozen (lora) keep nothing of what they scale but for the linears.
    """
    if not layer.is_block or not layer.linears:
        return 0.0
    hidden, element = model.hidden_size, workload.element_bytes
    given_out = sum(linear.rows for linear in layer.linears) - 2 * hidden
    widest = max(max(linear.rows, linear.columns) for linear in layer.linears)
    inputs = float(2 * hidden + model.attention_width + widest)
    norms = 2 * hidden * (4 + element)
    if workload.method == "lora":
        norms = 2 * hidden * 4
        if workload.bf16:
            inputs = 4 / element * sum(linear.columns for linear in layer.linears)
        inputs += 4 / element * workload.lora_rank * len(layer.linears)
    projected = workload.projected_inputs(layer)
    if projected and not workload.full_gradient:
        whole = {linear.input: linear.columns for linear in layer.linears if workload.dims_of(linear) is None}
        inputs = sum(dim for _, dim in projected) + sum(whole.values())
    return float(element * (given_out + widest + model.attention_width + model.repeated_width + inputs) + norms)


def held_input_bytes(model: ModelShape, workload: Workload, layer: LayerShape) -> float:
    """Return the bytes of linears' inputs for each token that LLM.int8 holds beside that, checkpointing or not."""
    if workload.bits != 8 or not layer.is_block:
        return 0.0
    columns = {linear.input: linear.columns for linear in layer.linears}
    return float(workload.element_bytes * sum(columns.values()))
