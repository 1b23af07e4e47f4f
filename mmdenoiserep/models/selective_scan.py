"""The selective scan of VMamba: a linear recurrence along four paths through a feature map. Needs torch alone."""

import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4
"""Number of positions in a chunk."""

MAX_LOOP = 64
"""Longest sequence that is computed without chunks, which are not faster below."""


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """Computes the selective scan (Gu and Dao 2023, arXiv 2312.00752), differentiable.

    For every image, every direction of K and every channel, with N states h, which start at zero,

        ``s_t = softplus(delta_t + delta_bias)``
        ``h_t = exp(s_t A) h_{t-1} + s_t B_t u_t``,   ``y_t = C_t h_t + D u_t``

    The channels of a direction share B and C. Float32 tensors on CUDA use the kernel of mamba-ssm if
    :func:`cuda_kernel` finds it; all others use PyTorch operations with memory linear in L. Half precision is computed
    in float32, also under autocast.

    Args:
        u: Input, (batch, K Di, L), with Di channels in each direction.
        delta: Step size before bias and softplus, (batch, K Di, L).
        A: State matrix, diagonal, (K Di, N), negative.
        B: Input matrix, (batch, K, N, L).
        C: Output matrix, (batch, K, N, L).
        D: Weight of the skip connection, (K Di,).
        delta_bias: Bias of the step size, (K Di,).

    Returns:
        y, (batch, K Di, L), in the dtype of u.
    """
    dtype = u.dtype
    accurate = torch.promote_types(dtype, torch.float32)
    u, delta, A, B, C, D, delta_bias = (x.to(accurate) for x in (u, delta, A, B, C, D, delta_bias))
    kernel = cuda_kernel(u.device) if u.is_cuda and accurate == torch.float32 else None
    if kernel:
        return kernel(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True).to(dtype)
    directions = B.shape[1], -1
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(delta[:, :, None] * A[:, :, None])  # (batch, K Di, N, L)
    drive = ((delta * u).unflatten(1, directions)[:, :, :, None] * B[:, :, None]).flatten(1, 2)
    del delta  # the tensors alive from here on determine peak memory
    states = linear_recurrence(decay, drive)
    del decay, drive
    y = (u * D[:, None]).unflatten(1, directions)
    for state, c in zip(states.unflatten(1, directions).unbind(3), C.unbind(2), strict=True):
        y = torch.addcmul(y, state, c[:, :, None])
    return y.flatten(1, 2).to(dtype)


def linear_recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """Computes the linear recurrence ``h_t = decay_t h_{t-1} + drive_t``, ``h_0 = 0``, along the last dimension.

    A long sequence is split into chunks, which are processed in parallel. A whole chunk acts as one step of a linear
    recurrence whose decay is the product of the chunk's decays:

        1. Run each chunk from h = 0 to get its last state, and the product of its decays.
        2. Apply this function to both to get the initial state of each chunk.
        3. Run each chunk again from its initial state to get all states.

    The number of sequential steps is logarithmic in L. Without divisions and exponentials it is numerically stable.

    Args:
        decay: (..., L).
        drive: (..., L).

    Returns:
        All states h, (..., L).
    """
    length = drive.shape[-1]
    if length <= MAX_LOOP:
        return torch.stack(_states(decay.unbind(-1), drive.unbind(-1), torch.zeros_like(drive[..., 0])), -1)
    if padding := -length % CHUNK:
        return linear_recurrence(F.pad(decay, (0, padding)), F.pad(drive, (0, padding)))[..., :length]
    decays, drives = (x.unflatten(-1, (-1, CHUNK)).unbind(-1) for x in (decay, drive))
    last = _states(decays, drives, torch.zeros_like(drives[0]))[-1]
    entering = F.pad(linear_recurrence(functools.reduce(torch.mul, decays), last)[..., :-1], (1, 0))
    return torch.stack(_states(decays, drives, entering), -1).flatten(-2)


def _states(decays: Iterable[Tensor], drives: Iterable[Tensor], state: Tensor) -> list[Tensor]:
    """Runs the recurrence from an initial state in a loop, and returns all states."""
    states = []
    for decay, drive in zip(decays, drives, strict=True):
        state = torch.addcmul(drive, decay, state)
        states.append(state)
    return states


@functools.cache
def cuda_kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """Returns ``selective_scan_fn`` of mamba-ssm, or None if it is missing or does not run on this device.

    The kernel is run once, since mamba-ssm is often installed without its CUDA extension.
    """
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        one = torch.ones(1, 1, 1, 1, device=device)
        selective_scan_fn(
            one[0], one[0], one[0, 0], one, one, one[0, 0, 0], delta_bias=one[0, 0, 0], delta_softplus=True
        )
    except Exception:  # a foreign binary may fail in any way; PyTorch operations replace it
        return None
    return selective_scan_fn


def cross_scan(x: Tensor) -> Tensor:
    """Flattens a feature map into four sequences (VMamba, arXiv 2401.10166): by rows, by columns, and both reversed.

    Args:
        x: Feature map, (B, C, H, W).

    Returns:
        The sequences, (B, 4, C, H W).
    """
    forwards = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
    return torch.cat([forwards, forwards.flip(-1)], 1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Sums the four sequences of :func:`cross_scan` at their pixels.

    Args:
        y: The sequences, (B, 4, C, H W).
        height: H.
        width: W.

    Returns:
        The sum by rows, (B, C, H W).
    """
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return rows + columns.unflatten(-1, (width, height)).transpose(-2, -1).flatten(-2)
