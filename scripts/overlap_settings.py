"""What bench_overlap compares, and what the simulator has to predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from lsp_ray.config import LspConfig, Method, PolicyName, RunConfig, RuntimeConfig
from lsp_ray.hardware import EmulatedMachine

MAX_STEPS = 10_000  # more than any benchmark makes


def own_policy(method: Method) -> PolicyName:
    """A method's order where none is asked for."""
    return "sequential" if method == "zero_offload" else "layerwise"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Some steps of one kind."""

    method: Method
    policy: PolicyName
    dim: int = 256
    link_gbps: float | None = None
    emulate: EmulatedMachine | None = None
    on_ray: bool = True

    @property
    def name(self) -> str:
        """What the tables call it."""
        parts: list[str] = [self.method]
        if self.method == "lsp":
            parts.append(f"d = {self.dim}")
        if self.method != "native":
            parts.append(self.policy)
        if self.link_gbps is not None:
            parts.append(f"{self.link_gbps:g} GB/s")
        if self.emulate is not None:
            parts.append(f"as {self.emulate}")
        return ", ".join(parts) + ("" if self.on_ray else ", threads")

    @property
    def free(self) -> Setting:
        """The same work, nothing slowed down, in the method's own order: what the simulator is given."""
        return replace(self, policy=own_policy(self.method), link_gbps=None, emulate=None)

    @property
    def session(self) -> Setting:
        """Who shares its workers: only a stale policy needs others."""
        return replace(self.free, policy="delayed") if self.policy == "delayed" else self.free

    def config(self) -> RunConfig:
        """A run's options for this work. Zero-Offload's measures what the paper's machine is scaled to."""
        runtime = RuntimeConfig(
            device="cpu",
            num_shards=1,
            device_threads=1,
            shard_threads=1,
            policy=self.policy,
            emulate=PAPER_MACHINE if self.session == ZERO else None,
        )
        return RunConfig(
            method=self.method,
            max_steps=MAX_STEPS,
            max_eval_samples=4,
            bf16=True,
            lsp=LspConfig(subspace_dim=self.dim, fit="random", check_every=0),
            runtime=runtime,
        )


PAPER_MACHINE: EmulatedMachine = get_args(EmulatedMachine)[0]
LSP = Setting(method="lsp", policy="layerwise")
ZERO = Setting(method="zero_offload", policy="sequential")
NATIVE = Setting(method="native", policy="layerwise")
THREADS = replace(LSP, on_ray=False)
EMULATED_LSP, EMULATED_ZERO = (replace(setting, emulate=PAPER_MACHINE) for setting in (LSP, ZERO))
COMPARED = (LSP, NATIVE, THREADS, ZERO)
PREDICTED_QUICK = (
    EMULATED_ZERO,
    EMULATED_LSP,
    replace(LSP, policy="sequential", link_gbps=0.05),
    replace(LSP, link_gbps=0.03),
)
PREDICTED = (  # those that need the same free blocks stand together
    *(replace(ZERO, policy=policy, link_gbps=0.5) for policy in ("sequential", "layerwise_fcfs", "layerwise")),
    *PREDICTED_QUICK,
    *(replace(LSP, policy=policy, link_gbps=0.05) for policy in ("layerwise_fcfs", "earliest_deadline", "delayed")),
    replace(LSP, dim=128, link_gbps=0.01),
    replace(LSP, dim=128, policy="sequential", link_gbps=0.02),
)
