"""The selective scan against its definition, and the four paths through a map."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmdenoiserep.models.selective_scan import (
    CHUNK,
    MAX_LOOP,
    cross_merge,
    cross_scan,
    cuda_kernel,
    linear_recurrence,
    selective_scan,
)

LENGTHS = [1, 2, CHUNK - 1, 49, MAX_LOOP, MAX_LOOP + 1, 3 * MAX_LOOP + 2, CHUNK * MAX_LOOP, CHUNK * MAX_LOOP + 3, 784]


def arguments(length, states=1, channels=3, directions=4, batch=2, dtype=torch.float64, step=-1.0):
    """Random u, delta, A, B, C, D, delta_bias; ``step`` is the mean of delta."""
    generator = torch.Generator().manual_seed(length)
    inner = directions * channels
    sequence, group = (batch, inner, length), (batch, directions, states, length)
    shapes = sequence, sequence, (inner, states), group, group, (inner,), (inner,)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values[1] += step
    values[2] = -values[2].exp()
    return [value.to(dtype).requires_grad_() for value in values]


def by_definition(u, delta, A, B, C, D, delta_bias):
    channels = u.shape[1] // B.shape[1]
    step = F.softplus(delta + delta_bias[:, None])
    B, C = (x.repeat_interleave(channels, 1) for x in (B, C))
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype)
    ys = []
    for t in range(u.shape[-1]):
        s = step[:, :, t, None]
        h = torch.exp(s * A) * h + s * B[..., t] * u[:, :, t, None]
        ys.append((C[..., t] * h).sum(-1) + D * u[:, :, t])
    return torch.stack(ys, -1)


def value_and_gradients(function, values):
    y = function(*values)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), values)]


@pytest.mark.parametrize('states', [1, 3])
@pytest.mark.parametrize('length', LENGTHS)
def test_value_and_gradients_are_those_of_the_recurrence(length, states):
    expected = value_and_gradients(by_definition, arguments(length, states))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        actual = value_and_gradients(selective_scan, arguments(length, states, dtype=dtype))
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == dtype and a.shape == e.shape
            assert (a - e).abs().max() <= tolerance * e.abs().max()  # that of A is 0 for one position


@pytest.mark.parametrize('step', [-20.0, 30.0, 1000.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_steps_that_forget_nothing_or_everything_give_finite_gradients(step, dtype):
    """A step of e^-20 makes every decay 1 in float32, one of 1000 makes it 0 in any precision."""
    expected = value_and_gradients(by_definition, arguments(300, dtype=dtype, step=step))
    actual = value_and_gradients(selective_scan, arguments(300, dtype=dtype, step=step))
    for a, e in zip(actual, expected, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


def test_a_decay_of_zero_cuts_the_past_off():
    decay, drive = torch.rand(2, 200), torch.randn(2, 200)
    decay[:, 150] = 0
    expected = linear_recurrence(decay[:, 150:], drive[:, 150:])
    drive[:, :150] *= 1e30
    torch.testing.assert_close(linear_recurrence(decay, drive)[:, 150:], expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    values = [value.detach().to(dtype) for value in arguments(300)]
    expected = selective_scan(*(value.float() for value in values))
    assert torch.equal(selective_scan(*values), expected.to(dtype))
    mixed = [value.detach().float() for value in arguments(300)]
    mixed[1] = mixed[1].to(dtype)
    expected = selective_scan(*(value.float() for value in mixed))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(selective_scan(*mixed), expected)


class Watch(TorchDispatchMode):
    """Counts operations and keeps the size of the largest result."""

    calls, largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += not func.is_view
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_memory_is_linear_and_time_logarithmic_in_the_length():
    calls = {}
    for length in (MAX_LOOP, CHUNK**3 * MAX_LOOP):
        with torch.no_grad(), Watch() as watch:
            selective_scan(*arguments(length, states=2))
        assert watch.largest == 2 * 12 * 2 * length
        calls[length] = watch.calls
    assert calls[CHUNK**3 * MAX_LOOP] < 2 * calls[MAX_LOOP]


@pytest.fixture
def interface(monkeypatch):
    """Stands in for mamba_ssm.ops.selective_scan_interface, where nothing is installed."""
    modules = {name: ModuleType(name) for name in ('mamba_ssm', 'mamba_ssm.ops')}
    modules['mamba_ssm.ops.selective_scan_interface'] = interface = ModuleType('selective_scan_interface')
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    cuda_kernel.cache_clear()
    yield interface
    cuda_kernel.cache_clear()


class OnGPU(torch.Tensor):
    """A tensor of the CPU that claims to be on a GPU, for every build of torch."""

    is_cuda = True


def gpu_arguments(dtype=torch.float32):
    return [value.to(dtype).as_subclass(OnGPU) for value in arguments(300)]


def test_cuda_tensors_go_to_the_kernel_where_it_works(interface):
    calls = []

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        calls.append((u.dtype, tuple(B.shape), z, delta_bias.shape, delta_softplus))
        return torch.full_like(u, 3)

    interface.selective_scan_fn = selective_scan_fn
    selective_scan(*arguments(300, dtype=torch.float32))
    assert not calls, 'the kernel is for CUDA only'
    for dtype in (torch.float32, torch.bfloat16):
        y = selective_scan(*gpu_arguments(dtype))
        assert y.dtype == dtype and y.shape == (2, 12, 300) and (y == 3).all()
        assert calls[-1] == (torch.float32, (2, 4, 1, 300), None, (12,), True)
    assert len(calls) == 3, 'it is tried once'
    torch.testing.assert_close(
        selective_scan(*gpu_arguments(torch.float64)).as_subclass(torch.Tensor), selective_scan(*arguments(300))
    )
    assert len(calls) == 3, 'the kernel does not know float64'


@pytest.mark.parametrize('how', ['raises', 'is missing', 'cannot be imported'])
def test_a_kernel_that_does_not_work_is_not_used(interface, how, monkeypatch):
    def selective_scan_fn(*args, **kwargs):
        raise RuntimeError('selective_scan_cuda was not built')

    if how == 'raises':
        interface.selective_scan_fn = selective_scan_fn
    elif how == 'cannot be imported':
        monkeypatch.setitem(sys.modules, 'mamba_ssm.ops.selective_scan_interface', None)
    torch.testing.assert_close(
        selective_scan(*gpu_arguments()).as_subclass(torch.Tensor), selective_scan(*arguments(300, dtype=torch.float32))
    )
    assert cuda_kernel(torch.device('cpu')) is None


@pytest.mark.parametrize(('height', 'width'), [(3, 5), (5, 2), (1, 4), (4, 1), (3, 3)])
def test_the_paths_visit_the_pixels_in_their_order(height, width):
    x = torch.randn(2, 3, height, width)
    by_rows = [(i, j) for i in range(height) for j in range(width)]
    by_columns = [(i, j) for j in range(width) for i in range(height)]
    paths = [by_rows, by_columns, by_rows[::-1], by_columns[::-1]]
    sequences = cross_scan(x)
    assert sequences.shape == (2, 4, 3, height * width)
    merged = torch.zeros(2, 3, height, width)
    y = torch.randn(sequences.shape)
    for k, path in enumerate(paths):
        for t, (i, j) in enumerate(path):
            assert torch.equal(sequences[:, k, :, t], x[:, :, i, j])
            merged[:, :, i, j] += y[:, k, :, t]
    torch.testing.assert_close(cross_merge(y, height, width), merged.flatten(2))
