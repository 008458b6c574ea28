"""LiveMetrics: what metrics.jsonl gets, as Ray's metrics, for Prometheus and Grafana.

Ray puts `ray_` before the names and `_total` after those of counters.
"""

from __future__ import annotations

import math

from ray.util.metrics import Counter, Gauge

from lsp_ray.trace import StepMetrics

PREFIX = "lsp_"
GAUGES = {
    "loss": "Training loss of the last step",
    "eval_loss": "Loss on the held-out examples when it was measured last",
    "grad_norm": "Norm of what was sent in the last step",
    "grad_scale": "Factor of the last step's gradients: below 1 clipped, 0 skipped",
    "learning_rate": "Learning rate of the last step",
    "tokens_per_second": "Tokens a second in the last step",
    "step_time_s": "Seconds of the last step",
    "gpu_busy_s": "Seconds in which the GPU computed, in the last step",
    "d2h_busy_s": "Seconds in which the link was busy downwards, in the last step",
    "cpu_busy_s": "Seconds in which a shard updated, in the last step",
    "h2d_busy_s": "Seconds in which the link was busy upwards, in the last step",
    "exposed_d2h_s": "Seconds in which the GPU waited for the link downwards, in the last step",
    "exposed_cpu_s": "Seconds in which the GPU waited for an update, in the last step",
    "exposed_h2d_s": "Seconds in which the GPU waited for the link upwards, in the last step",
    "exposed_peers_s": "Seconds in which the GPU waited for other GPUs, in the last step",
    "exposed_weights_s": "Seconds in which the GPU waited for weights from main memory, in the last step",
    "exposed_activations_s": "Seconds in which the GPU waited for blocks' inputs on the link, in the last step",
}
COUNTERS = {
    "num_tokens": "Tokens trained on",
    "bytes_d2h": "Bytes sent down",
    "bytes_h2d": "Bytes sent up",
    "num_refitted": "Projectors refitted",
}
STEPS, BIAS, BIAS_OF_LAYER, GPU_COMPUTED = "steps", "bias_relative", "layer_bias_relative", "gpu_computed_s"


class LiveMetrics:
    """Passes steps on to Ray, which must be running; `step` is a Sink."""

    def __init__(self) -> None:
        self._gauges = {name: Gauge(PREFIX + name, text) for name, text in GAUGES.items()}
        self._counters = {name: Counter(PREFIX + name, text) for name, text in COUNTERS.items()}
        self._steps = Counter(PREFIX + STEPS, "Optimizer updates made")
        self._bias = Gauge(PREFIX + BIAS, "Mean relative bias when it was measured last")
        self._bias_of_layer = Gauge(PREFIX + BIAS_OF_LAYER, "Relative bias of a layer", tag_keys=("layer",))
        text = "Seconds that a GPU computed in the last step, where there are several"
        self._computed = Gauge(PREFIX + GPU_COMPUTED, text, tag_keys=("gpu",))

    def step(self, metrics: StepMetrics) -> None:
        """Set the gauges to this step's values, and add to the counters."""
        self._steps.inc()
        for name, gauge in self._gauges.items():
            value = getattr(metrics, name)
            if value is not None and math.isfinite(value):  # one NaN, and Ray exports no gauge at all any more
                gauge.set(value)
        for name, counter in self._counters.items():
            if getattr(metrics, name):  # Ray refuses to add nothing
                counter.inc(getattr(metrics, name))
        if metrics.bias is not None:
            self._bias.set(metrics.bias)
        for layer, bias in (metrics.bias_by_layer or {}).items():
            self._bias_of_layer.set(bias, tags={"layer": layer})
        for gpu, seconds in (metrics.computed_s_by_gpu or {}).items():
            self._computed.set(seconds, tags={"gpu": gpu})
