"""A second device without hardware, for code that is written for GPUs.

Its tensors say that they are on a GPU and hold their values in the host's memory, so that whole training runs
go through it with real numbers.  What a GPU refuses is refused: operands on different devices, and products
of different float types.  What a GPU has to be waited for is noted, with who asked: a value that is read, a
number of elements that is counted, a copy from or to the host.

``set_up`` is for a process of its own: torch has one such device a process, and knows of it until its end.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretend"
REPOSITORY = Path(__file__).resolve().parents[1]
READS = set(
    "_local_scalar_dense nonzero masked_select equal is_nonzero bincount histc"
    " _unique _unique2 unique_dim unique_consecutive unique_dim_consecutive".split()
)
COPIES = {"_to_copy", "copy_", "copy", "lift_fresh", "_copy_from"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
PRODUCTS = set(
    "mm addmm addmm_ bmm baddbmm baddbmm_ mv addmv dot linear convolution index_put index_put_".split()
)
LIBRARIES: list[torch.library.Library] = []  # what is registered is there as long as these are
# Elsewhere a number on the host, without dimensions, may stand beside tensors on a GPU.
WHOLE = PRODUCTS | {"cat", "stack"}


class Mixed(RuntimeError):
    """Operands that a GPU would refuse together."""


@dataclass(frozen=True)
class Wait:
    """kind: read, counted, from host or to host; operator: torch's; by: the file and function that asked."""

    kind: str
    operator: str
    by: str


class Pretended(torch.Tensor):
    """A tensor on the device; ``inner`` holds its values."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other) -> None:
        torch.Tensor.data.__set__(self, other)
        self.inner = other.inner

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise Mixed(f"numpy: {self} is not on the host; asked by {_by()}")

    def __array__(self, *_, **__):
        return self.numpy()

    def __repr__(self, **_) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _done(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Inside, the device is there.  waits: what was waited for."""

    latest: Any = None  # what threads of the backward pass note into

    def __init__(self):
        super().__init__()
        self.waits: list[Wait] = []
        Device.latest = self

    def __enter__(self):
        # torch.tensor makes its tensor on the host then, and moves it where this mode sees it.
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(self.before)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _done(function, args, kwargs or {})


def set_up() -> torch.device:
    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    torch.nn.Module.to = _module_to
    _set_up_autocast()
    return torch.device(NAME, 0)


MODULE_TO = torch.nn.Module.to


def _module_to(self, *args, **kwargs):
    """nn.Module.to, which would untie matrices and replace parameters each time, as it cannot write one kind
    of tensor into the other."""
    device, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type != NAME:
        return MODULE_TO(self, *args, **kwargs)
    known: dict[torch.Tensor, torch.Tensor] = {}
    for module in self.modules():
        for held in (module._parameters, module._buffers):
            for name, one in held.items():
                if one is None or isinstance(one, Pretended):
                    continue
                if one not in known:
                    known[one] = one.detach().to(device)
                    if held is module._parameters:
                        known[one] = torch.nn.Parameter(known[one], one.requires_grad)
                held[name] = known[one]
    return self


def _set_up_autocast() -> None:
    """Under torch.autocast the operands of products get its type, as CUDA's do; nothing else is known."""
    key = torch._C.DispatchKey.AutocastPrivateUse1
    every, aten = (torch.library.Library(name, "IMPL", key.name) for name in ("_", "aten"))
    every.fallback(torch.library.fallthrough_kernel)

    def casting(function):
        def call(*args, **kwargs):
            dtype = torch.get_autocast_dtype(NAME)
            cast = pytree.tree_map_only(
                torch.Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, (args, kwargs)
            )
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return function(*cast[0], **cast[1])

        return call

    for name in "linear matmul mm addmm bmm baddbmm scaled_dot_product_attention".split():
        aten.impl(name, casting(getattr(torch.ops.aten, name).default))
    LIBRARIES.extend([every, aten])


def _done(function, args, kwargs: dict):
    """What ``function`` gives, worked out on the host; on the device if its operands are, or ``device`` says
    so."""
    leaves = pytree.tree_leaves((args, kwargs))
    there = [leaf for leaf in leaves if isinstance(leaf, Pretended)]
    here = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Pretended)]
    wanted = kwargs.get("device")
    to_device = bool(there) if wanted is None else torch.device(wanted).type == NAME
    if there or to_device:
        name = function.overloadpacket.__name__
        _refuse(name, there, here, args)
        if Device.latest is not None:
            Device.latest.waits += _waits(name, there, here, args, kwargs)
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if to_device else wanted}
    plain, options = pytree.tree_map_only(Pretended, lambda one: one.inner, (args, kwargs))
    found = function(*plain, **options)
    known = {id(one.inner): one for one in there}

    def placed(tensor):
        if id(tensor) in known:
            own = known[id(tensor)]
            assert own.shape == tensor.shape, f"{function} changes a shape in place, which is not known here"
            return own
        return Pretended(tensor) if to_device else tensor

    return pytree.tree_map_only(torch.Tensor, placed, found)


def _refuse(name: str, there: list, here: list, args) -> None:
    """Raises Mixed on operands that a GPU does not take together."""
    if there and name not in COPIES:
        indices = [one for one in args[1] if one is not None] if name in INDEXES else []
        apart = [
            one for one in here if (one.dim() or name in WHOLE) and not any(one is index for index in indices)
        ]
        if apart:
            raise Mixed(
                f"{name}: {tuple(apart[0].shape)} is on the host, {there[0]} is not; asked by {_by()}"
            )
    floats = {one.dtype for one in [*there, *here] if one.is_floating_point()}
    if (name in PRODUCTS or "scaled_dot_product" in name) and len(floats) > 1:
        raise Mixed(f"{name}: operands of {sorted(map(str, floats))}; asked by {_by()}")


def _waits(name: str, there: list, here: list, args, kwargs: dict) -> Iterator[Wait]:
    if there and (name in READS or name == "repeat_interleave" and kwargs.get("output_size") is None):
        yield Wait("read", name, _by())
    if name in INDEXES:
        indices = [one for one in args[1] if one is not None]
        masks = [one for one in indices if one.dtype in (torch.bool, torch.uint8)]
        filled = "put" in name and args[2].numel() == 1 and len(masks) == len(indices)
        if masks and not filled:
            yield Wait("counted", name, _by())
        if there and any(not isinstance(one, Pretended) for one in indices):
            yield Wait("from host", name, _by())
    if name in ("_to_copy", "copy_", "copy"):
        onto = isinstance(args[0], Pretended)
        if name == "_to_copy":
            given = kwargs.get("device")
            source, onto = args[0], onto if given is None else torch.device(given).type == NAME
        else:
            source = args[1]
        # What is read from the device without waiting is not there yet: waiting is what is right.
        if isinstance(source, Pretended) and not onto:
            yield Wait("to host", name, _by())
        elif onto and not isinstance(source, Pretended):
            waiting = not (kwargs.get("non_blocking") or name != "_to_copy" and args[2:3] == (True,))
            if waiting:
                yield Wait("from host", name, _by())


def _by() -> str:
    """The file and function of the innermost frame that is neither torch's nor of this file."""
    frame: Any = sys._getframe(1)
    skipped = f"{Path(torch.__file__).parent}/"
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((skipped, "<")):
            shown = file.rpartition("site-packages/")[2].removeprefix(f"{REPOSITORY}/")
            return f"{shown}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"
