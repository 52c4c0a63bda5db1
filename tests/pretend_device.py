"""GPUs that are none: tensors stay on the CPU, but are known to lie elsewhere, and must not be mixed.

Within :func:`pretended_gpus` every memory has a device. ``tensor.device`` tells it, ``.to`` and ``device=``
choose it, the result of an operation lies where its arguments do, and arguments on several devices are an
error, as on a real GPU: but for numbers (tensors without axes) and indices, which may come from the CPU.
Numbers are computed as ever. What is not pretended: kernels, precision, speed, how much memory there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CPU = torch.device("cpu")
_ANYWHERE = {"aten::copy_", "aten::set_", "aten::_local_scalar_dense"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class MixedDevicesError(RuntimeError):
    """Tensors of several devices, or a generator of another, where one device is wanted."""


class _Devices:
    """Which memory lies where, and where what is made from nothing would lie (``None``: on the CPU)."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self.making: list[torch.device | None] = [None]

    @contextmanager
    def making_on(self, device: torch.device | None) -> Iterator[None]:
        self.making.append(device)
        try:
            yield
        finally:
            self.making.pop()

    def of(self, tensor: Tensor) -> torch.device:
        return self._known.get(_storage(tensor)._cdata, (None, _CPU))[1]

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        storage = _storage(tensor)
        # The weak reference keeps the address from being given to another memory.
        self._known[storage._cdata] = StorageWeakRef(storage), device
        return tensor

    def put_new(self, result: object, arguments: object, device: torch.device) -> None:
        """Put what is no view of the arguments."""
        old = {_storage(tensor)._cdata for tensor in _tensors(arguments)}
        for tensor in _tensors(result):
            if _storage(tensor)._cdata not in old:
                self.put(tensor, device)

    def common(self, name: str, args: tuple, kwargs: dict) -> torch.device | None:
        """Where an operation is computed; ``None`` if that does not follow from its arguments."""
        if name in _ANYWHERE:
            return self.of(args[0])
        given = _tensors((args, kwargs))
        if name in _INDEXING:
            first = self.of(args[0])
            given = [t for t in given if t.ndim and not (t is not args[0] and self.of(t) == _CPU != first)]
        places = {self.of(tensor) for tensor in given if tensor.ndim or self.of(tensor) != _CPU}
        of_cpu = any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs)))
        if len(places | ({_CPU} if of_cpu else set())) > 1:
            seen = [(tuple(tensor.shape), str(self.of(tensor))) for tensor in given]
            raise MixedDevicesError(f"{name} is given {seen}{' and a generator of the CPU' * of_cpu}")
        return places.pop() if places else _CPU if given else None


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _device(name: object) -> torch.device:
    device = torch.device(name)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


class _Operations(TorchDispatchMode):
    """Sees what is computed, gradients included."""

    def __init__(self, devices: _Devices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        device = self._devices.common(func._schema.name, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        self._devices.put_new(result, (args, kwargs), device or self._devices.making[-1] or _CPU)
        return result


class _Functions(TorchFunctionMode):
    """Sees what is asked for by name: where tensors are, and where they should be."""

    def __init__(self, devices: _Devices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(self, func, types, args=(), kwargs=None):
        devices, kwargs, given = self._devices, dict(kwargs or {}), _tensors((args, kwargs))
        if func == Tensor.device.__get__:  # Another object each time.
            return devices.of(args[0])
        if func in (Tensor.numpy, Tensor.__array__) and devices.of(args[0]) != _CPU:
            raise TypeError(f"can't convert a tensor on {devices.of(args[0])} to numpy")
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, *args, **kwargs)
        wanted = kwargs.pop("device", None)
        here = next((devices.of(one) for one in given if devices.of(one) != _CPU), _CPU if given else None)
        there = here if wanted is None else _device(wanted)
        if there not in (None, _CPU) and not given and kwargs.get("generator") is not None:
            raise MixedDevicesError(f"what {func.__name__} makes on {there} is given a generator of the CPU")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and here != _CPU:
            args = (args[0], self._indices(args[1], here), *args[2:])
        with devices.making_on(here if given else there):
            result = func(*args, **kwargs)
        if func is Tensor.__deepcopy__:
            return devices.put(result, devices.of(args[0]))
        if wanted is not None and not given:
            # What is made of lists is made without any operation.
            devices.put_new(result, (), there)
        return self._moved(Tensor.to, result, there) if given and wanted is not None else result

    def _moved(self, func, tensor, *args, **kwargs):
        """What ``tensor.to(...)`` gives; its device, type or example, then two truth values."""
        devices, here = self._devices, self._devices.of(tensor)
        flags = [one for one in args if isinstance(one, bool)]
        copying = kwargs.pop("copy", len(flags) > 1 and flags[1])
        kwargs.pop("non_blocking", None)
        there = {Tensor.cpu: "cpu", Tensor.cuda: "cuda"}.get(func, here)
        for one in [*args, kwargs.pop("device", None), kwargs.pop("other", None)]:
            if isinstance(one, Tensor):
                there, kwargs["dtype"] = devices.of(one), one.dtype
            elif isinstance(one, torch.dtype):
                kwargs["dtype"] = one
            elif isinstance(one, str | torch.device):
                there = one
        with devices.making_on(here):
            result = tensor.to(**kwargs) if kwargs else tensor
            is_given = _storage(result)._cdata == _storage(tensor)._cdata
            if is_given and (copying or _device(there) != here):
                result = result.clone()
        return result if _device(there) == here else devices.put(result, _device(there))

    def _indices(self, index, device):
        """PyTorch makes tensors of lists where the indexed tensor is."""
        if isinstance(index, tuple):
            return tuple(self._indices(one, device) for one in index)
        return self._devices.put(torch.tensor(index), device) if isinstance(index, list) else index


@contextmanager
def pretended_gpus(count: int = 2) -> Iterator[SimpleNamespace]:
    """Let there be GPUs in the block.

    Args:
        count: How many.

    Yields:
        ``states``, of the random generator of each, by number: bytes, which nobody draws from.
    """
    states = {number: torch.zeros(16, dtype=torch.uint8) for number in range(count)}

    def seed_all(seed: int) -> None:
        for number in states:
            content = bytearray(int(seed).to_bytes(15, "little") + bytes([number]))
            states[number] = torch.frombuffer(content, dtype=torch.uint8)

    def set_state(state: Tensor, device: object = "cuda") -> None:
        number = device if isinstance(device, int) else _device(device).index
        assert number in states, f"there is no GPU {number}"
        states[number] = state.clone()

    def get_state(device: object = "cuda") -> Tensor:
        return states[device if isinstance(device, int) else _device(device).index].clone()

    pretended = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "pretended",
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_capability": lambda device=None: (8, 0),
        "manual_seed_all": seed_all,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "get_rng_state_all": lambda: [get_state(number) for number in states],
        "set_rng_state_all": lambda all_: [set_state(one, number) for number, one in enumerate(all_)],
    }
    devices = _Devices()
    with ExitStack() as stack:
        for name, value in pretended.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # It asks the driver whether a graph is being recorded.
        capturing = "_accelerator_graph_capture_health_check"
        stack.enter_context(mock.patch.object(torch.optim.Optimizer, capturing, return_value=None))
        stack.enter_context(_Operations(devices))
        stack.enter_context(_Functions(devices))
        yield SimpleNamespace(states=states)
