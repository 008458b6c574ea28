"""Forecast: one method under one policy on one machine, in seconds and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lsp_ray.config import PolicyName
from lsp_ray.errors import ConfigError
from lsp_ray.schedule.delta_room import delta_room
from lsp_ray.schedule.policy import POLICIES
from lsp_ray.sim.cost_model import CostModel
from lsp_ray.sim.hardware_profile import RESERVE_BYTES, HardwareProfile
from lsp_ray.sim.memory import (
    DeviceMemory,
    HostMemory,
    device_memory,
    host_memory,
    host_memory_elsewhere,
    peak_payload_bytes,
    with_most_buffers,
)
from lsp_ray.sim.model_shape import ModelShape
from lsp_ray.sim.simulation import Simulation
from lsp_ray.sim.simulator import Simulator
from lsp_ray.sim.store import payload_bytes
from lsp_ray.sim.workload import Workload
from lsp_ray.trace import Exposed, WorkStream

WAITING_PAYLOADS = 2  # of the largest, that are on the device at one time before a simulation says how many
HIDDEN = 0.02  # of a step that traffic and updates may expose and still count as hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes of one memory, and those that are there for them: all of it but the reserve."""

    where: str
    needed_bytes: float
    there_bytes: float

    @property
    def fits(self) -> bool:
        """Whether they are enough."""
        return self.needed_bytes <= self.there_bytes

    @property
    def excess(self) -> float:
        """How many times what is there is needed."""
        return self.needed_bytes / max(self.there_bytes, 1.0)

    def __str__(self) -> str:
        return f"{self.where} memory: {self.needed_bytes / 1e9:.1f} GB needed, {self.there_bytes / 1e9:.1f} GB there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a step takes.

    Attributes:
        workload: Of which step.
        policy: None where nothing leaves the device.
        device: With a typical micro-batch.
        longest_bytes: Peak on the device with the longest micro-batch there can be, every token with a target: what
            has to fit.
        host: Of the driver's machine, beside what the device needs where the host computes.
        elsewhere: Of that other machine which needs most; None where there is none.
        bytes_each_way: Down the link in a step, and as many up.
        step_s: From a step's end to the next one's; no less than the driver's.
        single_s: The same of one GPU alone, with as much to compute as each one of several.
        exposed: Time in which the device waits for deltas, by the stream that is late, or for weights; what a network
            takes of a payload's way counts as d2h's, of a delta's as h2d's, as in a run.
        crossing_s: By how much shorter the step were if the network took no time.
        bound: What keeps several GPUs from more: themselves, the driver, or what they wait for longest.
        busy_s: Of each stream in a step.
        network_s: In which the busiest link between machines carries something, one way.
        driver_s: Of the driver's processor, where there are several GPUs; of one the simulation counts the messages.
        needs: What has to fit: into the device, the host, and the host's shared memory.
    """

    workload: Workload
    policy: PolicyName | None
    device: DeviceMemory
    longest_bytes: float
    host: HostMemory
    elsewhere: HostMemory | None
    bytes_each_way: int
    step_s: float
    exposed: Exposed
    busy_s: dict[WorkStream, float]
    needs: tuple[Need, ...]
    single_s: float
    crossing_s: float
    bound: str
    network_s: float
    driver_s: float

    @property
    def misfits(self) -> tuple[Need, ...]:
        """What does not fit; empty where all does."""
        return tuple(need for need in self.needs if not need.fits)

    @property
    def tokens_per_s(self) -> float:
        """Throughput, padding counted."""
        return self.workload.tokens_per_step / self.step_s

    @property
    def bottleneck(self) -> WorkStream:
        """The stream that is busy longest."""
        return max(self.busy_s, key=lambda stream: self.busy_s[stream])

    @property
    def efficiency(self) -> float:
        """Tokens a second, relative to as many GPUs that need not wait for each other."""
        return self.single_s / self.step_s


def simulate(
    model: ModelShape,
    workload: Workload,
    hardware: HardwareProfile,
    policy: PolicyName | None,
    *,
    crosses: bool = True,
) -> Simulation:
    """Run a few steps; machines with shards own layers in turn, and so do shards, or all of every layer's slices.

    Args:
        model: What is trained.
        workload: A step.
        hardware: Where.
        policy: Who decides; None where nothing is sent.
        crosses: Whether a network between machines takes time.

    Raises:
        ConfigError: Several GPUs are to compute what never leaves one.
    """
    cluster = workload.cluster
    if workload.stays_on_device and cluster.num_gpus > 1:
        raise ConfigError("workload.cluster", f"be one GPU for {workload.method}", cluster.num_gpus)
    num_lanes = cluster.num_homes * (1 if workload.shard_by == "slice" else workload.num_shards)
    owners = [layer % num_lanes for layer in range(len(model.layers))]
    homes = [shard % cluster.num_homes for shard in owners]
    sizes = [workload.payload_bytes(layer) for layer in model.layers]
    room = delta_room(sizes, [payload_bytes(layer.numel, workload.payload_dtype) for layer in model.layers])
    parts = (0,) * cluster.parts_per_gpu
    decides = None
    if policy is not None and not workload.stays_on_device:
        decides = POLICIES[policy](owners, room=room, gpu_of_part=parts, home_of_layer=homes)
    costs = CostModel(model=model, workload=workload, hardware=hardware).step()
    return Simulator(costs if crosses else replace(costs, network=None), decides, owners).run()


def forecast(model: ModelShape, workload: Workload, hardware: HardwareProfile, policy: PolicyName | None) -> Forecast:
    """Return what a step of `workload` takes; `policy` is None where nothing is sent."""
    payloads = [workload.payload_bytes(layer) for layer in model.layers]
    if workload.streams and hardware.on_gpu:  # as a run does it
        there_bytes = max(0.0, hardware.device_memory_bytes - RESERVE_BYTES)
        most = with_most_buffers(model, workload.full, WAITING_PAYLOADS * max(payloads), there_bytes)
        workload = replace(workload, weight_buffers=most.weight_buffers)
    simulation, cluster = simulate(model, workload, hardware, policy), workload.cluster
    buffers = peak_payload_bytes(simulation.spans, payloads)
    longest_bytes = device_memory(model, workload.full, buffers).peak_bytes
    host = host_memory(model, workload, on_gpu=hardware.on_gpu)
    elsewhere = host_memory_elsewhere(model, workload, on_gpu=hardware.on_gpu)
    typical = near = simulation.typical
    step_s = single_s = typical.step_s
    driver_s = 0.0
    if cluster.num_gpus > 1:
        driver_s = cluster.driver_s(len(model.layers))
        step_s = max(step_s, driver_s)
        alone = replace(cluster, num_nodes=1, gpus_per_node=1)
        single_s = simulate(model, replace(workload, cluster=alone), hardware, policy).typical.step_s
    if cluster.num_away:
        near = simulate(model, workload, hardware, policy, crosses=False).typical
    crossing_s = max(0.0, typical.step_s - near.step_s)
    is_driver = driver_s >= step_s
    late_s = {"d2h": near.exposed.d2h_s, "cpu": near.exposed.cpu_s, "h2d": near.exposed.h2d_s, "network": crossing_s}
    late_s |= {"weights": near.exposed.weights_s, "activations": near.exposed.activations_s}
    return Forecast(
        workload=workload,
        policy=policy,
        device=device_memory(model, workload, buffers),
        longest_bytes=longest_bytes,
        host=host,
        elsewhere=elsewhere,
        bytes_each_way=sum(payloads),
        step_s=step_s,
        single_s=single_s,
        exposed=typical.exposed,
        busy_s=typical.busy_s,
        crossing_s=crossing_s,
        bound=_bound(single_s / step_s, late_s, is_driver=is_driver),
        network_s=cluster.network_s([workload.sent_bytes(layer) for layer in model.layers], payloads),
        driver_s=driver_s,
        needs=needs_of(hardware, longest_bytes, host, elsewhere),
    )


def _bound(efficiency: float, late_s: Mapping[str, float], *, is_driver: bool) -> str:
    if efficiency >= 1.0 - HIDDEN:
        return str(WorkStream.GPU)
    return "driver" if is_driver else max(late_s, key=lambda name: late_s[name])


def needs_of(
    hardware: HardwareProfile, device_bytes: float, host: HostMemory, elsewhere: HostMemory | None
) -> tuple[Need, ...]:
    """Return what has to fit, given the device's peak, the driver's machine's memory and that of each other one."""
    device_there, host_there = (
        max(0.0, size_bytes - RESERVE_BYTES)
        for size_bytes in (hardware.device_memory_bytes, hardware.host_memory_bytes)
    )
    # Linux gives shared memory half of the host's, and a run whose slots are larger is refused
    machines = [host] if elsewhere is None else [host, elsewhere]
    shared_bytes = max(machine.object_store for machine in machines)
    shared = Need(where="shared", needed_bytes=shared_bytes, there_bytes=hardware.host_memory_bytes / 2)
    host_bytes = max(machine.total_bytes for machine in machines)
    if not hardware.on_gpu:  # one memory for both
        return (
            Need(where="host", needed_bytes=device_bytes + host_bytes, there_bytes=min(device_there, host_there)),
            shared,
        )
    return (
        Need(where="device", needed_bytes=device_bytes, there_bytes=device_there),
        Need(where="host", needed_bytes=host_bytes, there_bytes=host_there),
        shared,
    )
