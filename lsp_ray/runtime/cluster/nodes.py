"""The machines of a Ray cluster, as a run sees them: what they have, and whether each has what it needs there."""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import lsp_ray
from lsp_ray.errors import ConfigError
from lsp_ray.runtime.prepare.machines import Machine

FIELD = "runtime.address"
LOOK_TIMEOUT_S = 60.0  # a worker that imports torch from a cold disk
ALIVE_TIMEOUT_S = 30.0  # of a machine that has answered before, and may be busy; Ray knows sooner of most that are gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine. `name` is unique among those of the cluster; `store_bytes` is its object store's size."""

    id: str
    name: str
    ip: str
    num_gpus: int
    store_bytes: int
    is_own: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What a machine has: cores for a run, versions by name, and of the paths asked for the sizes of files there."""

    cores: int
    has_bf16: bool
    versions: Mapping[str, str]
    sizes: Sequence[Mapping[str, int] | None]


def nodes() -> list[Node]:
    """Those that Ray takes for alive: the driver's first, the others by address."""
    own = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    hosts = [node["NodeManagerHostname"] for node in alive]
    found = [
        Node(
            id=node["NodeID"],
            name=host if hosts.count(host) == 1 else f"{host}-{node['NodeID'][:4]}",
            ip=node["NodeManagerAddress"],
            num_gpus=int(node["Resources"].get("GPU", 0)),
            store_bytes=int(node["Resources"].get("object_store_memory", 0)),
            is_own=node["NodeID"] == own,
        )
        for node, host in zip(alive, hosts, strict=True)
    ]
    return sorted(found, key=lambda node: (not node.is_own, node.ip, node.id))


def on_node(node_id: str) -> dict[str, Any]:
    """Ray's options for what is to run on this machine and on no other."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def answering(there: Sequence[Node]) -> list[Node]:
    """Those on which something can be run; Ray takes some seconds to know that one is gone."""
    looks = {node.id: _answer.options(**on_node(node.id)).remote() for node in there if not node.is_own}
    found = [node for node in there if node.is_own]  # busy as it may be: this process runs there
    for node in there:
        if node.is_own:
            continue
        with suppress(RayError):
            ray.get(looks[node.id], timeout=ALIVE_TIMEOUT_S)
            found.append(node)
    return found


def machines(there: Sequence[Node]) -> list[Machine]:
    """What a run is decided by.

    Raises:
        ConfigError: One does not answer, or has no lsp_ray.
    """
    return [
        Machine(name=node.name, num_gpus=node.num_gpus, cores=found.cores, has_bf16=found.has_bf16)
        for node, found in zip(there, _look_at(there), strict=True)
    ]


def _look_at(there: Sequence[Node], paths: Sequence[Path] = ()) -> list[_Found]:
    """Ask every machine what it has; see `machines` for errors."""
    looks = [
        _looked.options(num_gpus=min(1, node.num_gpus), **on_node(node.id)).remote(tuple(map(str, paths)))
        for node in there
    ]
    found = []
    for node, look in zip(there, looks, strict=True):
        try:
            found.append(ray.get(look, timeout=LOOK_TIMEOUT_S))
        except GetTimeoutError:
            raise ConfigError(
                FIELD, f"be a cluster whose nodes answer within {LOOK_TIMEOUT_S:.0f} s", node.name
            ) from None
        except RayError as error:
            line = " ".join(str(error).strip().splitlines()[-1].split())[:200]
            raise ConfigError(FIELD, f"be a cluster whose nodes can all run lsp_ray ({line})", node.name) from error
    return found


def check_stores(there: Sequence[Node], store_bytes: Sequence[int]) -> None:
    """Refuse machines whose object stores do not hold so much each.

    Raises:
        ConfigError: One is too small.
    """
    for node, needed in zip(there, store_bytes, strict=True):
        if node.store_bytes < needed:
            bound = f"be a cluster whose object store on {node.name} has {needed / 1e9:.2f} GB for this run's slots"
            hint = f"ray start --object-store-memory={needed} there"
            raise ConfigError(FIELD, bound, f"{node.store_bytes / 1e9:.2f} GB", hint=hint)


def check_nodes(there: Sequence[Node], model: Path, output_dir: Path) -> None:
    """Refuse a cluster on which the run would fail later, or go wrong.

    Args:
        there: Its machines, the driver's first.
        model: The model's folder, which all must see.
        output_dir: Where checkpoints go, from which all must be able to go on.

    Raises:
        ConfigError: A machine has other versions or not the model or not the output folder.
    """
    own = there[0]
    with _left_in(output_dir) as mark:
        found = _look_at(there, [model, mark])
    expected = found[0]
    for node, theirs in zip(there[1:], found[1:], strict=True):
        for name, known in expected.versions.items():
            if theirs.versions[name] != known:
                bound = f"be a cluster whose nodes have one version of {name} ({known} on {own.name})"
                raise ConfigError(FIELD, bound, f"{theirs.versions[name]} on {node.name}")
        if theirs.sizes[0] != expected.sizes[0]:
            what = "another model" if theirs.sizes[0] is not None else "nothing"
            raise ConfigError(
                "model_name_or_path", f"be the same on all nodes; {node.name} has {what} in it", str(model)
            )
        if theirs.sizes[1] is None:
            bound = f"be in a folder that all nodes share; {node.name} does not see it"
            raise ConfigError("output_dir", bound, str(output_dir), hint="NFS is enough")


@contextmanager
def _left_in(folder: Path) -> Iterator[Path]:
    """A folder that is not there on any other file system."""
    mark = folder / f".seen-{secrets.token_hex(8)}"
    mark.mkdir()
    try:
        yield mark
    finally:
        mark.rmdir()


# no function of a module's, which would be imported where it runs, and torch with it
_answer = ray.remote(num_cpus=0)(lambda: None)


@ray.remote(num_cpus=0)
def _looked(paths: Sequence[str]) -> _Found:
    return _Found(
        cores=len(os.sched_getaffinity(0)),
        has_bf16=_has_bf16(),
        versions={
            "Python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
            "lsp_ray": lsp_ray.__version__,
        },
        sizes=[_sizes(Path(path)) for path in paths],
    )


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _sizes(folder: Path) -> dict[str, int] | None:
    if not folder.is_dir():
        return None
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
