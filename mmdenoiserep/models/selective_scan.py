"""The scan of VMamba: a linear recurrence along four paths through a feature map; imports torch only."""

import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4
"""Positions of a chunk."""

DIRECT = 64
"""Up to this length one loop over the positions is as fast as chunks."""


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """Returns y of the selective scan (Gu and Dao 2023, arXiv 2312.00752), differentiable.

    For every image and every channel of each of K directions, with N states h that start at zero,

        ``s_t = softplus(delta_t + delta_bias)``
        ``h_t = exp(s_t A) h_{t-1} + s_t B_t u_t``,   ``y_t = C_t h_t + D u_t``

    The channels of a direction share B and C. CUDA tensors go to the kernel of mamba-ssm where
    :func:`cuda_kernel` finds it. Everything else, and float64, is computed here with plain operations, with memory
    linear in L. Half precision is computed in float32, also under autocast.

    Args:
        u: Input, (batch, K Di, L).
        delta: Step before bias and softplus, (batch, K Di, L).
        A: (K Di, N), negative.
        B: (batch, K, N, L).
        C: (batch, K, N, L).
        D: (K Di,).
        delta_bias: (K Di,).

    Returns:
        (batch, K Di, L), in the dtype of u.
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
    del delta  # what is alive from here on decides the peak of memory
    states = linear_recurrence(decay, drive)
    del decay, drive
    y = (u * D[:, None]).unflatten(1, directions)
    for state, c in zip(states.unflatten(1, directions).unbind(3), C.unbind(2), strict=True):
        y = torch.addcmul(y, state, c[:, :, None])
    return y.flatten(1, 2).to(dtype)


def linear_recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """Returns all h of ``h_t = decay_t h_{t-1} + drive_t`` along the last dimension, with h = 0 before the first.

    A long sequence is cut into chunks, and all chunks advance at once. The effect of a whole chunk is again one step of
    such a recurrence, with the product of its decays, so the states between chunks come from the same function:

        1. from h = 0, run through each chunk for its last state and its product of decays,
        2. the recurrence over these gives the state that enters each chunk,
        3. from there, run through each chunk again for every state.

    That takes a number of steps logarithmic in the length, exactly: there is no division and no exponential here.

    Args:
        decay: (..., L).
        drive: (..., L).

    Returns:
        (..., L).
    """
    length = drive.shape[-1]
    if length <= DIRECT:
        return torch.stack(_states(decay.unbind(-1), drive.unbind(-1), torch.zeros_like(drive[..., 0])), -1)
    if padding := -length % CHUNK:
        return linear_recurrence(F.pad(decay, (0, padding)), F.pad(drive, (0, padding)))[..., :length]
    decays, drives = (x.unflatten(-1, (-1, CHUNK)).unbind(-1) for x in (decay, drive))
    last = _states(decays, drives, torch.zeros_like(drives[0]))[-1]
    entering = F.pad(linear_recurrence(functools.reduce(torch.mul, decays), last)[..., :-1], (1, 0))
    return torch.stack(_states(decays, drives, entering), -1).flatten(-2)


def _states(decays: Iterable[Tensor], drives: Iterable[Tensor], state: Tensor) -> list[Tensor]:
    """Runs the recurrence from a state, one step an entry."""
    states = []
    for decay, drive in zip(decays, drives, strict=True):
        state = torch.addcmul(drive, decay, state)
        states.append(state)
    return states


@functools.cache
def cuda_kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """Returns ``selective_scan_fn`` of mamba-ssm, or None where it is missing or does not run on this device.

    mamba-ssm is often installed without its CUDA extension, so the kernel is tried once.
    """
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        one = torch.ones(1, 1, 1, 1, device=device)
        selective_scan_fn(
            one[0], one[0], one[0, 0], one, one, one[0, 0, 0], delta_bias=one[0, 0, 0], delta_softplus=True
        )
    except Exception:  # whatever keeps a foreign binary from running, there is the other way
        return None
    return selective_scan_fn


def cross_scan(x: Tensor) -> Tensor:
    """Returns a feature map as four sequences (VMamba, arXiv 2401.10166).

    They run through the pixels row by row, column by column, and both from the end backwards.

    Args:
        x: (B, C, H, W).

    Returns:
        (B, 4, C, H W).
    """
    forwards = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
    return torch.cat([forwards, forwards.flip(-1)], 1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Returns the sum of the four sequences of :func:`cross_scan`, each put back to its pixels.

    Args:
        y: (B, 4, C, H W).
        height: H.
        width: W.

    Returns:
        (B, C, H W), row by row.
    """
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return rows + columns.unflatten(-1, (width, height)).transpose(-2, -1).flatten(-2)
