"""Several processes, each with its own images, calibrate as one process with all of them."""

import copy

import torch

from calibration_helpers import CLEAN, NOISY, Branch, Second, built, data, fit, gather
from helpers import relative
from mmdenoiserep.core import apply_denoiserep, collect_moments, solve_denoisers


def calibrated(model, source, batches):
    """Gathers moments and fits, or solves where there is no source; returns weights, moments and the report's facts."""
    if source is None:
        report, moments = solve_denoisers(model, batches), {}
    else:
        moments = collect_moments(model, {name: model.get_submodule(name) for name in source}, batches)
        report = fit(model, batches, source)
    moments = {name: (seen.count, seen.mean, seen.covariance) for name, seen in moments.items()}
    return model.state_dict(), moments, report.images, list(report.skipped)


def run(rank, folder):
    """Calibrates all models in one of two processes, and keeps the results."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    case = torch.load(folder / 'case.pth', weights_only=False)
    results = {name: calibrated(model, source, batches[rank]) for name, (model, source, batches) in case.items()}
    torch.save(results, folder / f'rank{rank}.pth')
    torch.distributed.destroy_process_group()


def cases():
    """Name: a model, its source, and the batches of both processes.

    The processes see halves of the images in different splits; one has large images, the other small ones or no batch;
    or a layer runs twice in one of them only.
    """
    denoised = built()
    apply_denoiserep(denoised, 'all', example_input=CLEAN[0])
    first, second = torch.cat(NOISY).chunk(2)
    source = gather(built(), CLEAN)
    small, large = data(9, 5, 8, noisy=True), data(9, 6, 8, noisy=True, seed=1)
    branch, twice = gather(built(Branch), [data(30, 6, 8, seed=3)]), gather(built(Second), [data(90, 8, seed=3)])
    return {
        'solved': (denoised, None, (first.split(4), second.split(4))),
        'one batch': (built(), source, ([first], [second])),
        'several batches': (built(), source, (first.split(5), second.split(5))),
        'other layers, one batch': (built(Branch), branch, ([large], [small])),
        'other layers': (built(Branch), branch, ([large[:4], large[4:]], [small])),
        'no batch left early': (built(), source, (first.split(2), [second])),
        'no batch': (built(Branch), branch, ([large, small], [])),
        'again': (built(Second), twice, ([large[:1, 0]], [large[:, 1]])),
    }


def test_two_processes_calibrate_as_one(tmp_path):
    """And both hold the same bits."""
    torch.save(cases(), tmp_path / 'case.pth')
    torch.multiprocessing.spawn(run, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f'rank{rank}.pth', weights_only=True) for rank in range(2))
    for name, (model, source, batches) in cases().items():
        before = copy.deepcopy(model.state_dict())
        state, moments, images, skipped = calibrated(model, source, [*batches[0], *batches[1]])
        assert first[name][2:] == second[name][2:] == (images, skipped) and not skipped, name
        assert any(not torch.equal(value, before[key]) for key, value in state.items()), name
        for key, value in state.items():
            assert torch.equal(first[name][0][key], second[name][0][key]), (name, key)
            assert (first[name][0][key] - value).abs().max() < 1e-9 * max(1, value.abs().max()), (name, key)
        for layer, seen in moments.items():
            (count, mean, covariance), (expected, *alone) = first[name][1][layer], seen
            assert count == expected, (name, layer)
            assert relative(mean, alone[0]) < 1e-9 and relative(covariance, alone[1]) < 1e-9, (name, layer)
