"""Pretend GPUs on a CPU: tensors that say they are on `xpu:0` or `xpu:1`, and operations that refuse
tensors of two of them, as a machine with two GPUs does.

Every tensor is in the host's memory. A label by storage says where it pretends to be; `.device`
answers by it, and factories, `.to` and `.cpu` set it. `xpu`, because PyTorch takes the name without
a driver, and the product's code asks for nothing but `cuda`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

HOST = torch.device("cpu")
GPUS = (torch.device("xpu:0"), torch.device("xpu:1"))
MAY_MIX = {"copy_", "_to_copy", "set_", "_copy_from"}
"""Operations between devices."""


class MixedDevices(Exception):
    """An operation has got tensors of several devices."""


class _Labels:
    def __init__(self) -> None:
        self._labels: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def of(self, tensor: torch.Tensor) -> torch.device | None:
        """None: a tensor without a storage of its own (meta, or a functorch wrapper)."""
        storage = _storage(tensor)
        if storage is None:
            return None
        entry = self._labels.get(storage._cdata)
        return HOST if entry is None else entry[1]

    def has(self, tensor: torch.Tensor) -> bool:
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._labels

    def set(self, tensor: torch.Tensor, device: torch.device) -> None:
        storage = _storage(tensor)
        if storage is not None:
            # The reference keeps the address from being used again.
            self._labels[storage._cdata] = (StorageWeakRef(storage), device)
        if len(self._labels) > 20_000:
            self._labels = {
                key: entry
                for key, entry in self._labels.items()
                if not entry[0].expired()
            }

    def at_address(self, address: int) -> torch.device | None:
        """The device of the storage that holds an address."""
        for reference, device in list(self._labels.values()):
            if reference.expired():
                continue
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                continue
            start = storage.data_ptr()
            if start <= address < start + storage.nbytes():
                return device
        return None


def _storage(tensor: torch.Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        if tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return None
        try:
            return tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None


LABELS = _Labels()


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        ctx.source = LABELS.of(x)
        return _copied(x, device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _copied(gradients[0], ctx.source), None


def _copied(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        copy = x.detach().clone()
    LABELS.set(copy, device)
    return copy


def move(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; itself where it is there."""
    if LABELS.of(x) == device or x.is_meta:
        return x
    moved: torch.Tensor = (
        _Move.apply(x, device) if x.requires_grad else _copied(x, device)
    )
    return moved


class _Functions(TorchFunctionMode):
    """Devices as Python code asks for them and names them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return LABELS.of(args[0]) or func(*args)
        if func is torch.Tensor.get_device:
            return LABELS.of(args[0]).index
        if func is torch.Tensor.cpu:
            return move(args[0], HOST)
        if func is torch.Tensor.to:
            return self._to(args[0], args[1:], kwargs)
        if func is torch.autograd.backward:
            # A mode is not active within the functions that it is asked about.
            with self:
                return _run_backward(*args[0], kwargs["grad_tensors"])
        device = kwargs.get("device")
        if device is None or _as_device(device).type == "meta":
            return func(*args, **kwargs)
        kwargs["device"] = HOST
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            # Factories make storages of their own.
            LABELS.set(result, _as_device(device))
        return result

    @staticmethod
    def _to(tensor: Any, args: Any, kwargs: Any) -> Any:
        device = kwargs.pop("device", None)
        rest = []
        for argument in args:
            if isinstance(argument, torch.device | str):
                device = argument
            elif isinstance(argument, torch.Tensor):
                device = LABELS.of(argument)
                rest.append(argument.dtype)
            else:
                rest.append(argument)
        if device is not None and _as_device(device).type == "meta":
            return torch.Tensor.to(tensor, *args, device=device, **kwargs)
        kwargs.pop("non_blocking", None)
        # None and the flag of copies without waiting, as modules call it.
        rest = [item for item in rest if isinstance(item, torch.dtype)]
        if rest or kwargs:
            tensor = torch.Tensor.to(tensor, *rest, **kwargs)
        if device is None:
            return tensor
        return move(tensor, _as_device(device))


def _run_backward(output: torch.Tensor, gradient: torch.Tensor) -> None:
    torch.autograd.graph._engine_run_backward(
        (output,), (gradient,), False, False, (),
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip


def _as_device(device: Any) -> torch.device:
    return device if isinstance(device, torch.device) else torch.device(device)


class _Operations(TorchDispatchMode):
    """Refuses operations on tensors of several devices."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = _tensors((args, kwargs or {}))
        device = one_device(str(func), tensors, func.overloadpacket.__name__ in MAY_MIX)
        with torch._C.DisableTorchFunction():
            result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if not LABELS.has(tensor) and device != HOST:
                LABELS.set(tensor, device)
        return result


def one_device(
    name: str, tensors: list[torch.Tensor], may_mix: bool = False
) -> torch.device:
    """The device of an operation's tensors. Numbers on the host go with all of them."""
    devices = [LABELS.of(tensor) for tensor in tensors]
    labelled = {
        device
        for device, tensor in zip(devices, tensors, strict=True)
        if device is not None and not (tensor.dim() == 0 and device == HOST)
    }
    if may_mix:
        return devices[0] or HOST
    if name.startswith(("aten.index.", "aten.index_put")) and devices[0] != HOST:
        # As PyTorch, which copies indices.
        labelled.discard(HOST)
    if len(labelled) > 1:
        shapes = [
            f"{tuple(tensor.shape)} on {device}"
            for tensor, device in zip(tensors, devices, strict=True)
        ]
        raise MixedDevices(f"{name}: {', '.join(shapes)}")
    return labelled.pop() if labelled else HOST


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _checked_launch(original: Any) -> Any:
    """Launch a kernel by the interpreter, once its arguments are found on one device.

    What adapters' tables point at must be there too.
    """
    from finetune.engine.packed.gpu.adapter_tables import COLUMNS

    known: set[tuple[int, torch.device | None]] = set()
    """Addresses that were found on a device: tables are read by many kernels."""

    def check(kernel: Any, arguments: Any) -> None:
        tensors = [item for item in arguments if isinstance(item, torch.Tensor)]
        # Kernels take no numbers from the host's memory.
        devices = {LABELS.of(tensor) for tensor in tensors}
        if len(devices) > 1:
            shapes = [f"{tuple(t.shape)} on {LABELS.of(t)}" for t in tensors]
            raise MixedDevices(f"{kernel}: {', '.join(shapes)}")
        if devices != {_Current.device}:
            raise MixedDevices(f"{kernel}: {devices}, launched on {_Current.device}")
        for table in tensors:
            is_int = table.dtype == torch.int64
            if is_int and table.dim() == 2 and table.shape[1] == COLUMNS:
                for row in table.tolist():
                    for address in row[:4] if row[4] else ():
                        found = {(address, device) for device in devices}
                        if found <= known:
                            continue
                        device = LABELS.at_address(address)
                        if device not in devices:
                            raise MixedDevices(
                                f"{kernel}: a table of {devices}: {device}"
                            )
                        known.update(found)

    def launch(kernel: Any, grid: Any, arguments: Any, *others: Any) -> Any:
        check(kernel, arguments)
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return original(kernel, grid, arguments, *others)

    return launch


class _Current:
    """Stands for `torch.cuda.device`: the GPU on which kernels are launched."""

    device = GPUS[0]

    def __init__(self, device: torch.device) -> None:
        self._devices = [device]

    def __enter__(self) -> None:
        self._devices.append(_Current.device)
        _Current.device = self._devices[0]

    def __exit__(self, *_: object) -> None:
        _Current.device = self._devices.pop()


class _Generator(torch.Generator):
    """Draws for any device."""

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls)


@contextlib.contextmanager
def pretend_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse operations on tensors of two devices within the block."""
    launch = "finetune.engine.packed.gpu.launch.compile_and_launch"
    from finetune.compat import compile_and_launch

    monkeypatch.setattr(launch, _checked_launch(compile_and_launch))
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr(torch.cuda, "device", _Current)
    # Of two passes it compares the devices that saved tensors say, in C++ for one of them.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    monkeypatch.setitem(checks, "default", lambda tensor: None)
    with _Functions(), _Operations():
        yield


def spread(base: Any, gpus: int = 2) -> Any:
    """Put a loaded base on pretend GPUs, as `load_base` does on real ones; return it."""
    from finetune.model.layer_devices import WeightBytes, move_inputs, spread_blocks

    placement = spread_blocks(base, gpus, WeightBytes(2, 2))
    for name, gpu in placement.device_map(base).items():
        module = base.get_submodule(name)
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data = move(tensor.data, GPUS[gpu])
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                state.to(GPUS[gpu])
        # Those of bitsandbytes in 8 bits.
        for layer in module.modules():
            for owner in (
                getattr(layer, "weight", None),
                getattr(layer, "state", None),
            ):
                for name in ("CB", "SCB"):
                    if isinstance(getattr(owner, name, None), torch.Tensor):
                        setattr(owner, name, move(getattr(owner, name), GPUS[gpu]))
    if gpus > 1:
        move_inputs(base)
    return base
