"""What torch's compiler makes of a block, counted without building it: its kernels after fusion, and what it calls."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch._inductor.scheduler import BaseSchedulerNode

WIDE_PRODUCT = "launches::mm_float32"


@torch.library.custom_op(WIDE_PRODUCT, mutates_args=())
def mm_float32(left_DT: torch.Tensor, right_TE: torch.Tensor) -> torch.Tensor:
    """The product that on CUDA is written in float32: one launch, nothing that is fused."""
    return (left_DT @ right_TE).float()


@mm_float32.register_fake
def _(left_DT: torch.Tensor, right_TE: torch.Tensor) -> torch.Tensor:
    return left_DT.new_empty(left_DT.shape[0], right_TE.shape[1], dtype=torch.float32)


class _SeenError(Exception):
    """Ends a compilation whose nodes have been seen."""


class CountingBackend:
    """A backend of torch.compile whose graphs run operator by operator and tell what they would launch.

    Args:
        ran: Told whenever a graph runs, by what its launches are; the operators are run within `paused()`.
        launches: By operator, of those that are more than one launch.
    """

    def __init__(
        self, ran: Callable[[Mapping[str, int]], None], paused: Callable[[], Any], launches: Mapping[str, int]
    ) -> None:
        self._ran, self._paused, self._launches = ran, paused, launches

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
        """See torch.compile."""
        from torch._inductor.compile_fx import compile_fx  # slow to import, and only here

        return compile_fx(module, inputs, inner_compile=self._compiled)

    def _compiled(self, module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.exc import InductorError

        found: Counter[str] = Counter()

        def see(nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
            for node in nodes:
                found[_name(node)] += self._number(node)
            raise _SeenError

        runs = copy.deepcopy(module)
        try:
            with config.patch({"_post_fusion_custom_pass": see, "force_disable_caches": True}):
                compile_fx_inner(module, inputs, **options)
        except InductorError as error:
            if not isinstance(error.inner_exception, _SeenError):
                raise

        def run(arguments: list[Any]) -> Any:
            self._ran(found)
            with self._paused(), torch.no_grad():
                outputs = runs(*arguments)
            arguments.clear()
            return outputs

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _number(self, node: BaseSchedulerNode) -> int:
        from torch._inductor.ir import MultiOutput
        from torch._inductor.scheduler import NopKernelSchedulerNode

        if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
            return 0
        return self._launches.get(_name(node), 1)


def _name(node: BaseSchedulerNode) -> str:
    """The operator that is called, or that operators were fused."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    if not isinstance(node, ExternKernelSchedulerNode):
        return "fused"
    called = node.node
    overload = getattr(called, "op_overload", None)
    if overload is not None:
        return str(overload._schema.name.partition("::")[2])
    return str(getattr(called, "python_kernel_name", None) or type(called).__name__).rpartition(".")[2]
