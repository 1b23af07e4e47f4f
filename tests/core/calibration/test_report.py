"""What the report of a calibration says, as data and as a table."""

import pytest
import torch
from torch import nn

from calibration_helpers import CLEAN, LAYERS, NOISY, Branch, built, data, fit, gather
from mmdenoiserep.core import apply_denoiserep, solve_denoisers


def lines_of(report):
    """Returns the words of each line of the table by the first one; the last line is no part of it."""
    return {line.split()[0]: line.split() for line in str(report).splitlines()[:-1]}


def test_a_table_of_losses_ends_with_their_mean():
    model = built()
    apply_denoiserep(model, 'all', example_input=CLEAN[0])
    report = solve_denoisers(model, CLEAN)
    lines, keys = lines_of(report), ('start', 'loss', 'optimum')
    assert {*LAYERS, 'mean'} <= lines.keys() and '6 layers calibrated (schedule) on 24 images' in str(report)
    for row in report.layers:
        assert lines[row.name][-3:] == [f'{getattr(row, key):.6f}' for key in keys]
    means = [sum(getattr(row, key) for row in report.layers) / len(LAYERS) for key in keys]
    assert lines['mean'] == ['mean', *(f'{value:.6f}' for value in means)]


def test_what_was_skipped_is_in_the_table():
    report = fit(built(Branch), data(9, 5, 8, noisy=True).chunk(2), gather(built(Branch), [data(9, 6, 8)]))
    assert '2 layers calibrated (domain) on 9 images' in str(report)
    assert 'reaches' in lines_of(report)['b']


def test_a_row_says_how_far_the_features_move():
    model, x = built(lambda: nn.Sequential(nn.Linear(8, 4))), data(400, 8)
    (row,) = fit(model, [2 * x + 1], gather(model, [x]), spectra=True).layers
    after = (2 * x + 1) @ row.linear[0].mT + row.constant[0]
    moved = (after - 2 * x - 1).square().sum() / (2 * (x - x.mean(0))).square().sum()
    assert row.moved == pytest.approx(moved.item(), rel=1e-9) and moved > 0.1
    for values, features in ((row.before, 2 * x), (row.after, after)):
        torch.testing.assert_close(values, torch.linalg.eigvalsh(features.mT.cov(correction=0)), rtol=1e-9, atol=0)


def test_only_denoisers_have_a_rank():
    model = built()
    fitted = fit(model, [torch.cat(NOISY)], gather(model, CLEAN))
    apply_denoiserep(model, 'all', rank=2, example_input=CLEAN[0])
    solved = solve_denoisers(model, CLEAN)
    assert {row.rank for row in fitted.layers} == {None} and {row.rank for row in solved.layers} == {2, None}
    assert 'rank' not in str(fitted)
    lines = lines_of(solved)
    assert lines['layer'][1] == 'rank' and [lines[row.name][1] for row in solved.layers] == [
        str(row.rank or '-') for row in solved.layers
    ]
