"""Hundreds of conversions, calibrations and fusions in one process need no more memory than a few."""

import gc
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from mmdenoiserep import apply_denoiserep, collect_moments, fit_domain, fuse_model, select_layers, solve_denoisers

CYCLES = 100
WARM_UP = 30
WIDTH = 128
BOUND = 2.0
"""MiB of growth; one tensor of the smallest layer, WIDTH^2 float32, at each cycle would take twice as much."""


def resident():
    gc.collect()
    return int(re.search(r'VmRSS:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024


def growth():
    """Returns the MiB that the process grows by after the first cycles; each converts what the one before fused."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.Flatten(2), nn.LayerNorm(4), nn.Linear(4, WIDTH)).eval()
    model = model.append(nn.Linear(WIDTH, WIDTH))
    images = torch.randn(16, 3, 2, 2)
    before, source = 0.0, {}
    for cycle in range(CYCLES):
        if cycle == WARM_UP:
            before = resident()
        layers = select_layers(model, example_input=images[:1])
        if cycle % 2:
            fit_domain(model, layers, [1.5 * images], source)
        else:
            source = collect_moments(model, layers, [images])
        apply_denoiserep(model, 'all', example_input=images[:1])
        solve_denoisers(model, [images])
        model = fuse_model(model)
    assert model(images).isfinite().all()
    return resident() - before


def test_memory_does_not_grow(monkeypatch):
    """In a fresh process, whose freed memory goes back to the system at once."""
    monkeypatch.setenv('MALLOC_MMAP_THRESHOLD_', '16384')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        assert pool.submit(growth).result() < BOUND
