"""Seconds of a step's forward and backward alone, with nothing sent: what emulated proportions refer to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from transformers import PreTrainedModel

from lsp_ray.device.backend import Backend
from lsp_ray.models.loss import Batch, num_targets, summed_loss
from lsp_ray.trace import WorkStream


def compute_seconds(
    model: PreTrainedModel,
    updates: Sequence[Sequence[Batch]],
    backend: Backend,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Return the median over `updates`, without the first, which warms up.

    Weights stay as they are. Every gradient is dropped as soon as it is there, as a device that holds no two layers'
    gradients must.

    Args:
        model: On the backend's device, before anything in it is replaced, so that all methods measure the same.
        updates: Micro-batches of each; at least two updates.
        backend: Says when the device is done.
        clock: Seconds, monotonic.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in trained]
    seconds = []
    for micro_batches in updates:
        start_s = clock()
        for batch in micro_batches:
            on_device = {name: tensor.to(backend.device) for name, tensor in batch.items()}
            (summed_loss(model, on_device) / max(1, num_targets(batch))).backward()
        backend.record(WorkStream.GPU).synchronize()
        seconds.append(clock() - start_s)
    for hook in hooks:
        hook.remove()
    return median(seconds[1:])


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
