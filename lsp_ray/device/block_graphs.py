"""BlockGraphs: each block's forward and backward recorded once for a size of batch, and launched as two graphs after.

A step of many small kernels is bound by the host that launches them. A graph launches a block's at once, with the bits
of the same kernels one by one. What a graph reads and writes stays where it was while it was recorded:

- weights and projectors: deltas change them in place, new projectors are copied into the old ones' memory; where one
  has moved all the same, everything is recorded again;
- what a block is given: its predecessor's output, which stays where it is as well, or a copy in a fixed place;
- the gradient of its input: one place for all blocks, as only one of them is under way at a time;
- its trained parameters' gradients: one flat place for all blocks of a size, emptied before the next block's backward.

A block runs as it always did, operator by operator, while it is observed, without gradients, at a size that is new,
and for good where a graph cannot hold it: where it draws random numbers or asks the host (routed experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lsp_ray.device.backend import Backend
from lsp_ray.device.projected_linear import InSubspace
from lsp_ray.device.unit import Unit, copy_parts
from lsp_ray.errors import ConfigError
from lsp_ray.models.loss import NOT_THE_MODELS, Batch

Key = tuple[Any, ...]


@dataclass(slots=True)
class _Place:
    """A fixed place for a tensor that a model hands to its blocks, and what it holds in this micro-batch."""

    tensor: torch.Tensor
    source: torch.Tensor | None = None


@dataclass(slots=True)
class _Shared:
    """What the graphs of all blocks share.

    Attributes:
        batch: The sizes of the micro-batch under way.
        may_record: Whether sizes that were met before are recorded now.
        payload_dtype: Type of a unit's flat gradients; None: the one that all of them fit in.
        recorded: Batches of which a graph was recorded in an earlier micro-batch.
        places: Those that hold something in this micro-batch.
        outputs: Addresses of the blocks' outputs.
        buffers: Gradients of inputs by layout, flat gradients of parameters by length.
    """

    backend: Backend
    take_gradients: Callable[[Unit, torch.Tensor], None]
    anchor: torch.Tensor
    batch: Key = ()
    is_on: bool = False
    may_record: bool = False
    payload_dtype: torch.dtype | None = None
    recorded: set[Key] = field(default_factory=set)
    places: list[_Place] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    buffers: dict[Key, torch.Tensor] = field(default_factory=dict)

    def place_of(self, source: torch.Tensor) -> _Place:
        """The place that holds this tensor in this micro-batch; a new one if none does."""
        for place in self.places:
            if place.source is source:
                return place
        place = _Place(torch.empty_like(source, requires_grad=False), None)
        self.fill(place, source)
        return place

    def fill(self, place: _Place, source: torch.Tensor) -> None:
        """Copy a tensor into a place that is free."""
        place.tensor.data.copy_(source.detach())  # uncounted: graphs have kept it for their backward
        place.source = source
        self.places.append(place)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record a graph and return what launches it.

        All graphs of a batch take their memory from one pool, in which what one has let go the next one uses: right as
        long as they are launched in the order in which they were recorded. So one that comes late has its own.
        """
        return self.backend.record_graph(run, apart=self.batch in self.recorded)

    def buffer(self, *key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The buffer of this key; made where there is none."""
        if key not in self.buffers:
            self.buffers[key] = make()
        return self.buffers[key]


class BlockGraphs:
    """Puts itself in the place of every block's forward.

    Args:
        units: The trained layers; those with one reader, a block, are recorded.
        backend: Records.
        take_gradients: Given a unit and its flat gradients, which it must have read, in the order of the stream, when
            it returns.
    """

    def __init__(
        self, units: Sequence[Unit], backend: Backend, take_gradients: Callable[[Unit, torch.Tensor], None]
    ) -> None:
        anchor = torch.zeros((), device=backend.device, requires_grad=True)
        self._shared = _Shared(backend, take_gradients, anchor)
        self._told: list[_Block] = []
        self._blocks = [_Block(unit, self._shared) for unit in units if len(unit.readers) == 1]

    def begin(self, batch: Batch, *, may_record: bool, payload_dtype: torch.dtype | None) -> None:
        """Before a micro-batch's forward.

        Args:
            batch: The micro-batch; its sizes alone are looked at.
            may_record: Whether sizes that were met before are to be recorded.
            payload_dtype: Type in which a unit's gradients are taken; None: the one that all of them fit in.
        """
        shared = self._shared
        for place in shared.places:
            place.source = None
        shared.places.clear()
        if any(block.has_graph(shared.batch) for block in self._blocks):
            shared.recorded.add(shared.batch)
        shared.batch = (
            payload_dtype,
            *((name, tensor.shape) for name, tensor in batch.items() if name not in NOT_THE_MODELS),
        )
        shared.is_on, shared.may_record, shared.payload_dtype = True, may_record, payload_dtype
        if any(block.has_moved() for block in self._blocks):
            self.forget()

    def forget(self) -> None:
        """Drop every graph: something that they read has moved."""
        for block in self._blocks:
            block.graphs.clear()
        self._shared.outputs.clear()
        self._shared.buffers.clear()
        self._shared.recorded.clear()

    def refusals(self) -> tuple[str, ...]:
        """A line for every reason, not told before, for which blocks run without graphs for good."""
        blocks_by_reason: dict[str, list[str]] = {}
        for block in self._blocks:
            if block.refusal and block not in self._told:
                self._told.append(block)
                blocks_by_reason.setdefault(block.refusal, []).append(block.unit.name)
        return tuple(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: no CUDA graph, as {reason}"
            for reason, names in blocks_by_reason.items()
        )

    def close(self) -> None:
        """Let the blocks be as they were."""
        for block in self._blocks:
            block.restore()


class _Block:
    """A block, its forward as it was, and its graphs by what it is given."""

    def __init__(self, unit: Unit, shared: _Shared) -> None:
        self.unit, self.shared = unit, shared
        self.module = unit.readers[0]
        self.forward = self.module.forward
        self.graphs: dict[Key, _Graph] = {}
        self.refusal = ""
        self._met: set[Key] = set()
        self._linears = [module for module in self.module.modules() if isinstance(module, InSubspace)]
        self._parameters = list(self.module.parameters())
        owned = [id(part) for module in self.module.modules() for part in module._parameters.values()]
        if len(set(owned) - {id(None)}) < len([part for part in owned if part != id(None)]):
            self.refusal = "modules in it share a parameter"
        self._addresses: tuple[int, ...] = ()
        # transformers keeps activations or not in the block's own forward; here the graph decides, or `_plain`
        self.recomputes = bool(getattr(self.module, "gradient_checkpointing", False))
        if self.recomputes:
            self.module.gradient_checkpointing = False  # type: ignore[assignment]
        self.module.forward = self._run

    def restore(self) -> None:
        """Take the wrapper off."""
        del self.module.forward
        if self.recomputes:
            self.module.gradient_checkpointing = True  # type: ignore[assignment]

    def has_moved(self) -> bool:
        """Whether something that its graphs read is somewhere else by now."""
        return bool(self.graphs) and self._addresses != self._current()

    def _current(self) -> tuple[int, ...]:
        projectors = [linear.projector for linear in self._linears]
        tensors = [factor.value_FR for projector in projectors for factor in (projector.left, projector.right)]
        return tuple(tensor.data_ptr() for tensor in (*tensors, *self._parameters))

    def has_graph(self, batch: Key) -> bool:
        """Whether there is one for batches of these sizes."""
        return any(key[0] == batch for key in self.graphs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward."""
        if self.refusal or not self.shared.is_on or not torch.is_grad_enabled() or self._is_observed():
            return self._plain(*args, **kwargs)
        given = list(_parts(args)) + list(_parts(kwargs.values()))
        if not all(isinstance(part, torch.Tensor | bool | int | float | str | None) for part in given):
            return self._plain(*args, **kwargs)
        key = (self.shared.batch, len(args), *kwargs, *map(_signature, given))
        graph = self.graphs.get(key)
        if graph is None:
            if key not in self._met or not self.shared.may_record:
                return self._first(key, *args, **kwargs)
            graph = self._recorded(args, kwargs)
            if graph is None:
                return self._plain(*args, **kwargs)
            self.graphs[key] = graph
        tensors = [part for part in given if isinstance(part, torch.Tensor)]
        if not graph.launch_forward(tensors):
            return self._plain(*args, **kwargs)
        differentiable = [tensor for tensor in tensors if tensor.requires_grad]
        output = _Replayed.apply(graph, self.shared.anchor, *differentiable)  # type: ignore[no-untyped-call]
        return graph.wrapped(output)

    def _is_observed(self) -> bool:
        return any(linear.lesson is not None or linear.probe is not None for linear in self._linears)

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        return self.forward(*args, **kwargs)

    def _first(self, key: Key, *args: Any, **kwargs: Any) -> Any:
        """Run as ever, see whether a graph could hold it, and load on the way what its operators need."""
        if key in self._met:
            return self._plain(*args, **kwargs)
        self._met.add(key)
        scout = _Scout()
        with scout:
            output = self._plain(*args, **kwargs)
        outputs = list(_parts([output]))
        given = (*_parts(args), *_parts(kwargs.values()))
        if scout.found:
            self.refusal = scout.found
        elif sum(isinstance(part, torch.Tensor) and part.requires_grad for part in given) > 1:
            self.refusal = "it is given more than one tensor with a gradient"
        elif not isinstance(outputs[0], torch.Tensor) or any(isinstance(part, torch.Tensor) for part in outputs[1:]):
            self.refusal = "it returns more than one tensor"
        return output

    def _recorded(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Graph | None:
        try:
            graph = _Graph(self, args, kwargs)
        except RuntimeError as error:  # of many kinds; the run is right without
            self.refusal = f"it could not be recorded: {str(error).splitlines()[0]}"
            return None
        self._addresses = self._current()
        return graph


class _Graph:
    """A block's forward and backward for one key. The backward is recorded at the first backward."""

    def __init__(self, block: _Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._block, self._shared = block, block.shared
        self._places: list[_Place | None] = []  # of each tensor given; None: another block's output, where it is
        self._fixed: list[torch.Tensor] = []
        self._wanted: list[torch.Tensor] = []  # inputs that a gradient is wanted of
        fixed = [self._fix(part) for part in (*_parts(args), *_parts(kwargs.values()))]
        self._inputs = iter(fixed)
        self._args = tuple(self._rebuilt(value) for value in args)
        self._kwargs = {name: self._rebuilt(value) for name, value in kwargs.items()}
        self._aliases = [target.leaf.detach().requires_grad_() for target in block.unit.targets]
        self._flat_dtype = self._shared.payload_dtype or _common_dtype(self._aliases)
        self.output = self._shared.anchor  # until it is recorded
        self._output_with_graph: torch.Tensor | None = None
        self._rest: tuple[Any, ...] | None = None
        self._launch_backward: Callable[[], None] | None = None
        self._grad_output: torch.Tensor | None = None
        self._launch_forward = self._shared.record(self._forward)
        self._shared.outputs.add(self.output.data_ptr())

    def launch_forward(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Put the tensors where the graph reads them and launch it; False where that cannot be."""
        for tensor, place, fixed in zip(tensors, self._places, self._fixed, strict=True):
            if place is None:
                if tensor.data_ptr() != fixed.data_ptr():
                    return False
            elif place.source is None:
                self._shared.fill(place, tensor)
            elif place.source is not tensor:
                return False
        self._launch_forward()
        return True

    def wrapped(self, output: torch.Tensor) -> Any:
        """The output in the form in which the block returns it."""
        return output if self._rest is None else (output, *self._rest)

    def launch_backward(self, grad_output: torch.Tensor) -> torch.Tensor | None:
        """Launch the backward, hand the parameters' gradients on, and return that of the input."""
        shared = self._shared
        layout = (tuple(grad_output.shape), grad_output.dtype)
        buffer = shared.buffer(*layout, make=lambda: torch.empty_like(grad_output).contiguous())
        if grad_output.data_ptr() != buffer.data_ptr():
            buffer.copy_(grad_output)
        if self._launch_backward is None:
            numel, dtype = self._block.unit.numel, self._flat_dtype
            self._flat = shared.buffer(numel, dtype, make=lambda: buffer.new_empty(numel, dtype=dtype))
            self._grad_output = buffer
            self._launch_backward = self._recorded_backward()
            self._output_with_graph = None  # what it kept lies where the graph left it
        self._launch_backward()
        shared.take_gradients(self._block.unit, self._flat)
        if not self._wanted:
            return None
        # a later block's place is this one's; what is before the first block may keep it
        return buffer.detach() if None in self._places else buffer.clone()

    def _recorded_backward(self) -> Callable[[], None]:
        """Its forward has been launched already: there is no way back to operators."""
        try:
            return self._shared.record(self._backward)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            bound = f"be false for this model: the backward of {self._block.unit.name} cannot be recorded"
            raise ConfigError("runtime.cuda_graphs", bound, True, hint=str(error).splitlines()[0]) from error

    def _fix(self, part: Any) -> Any:
        if not isinstance(part, torch.Tensor):
            return part
        place = None if part.data_ptr() in self._shared.outputs else self._shared.place_of(part)
        fixed = (part if place is None else place.tensor).detach()
        self._places.append(place)
        self._fixed.append(fixed)
        if part.requires_grad:
            self._wanted.append(fixed.requires_grad_())
        return fixed

    def _rebuilt(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._rebuilt(part) for part in value)
        return next(self._inputs)

    def _forward(self) -> None:
        with torch.set_grad_enabled(not self._block.recomputes), _in_place_of(self._block.unit, self._aliases):
            output = self._block.forward(*self._args, **self._kwargs)
        self._rest = tuple(output[1:]) if isinstance(output, tuple | list) else None
        result: torch.Tensor = output if self._rest is None else output[0]
        self.output = result.detach()
        self._output_with_graph = None if self._block.recomputes else result

    def _backward(self) -> None:
        output = self._output_with_graph
        if self._block.recomputes:
            with torch.enable_grad(), _in_place_of(self._block.unit, self._aliases):
                again = self._block.forward(*self._args, **self._kwargs)
            output = again if self._rest is None else again[0]
        assert output is not None
        assert self._grad_output is not None
        sources = [*self._wanted, *self._aliases]
        gradients = torch.autograd.grad(output, sources, self._grad_output, allow_unused=True)
        parts = self._flat.split([alias.numel() for alias in self._aliases])
        left = gradients[len(self._wanted) :]
        with torch.no_grad():
            for part, gradient in zip(parts, left, strict=True):
                if gradient is None:
                    part.zero_()
            used = [part for part, gradient in zip(parts, left, strict=True) if gradient is not None]
            copy_parts(used, [gradient.reshape(-1) for gradient in left if gradient is not None])
            if self._wanted:
                self._grad_output.copy_(gradients[0])


class _Replayed(torch.autograd.Function):
    """Stands in autograd's graph for a block."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, _anchor: torch.Tensor, *_inputs: torch.Tensor) -> torch.Tensor:
        ctx.graph, ctx.num_inputs = graph, len(_inputs)
        output: torch.Tensor = graph.output.detach()
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_input = ctx.graph.launch_backward(grad_output)
        return (None, None, grad_input)[: 2 + ctx.num_inputs]


class _Scout(TorchDispatchMode):
    """Looks for what no graph can hold."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = ""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.found:
            self.found = _obstacle(func, args, kwargs)
        return func(*args, **kwargs)


def _obstacle(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Why a graph cannot hold this operator; empty if it can."""
    name = func._schema.name.removeprefix("aten::")
    if torch.Tag.nondeterministic_seeded in func.tags:
        if "scaled_dot_product" not in name:
            return "it draws random numbers"
        rates = [
            value for argument, value in zip(func._schema.arguments, args, strict=False) if argument.name == "dropout_p"
        ]
        return "it draws random numbers" if any([*rates, kwargs.get("dropout_p", 0.0)]) else ""
    if torch.Tag.data_dependent_output in func.tags:
        return f"it asks the host ({name})"
    if torch.Tag.dynamic_output_shape in func.tags:
        is_index = name in ("index", "_unsafe_index")
        if not is_index or any(part.dtype in (torch.bool, torch.uint8) for part in args[1] if part is not None):
            return f"the sizes in it depend on the data ({name})"
    return ""


@contextmanager
def _in_place_of(unit: Unit, aliases: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within the context the unit's modules read these in place of its leaves, whose hooks then hear of nothing."""
    undo: list[Callable[[], None]] = []
    try:
        for target, alias in zip(unit.targets, aliases, strict=True):
            undo.append(target.stand_in(alias))
        yield
    finally:
        for put_back in undo:
            put_back()


def _common_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _parts(values: Any) -> Iterator[Any]:
    """What is in tuples and lists, however deep."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _parts(value)
        else:
            yield value


def _signature(part: Any) -> Any:
    """What a graph takes for granted of an input."""
    if isinstance(part, torch.Tensor):
        return part.shape, part.stride(), part.dtype, part.requires_grad
    return part
