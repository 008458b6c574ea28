"""Two real blocks, timed: what the counts of the cost model leave out (launches, small operators) is in their time."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from transformers import AutoModel

from lsp_ray.models.layers import find_layers
from lsp_ray.models.load import load_config, silenced
from lsp_ray.plan.skeleton import shape_of_model
from lsp_ray.sim.device_work import DeviceWork, backward_work, forward_work
from lsp_ray.sim.hardware_profile import HardwareProfile
from lsp_ray.sim.workload import Workload

_NUM_BLOCKS = 2
_VOCABULARY = 64  # the embedding is not what is timed
_NUM_RUNS = 4
_LEAST_SHARE = 0.1  # of the time that is taken for activations at least


def activation_bytes_per_s(folder: Path, workload: Workload, hardware: HardwareProfile, device: torch.device) -> float:
    """Return the rate at which blocks pass their activations, small operators included.

    It is what forward and backward of plain training take beside their products at the rate of products alone. All
    methods have these activations in common; to slow the products down instead would make those that a method saves
    seem dearer than they are.

    Args:
        folder: Holds the model's config.json; the blocks get random weights.
        workload: Tokens and type; its method does not matter.
        hardware: Rates of `device`.
        device: Where blocks run.
    """
    config = copy.deepcopy(load_config(folder).get_text_config())
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = _NUM_BLOCKS, _VOCABULARY, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:_NUM_BLOCKS]
    dtype = torch.bfloat16 if workload.bf16 else torch.float32
    with silenced(), torch.random.fork_rng(devices=[]):
        model = AutoModel.from_config(config, dtype=dtype, trust_remote_code=False).to(device)
    find_layers(model)  # freezes what is not trained
    model.enable_input_require_grads()
    ids_BS = torch.zeros(workload.batch_size, workload.padded_length, dtype=torch.int64, device=device)
    taken_s = min(_step_s(model, ids_BS) for _ in range(_NUM_RUNS))
    native = Workload(
        method="native", batch_size=workload.batch_size, seq_length=workload.padded_length, bf16=workload.bf16
    )
    shape, work = shape_of_model(model), DeviceWork()
    for layer in shape.layers:
        work += forward_work(shape, native, layer) + backward_work(shape, native, layer)
    flops_per_s = hardware.device_bf16_flops if workload.bf16 else hardware.device_float32_flops
    return work.activation_bytes / max(taken_s - work.flops / flops_per_s, _LEAST_SHARE * taken_s)


def _step_s(model: torch.nn.Module, ids_BS: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    start_s = time.perf_counter()
    model(ids_BS).last_hidden_state.sum().backward()
    if ids_BS.device.type == "cuda":
        torch.cuda.synchronize(ids_BS.device)
    return time.perf_counter() - start_s
