"""A GPU that is not there: tensors that say cuda:0 and hold their numbers on the CPU, and refuse what a GPU refuses.

    with pretend() as gpu: model = PatchCore(..., device='cuda:1').fit(images)

What raises `Refused`: tensors of two devices in one operation, a CPU generator for a tensor of the GPU, indices on a GPU into a tensor
of the CPU, and shapes that `_int_mm` does not take on CUDA. `.numpy()` raises torch's own TypeError. `gpu` counts by
line of the package: where the host waits for the GPU, what is copied to and fro, and what is worked out in float64. It leans on inner
parts of torch, and so works in the versions where that was seen: `unusable` says why not elsewhere."""
import contextlib
import functools
import linecache
import os
import sys
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SEEN_TO_WORK = ['2.14'] # versions of torch

def unusable()->str: # empty: it can be used
    "Say why nothing can be pretended here."
    if torch.cuda.is_available(): return 'there is a GPU, and nothing needs to be pretended'
    version = '.'.join(torch.__version__.split('.')[:2])
    return '' if version in SEEN_TO_WORK else f'tests/pretend.py leans on inner parts of torch as of {", ".join(SEEN_TO_WORK)}, and this is {version}'

class Refused(RuntimeError):
    "A GPU would have raised here."


# What is counted

class Seen:
    "What happened on the GPU, by line of the package."
    def __init__(self, room=None, doubles=True):
        self.room = room # bytes of the largest tensor that fits; None: any does
        self.doubles_there = doubles
        self.devices = set() # on which something was made
        self.reset()

    def reset(self):
        "Begin to count anew."
        self.syncs, self.uploads, self.downloads, self.doubles = (Counter() for _ in range(4))

SEEN = Seen()

def place()->str:
    "Name the innermost line of the package that is being run."
    frame = sys._getframe(1)
    while frame and '/patchcore_nb/' not in frame.f_code.co_filename: frame = frame.f_back
    if frame is None: return 'outside of the package'
    name, line = frame.f_code.co_filename, frame.f_lineno
    return f'{os.path.basename(name)}:{line} {linecache.getline(name, line).strip()}'

def note(kind:str): getattr(SEEN, kind)[place()] += 1

def refuse(why:str): raise Refused(f'{why}, at {place()}')


# The tensor

class Away(torch.Tensor):
    "A tensor that says it lies on a GPU; its numbers lie here."
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers, device):
        layout = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype)
        made = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, device=device, **layout)
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return Call(func, args, kwargs or {}).run()

    def tolist(self):
        note('syncs')
        return self.numbers.tolist()

    def new_tensor(self, data, **kw): return torch.tensor(data, **dict(dtype=self.dtype, device=self.device) | kw) # torch's own asks which GPU is in use
    def numpy(self, *args, **kw): raise TypeError(f"can't convert {self.device} device type tensor to numpy, at {place()}")
    __array__ = numpy
    def __repr__(self): return f'Away({self.device}, {self.numbers!r})'

def each(f, x): # lists and tuples deep
    "Do something to what an operation takes or gives."
    return type(x)(each(f, o) for o in x) if type(x) in (list, tuple) else f(x)

def tensors_in(x)->list:
    "List the tensors among what an operation takes."
    if type(x) in (list, tuple): return [o for part in x for o in tensors_in(part)]
    return [x] if isinstance(x, torch.Tensor) else []

def at_hand(x): return x.numbers if isinstance(x, Away) else x

def full_name(device)->torch.device: # a GPU has a number
    "Take a device as torch does: without a number, it is the first."
    device = torch.device(device)
    return torch.device(device.type, 0) if device.type == 'cuda' and device.index is None else device


# One operation

@functools.cache
def is_composed(func)->bool: # of simpler operations; inference mode leaves it whole
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), 'CompositeImplicitAutograd')

MOVES = {'_to_copy', 'copy_'} # between devices
INDEXED = {'index', '_unsafe_index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index_put'}
WAITS = {'_local_scalar_dense', 'nonzero', 'unique_consecutive', 'unique_dim', '_unique2', 'masked_select', 'is_nonzero', 'equal'} # the host cannot go on before the GPU is done
RESHAPES = {'resize_', 'set_', 't_', 'transpose_', 'squeeze_', 'unsqueeze_', 'as_strided_'} # which a wrapper would not notice

class Call:
    "An operation of torch with its arguments."
    def __init__(self, func, args, kwargs):
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = func.overloadpacket.__name__
        self.tensors = tensors_in([*args, *kwargs.values()])
        self.away = [o for o in self.tensors if isinstance(o, Away)]
        asked = kwargs.get('device')
        self.asked = None if asked is None else full_name(asked)
        self.device = self.asked or (self.away[0].device if self.away else torch.device('cpu')) # of what is made
        if self.name == 'copy_': self.device = args[0].device

    def run(self):
        if not self.away and self.device.type == 'cpu': return self.func(*self.args, **self.kwargs)
        if is_composed(self.func):
            with Mode(): return self.func.decompose(*self.args, **self.kwargs)
        if self.name in RESHAPES: refuse(f'{self.name}: cannot be pretended')
        if self.name not in MOVES: self.check_devices()
        self.check_generator()
        self.check_product()
        self.count()
        return self.carry_out()

    def indices(self): return [o for o in self.args[1] if isinstance(o, torch.Tensor)] if self.name in INDEXED else []

    def check_devices(self):
        indices, whole = self.indices(), [o for o in self.tensors if o.dim()]
        if indices and not isinstance(self.args[0], Away):
            if any(isinstance(o, Away) for o in indices): refuse(f'{self.name}: indices on a GPU into a tensor of the CPU')
        elif indices: whole = [o for o in whole if isinstance(o, Away) or not any(o is i for i in indices)] # those of the CPU are brought over
        devices = {str(o.device) for o in [*whole, *self.away]}
        if self.asked: devices.add(str(self.asked))
        if len(devices) > 1: refuse(f'{self.name}: tensors of {" and ".join(sorted(devices))}, shapes {[tuple(o.shape) for o in self.tensors]}')

    def check_generator(self):
        own = self.kwargs.get('generator')
        if own is not None and own.device.type != self.device.type: refuse(f'{self.name}: a generator of the {own.device.type} for a tensor on {self.device}')

    def check_product(self):
        if self.name != '_int_mm': return
        (m, k), n = self.args[0].shape, self.args[1].shape[1]
        if m <= 16 or not k or k % 8 or n % 8: refuse(f'_int_mm of {m} x {k} and {k} x {n}: CUDA takes more than 16 rows, and multiples of 8')
        out = self.kwargs.get('out')
        if out is not None and not out.is_contiguous(): refuse('_int_mm: what it shall write to is not contiguous')

    def count(self):
        indices = self.indices()
        masks = [o for o in indices if o.dtype in (torch.bool, torch.uint8)]
        filled = 'put' in self.name and self.args[2].numel() == 1 # by masked_fill, which does not wait
        if self.name in WAITS or masks and not filled or self.name == 'repeat_interleave' and self.kwargs.get('output_size') is None: note('syncs')
        if isinstance(self.args[0] if self.args else None, Away) and not all(isinstance(o, Away) for o in indices): note('uploads')
        if self.name in MOVES: self.count_copy()
        if self.device.type == 'cpu': return
        wide = any(o.dtype == torch.float64 for o in self.away) or self.kwargs.get('dtype') == torch.float64
        if wide and not SEEN.doubles_there: raise TypeError(f'this GPU has no float64, at {place()}')
        if wide: note('doubles')

    def count_copy(self):
        source = self.args[1] if self.name == 'copy_' else self.args[0]
        if source.device.type != self.device.type: note('downloads' if self.device.type == 'cpu' else 'uploads')

    def carry_out(self):
        kwargs = dict(self.kwargs)
        if self.asked: kwargs['device'] = torch.device('cpu')
        if self.name == '_to_copy': kwargs.pop('non_blocking', None)
        made = self.func(*each(at_hand, self.args), **{k: each(at_hand, o) for k, o in kwargs.items()})
        given = {id(at_hand(o)): o for o in self.tensors} # operations in place, and `out=`, give back what they were given
        return each(lambda o: self.send(o, given), made)

    def send(self, o, given):
        if not isinstance(o, torch.Tensor): return o
        if id(o) in given: return given[id(o)]
        if self.device.type == 'cpu': return o
        n = o.untyped_storage().nbytes()
        if SEEN.room is not None and n > SEEN.room: raise torch.cuda.OutOfMemoryError(f'CUDA out of memory. Tried to allocate {n} bytes. GPU has {SEEN.room} bytes')
        SEEN.devices.add(str(self.device))
        return Away(o, self.device)

class Mode(TorchDispatchMode):
    "All operations go by `Call`."
    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE # or torch starts CUDA before it asks us

    @classmethod
    def _should_skip_dynamo(cls): return False # or torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return Call(func, args, kwargs or {}).run()


# The machine

def as_if(count:int, free:int)->dict: # name in `torch.cuda` -> function
    "List what has to be answered otherwise."
    return dict(
        is_available=lambda: True, device_count=lambda: count, current_device=lambda: 0, is_initialized=lambda: True, _lazy_init=lambda: None,
        mem_get_info=lambda *a: (free, free), memory_reserved=lambda *a: 0, memory_allocated=lambda *a: 0, get_device_name=lambda *a: 'pretended',
        get_device_capability=lambda *a: (9, 0), is_bf16_supported=lambda *a, **kw: True)

@contextlib.contextmanager
def switched(read, write):
    "Have a switch of torch on for a while."
    before = read()
    write(True)
    try: yield
    finally: write(before)

@contextlib.contextmanager
def pretend(
    count=2,      # how many
    room=None,    # bytes of the largest tensor that fits
    free=10**11,  # bytes of memory
    doubles=True, # is there float64? MPS has none
): # yields a `Seen`
    "Pretend that this machine has GPUs."
    global SEEN
    before, SEEN = SEEN, Seen(room, doubles)
    torch._C._ensureCUDADeviceGuardSet()
    future = torch.__future__
    with contextlib.ExitStack() as stack:
        for k, f in as_if(count, free).items(): stack.enter_context(mock.patch.object(torch.cuda, k, f))
        stack.enter_context(switched(torch._C._only_lift_cpu_tensors, torch._C._set_only_lift_cpu_tensors)) # torch.tensor(..., device='cuda') is made here first
        stack.enter_context(switched(future.get_overwrite_module_params_on_conversion, future.set_overwrite_module_params_on_conversion)) # a parameter cannot change its kind
        stack.enter_context(torch.backends.cudnn.flags(enabled=False, allow_tf32=torch.backends.cudnn.allow_tf32)) # whose operations are not there for a CPU
        stack.enter_context(Mode())
        try: yield SEEN
        finally: SEEN = before
