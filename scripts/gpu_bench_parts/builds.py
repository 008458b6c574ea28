"""Builds Triton's kernels for cards that are not there, each as a run has launched it, and reads what they take."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
_POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
_ALIGNED = 16  # Triton makes a variant of its own for addresses and numbers that this divides
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A kernel with the types of a launch; constants, aligned arguments and options as Triton knows them by."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, int], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def types(self) -> str:
        """What tells it from others of the kernel."""
        return " ".join(kind for _, kind in self.signature if kind.startswith("*"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What a thread takes on a card; `stack_bytes` above 0 are registers that did not suffice."""

    registers: int
    stack_bytes: int


def variant_of(kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Variant:
    """The variant that Triton would build for a launch with these arguments."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    signature, constants, aligned = [], [], []
    for at, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        plain = parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        signature.append((parameter.name, "constexpr" if plain else _type_of(value)))
        if plain:
            constants.append((at, value))
        elif not parameter.do_not_specialize and _is_aligned(value):
            aligned.append(at)
    return Variant(
        kernel=kernel.fn.__name__,
        signature=tuple(signature),
        constants=tuple(constants),
        aligned=tuple(aligned),
        options=tuple(sorted((name, value) for name, value in kwargs.items() if name not in names)),
    )


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_POINTERS[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 1 << 31 else "i64"


def _is_aligned(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % _ALIGNED == 0)


def built(kernel: Any, variant: Variant, capability: int) -> Build:
    """Compile the variant for cards of this capability, such as 90, and return what it takes.

    Raises:
        Exception: Whatever Triton raises at what it cannot compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel,
        signature=dict(variant.signature),
        constexprs={(at,): value for at, value in variant.constants},
        attrs={(at,): [["tt.divisibility", _ALIGNED]] for at in variant.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    return _usage(compiled.asm["cubin"])


def has_assembler() -> bool:
    """Whether ptxas is there, which Triton's wheels bring, for every capability."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return all(Path(get_ptxas(capability).path).exists() for capability in CAPABILITIES)
    except (ImportError, RuntimeError):
        return False


def _usage(cubin: bytes) -> Build:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        found = _USAGE.search(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found is not None, "cuobjdump tells no usage"
    return Build(registers=int(found[1]), stack_bytes=int(found[2]))
