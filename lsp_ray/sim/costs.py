"""What one step costs each stream, in seconds: all that the simulator knows of model and machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lsp_ray.errors import ConfigError
from lsp_ray.schedule.ops import LayerSeconds
from lsp_ray.trace import WorkStream


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """Seconds of one layer, each stream alone on the machine.

    Attributes:
        forward_s: Forward of one micro-batch.
        backward_s: Backward of one micro-batch, with the compression of the gradient.
        apply_s: Decompressing the delta and adding it to the weights, on the device.
        update_s: The optimizer's step on the device itself; 0 where the shards make it.
        d2h_s: Payload down.
        cpu_s: The optimizer's step on the layer's shard.
        h2d_s: Delta up.
        weights_s: Frozen weights up, where they come from main memory.
        input_d2h_s: A block's input down, where it waits in main memory for the backward.
        input_h2d_s: The same up again.
    """

    forward_s: float
    backward_s: float
    apply_s: float = 0.0
    update_s: float = 0.0
    d2h_s: float = 0.0
    cpu_s: float = 0.0
    h2d_s: float = 0.0
    weights_s: float = 0.0
    input_d2h_s: float = 0.0
    input_h2d_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_seconds(field.name, getattr(self, field.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostShares:
    """What an operation takes of the host's memory bandwidth at full rate; a GPU's with all that it stands for."""

    d2h: float
    cpu: float
    h2d: float

    def of(self, stream: WorkStream) -> float:
        """A copy's or an update's."""
        return {WorkStream.D2H: self.d2h, WorkStream.CPU: self.cpu, WorkStream.H2D: self.h2d}[stream]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkCosts:
    """The way to layers' homes on other machines, which payloads take after their link, and deltas before it.

    Attributes:
        down_s: Seconds of what a machine sends of each layer, if it has all of the network.
        up_s: The same of each layer's delta.
        sum_s: Of a core, for the sum of a machine's parts before that; default: none.
        away: Machines that the one GPU stands for; it is at home nowhere.
        at: In place of that, GPUs that are simulated each by itself: the machine of each, numbered as homes are.
        most: Of the network's rate, what one machine's way to another one reaches.
    """

    down_s: tuple[float, ...]
    up_s: tuple[float, ...]
    sum_s: tuple[float, ...] = ()
    away: int = 1
    at: tuple[int, ...] | None = None
    most: float = 1.0

    def __post_init__(self) -> None:
        for name in ("down_s", "up_s", "sum_s"):
            for seconds in getattr(self, name):
                _check_seconds(name, seconds)
            if len(getattr(self, name)) not in ((0, len(self.down_s)) if name == "sum_s" else (len(self.down_s),)):
                raise ConfigError(f"sim.{name}", f"be of {len(self.down_s)} layers", len(getattr(self, name)))
        if self.away < 1:
            raise ConfigError("sim.away", "be at least 1", self.away)
        if any(machine < 0 for machine in self.at or ()):
            raise ConfigError("sim.at", "be numbers of at least 0", self.at)
        if not 0.0 < self.most <= 1.0:
            raise ConfigError("sim.most", "be above 0 and at most 1", self.most)

    def crosses(self, gpu: int, home: int) -> bool:
        """Whether a layer's home is on another machine than a GPU."""
        return self.at is None or self.at[gpu] != home


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """One step; of what comes once a part of it, one part.

    Attributes:
        layers: Shallowest first.
        loss_s: Between forward and backward of a micro-batch: output embedding and loss, both ways.
        num_micro_batches: Forwards and backwards in a step.
        hop_s: From an operation's end until its policy knows of it.
        shared_link_rate: Rate of a copy, relative to the one it has alone, while the other direction is busy too;
            1 for a link with full duplex, 0.5 where both directions share one bandwidth.
        waits_for_all: Whether a forward begins only when every delta is up, as Zero-Offload's own does; here each layer
            waits for its own alone.
        host: Where several GPUs share a host's memory, what each operation takes of it; all slow down alike where that
            is more than there is. None: copies and updates take nothing from each other.
        num_buffers: Blocks whose weights are on the device at one time; 0: all of them.
        pieces_s: Of each piece of the output embedding that comes up from main memory, on its way.
        network: Between machines; None: there is one.
    """

    layers: tuple[LayerCosts, ...]
    loss_s: float = 0.0
    num_micro_batches: int = 1
    hop_s: float = 0.0
    shared_link_rate: float = 1.0
    waits_for_all: bool = False
    host: HostShares | None = None
    num_buffers: int = 0
    pieces_s: tuple[float, ...] = ()
    network: NetworkCosts | None = None

    def __post_init__(self) -> None:
        _check_seconds("loss_s", self.loss_s)
        _check_seconds("hop_s", self.hop_s)
        for seconds in self.pieces_s:
            _check_seconds("pieces_s", seconds)
        if not self.layers:
            raise ConfigError("sim.layers", "be at least one layer", len(self.layers))
        if self.num_micro_batches < 1:
            raise ConfigError("sim.num_micro_batches", "be at least 1", self.num_micro_batches)
        if not 0.0 < self.shared_link_rate <= 1.0:
            raise ConfigError("sim.shared_link_rate", "be above 0 and at most 1", self.shared_link_rate)
        if self.network is not None and len(self.network.down_s) != len(self.layers):
            raise ConfigError("sim.down_s", f"be of {len(self.layers)} layers", len(self.network.down_s))

    @property
    def compute_s(self) -> float:
        """Seconds of the device alone: no step is shorter."""
        return self.both_ways_s + sum(layer.apply_s + layer.update_s for layer in self.layers)

    @property
    def both_ways_s(self) -> float:
        """Seconds of all forwards and backwards."""
        once_s = self.loss_s + sum(layer.forward_s + layer.backward_s for layer in self.layers)
        return self.num_micro_batches * once_s

    @property
    def measured(self) -> tuple[LayerSeconds, ...]:
        """What a policy would be told after a live step."""
        return tuple(
            LayerSeconds(
                forward_s=self.num_micro_batches * layer.forward_s + layer.apply_s,
                backward_s=self.num_micro_batches * layer.backward_s,
                d2h_s=layer.d2h_s,
                cpu_s=layer.cpu_s,
                h2d_s=layer.h2d_s,
            )
            for layer in self.layers
        )


def _check_seconds(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0.0):
        raise ConfigError(f"sim.{name}", "be a finite number of seconds, at least 0", value)
