"""The runs that bench_overlap compares, and those that the simulator has to predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lsp_ray.config import LspConfig, PolicyName, RunConfig, RuntimeConfig
from lsp_ray.hardware import EmulatedMachine


def own_policy(method: str) -> PolicyName:
    """A method's order where none is asked for."""
    return "sequential" if method == "zero_offload" else "layerwise"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run."""

    method: str
    policy: PolicyName | None = None
    dim: int = 256
    link_gbps: float | None = None
    emulate: EmulatedMachine | None = None
    on_ray: bool = True

    @property
    def name(self) -> str:
        """What the tables call it."""
        parts = [self.method]
        if self.method == "lsp":
            parts.append(f"d = {self.dim}")
        if self.policy is not None:
            parts.append(self.policy)
        if self.link_gbps is not None:
            parts.append(f"{self.link_gbps:g} GB/s")
        if self.emulate is not None:
            parts.append(f"as {self.emulate}")
        return ", ".join(parts) + ("" if self.on_ray else ", threads")

    @property
    def free(self) -> Setting:
        """The same work, nothing slowed down, in the method's own order: what the simulator is given."""
        return Setting(method=self.method, dim=self.dim, policy=own_policy(self.method))

    def config(self, output_dir: Path, num_steps: int) -> RunConfig:
        """The run's options."""
        runtime = RuntimeConfig(
            device="cpu",
            num_shards=1,
            device_threads=1,
            shard_threads=1,
            policy=self.policy,
            link_gbps=self.link_gbps,
            emulate=self.emulate,
        )
        return RunConfig(
            method=self.method,  # type: ignore[arg-type]
            output_dir=str(output_dir),
            max_steps=num_steps,
            max_eval_samples=4,
            bf16=True,
            lsp=LspConfig(subspace_dim=self.dim, fit="random", check_every=0),
            runtime=runtime,
        )


LSP = Setting(method="lsp", policy="layerwise")
ZERO = Setting(method="zero_offload", policy="sequential")
NATIVE = Setting(method="native")
THREADS = replace(LSP, on_ray=False)
PAPER_MACHINE: EmulatedMachine = "rtx4090-threadripper"
COMPARED = (LSP, NATIVE, THREADS, ZERO, replace(LSP, emulate=PAPER_MACHINE), replace(ZERO, emulate=PAPER_MACHINE))
SLOW_LINK_POLICIES: tuple[PolicyName, ...] = ("layerwise_fcfs", "earliest_deadline", "sequential")
ZERO_POLICIES: tuple[PolicyName, ...] = ("sequential", "delayed", "layerwise_fcfs", "layerwise")
PREDICTED = (
    *(replace(LSP, policy=policy, link_gbps=0.05) for policy in SLOW_LINK_POLICIES),
    *(replace(LSP, link_gbps=link) for link in (0.1, 0.03)),
    replace(LSP, dim=128),
    replace(LSP, dim=128, link_gbps=0.01),
    *(replace(ZERO, policy=policy, link_gbps=0.5) for policy in ZERO_POLICIES),
)
PREDICTED_QUICK = (replace(LSP, policy="sequential", link_gbps=0.05), replace(LSP, link_gbps=0.03))
