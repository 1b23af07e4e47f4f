"""Denoisers solved in one pass: the optimum of their loss on all features that were seen."""

import copy

import pytest
import torch
from torch import nn

from calibration_helpers import CLEAN, LAYERS, Branch, Experts, Net, built, changed, data
from helpers import equal, randomise
from mmdenoiserep.core import NoiseSchedule, apply_denoiserep, solve_denoisers


def converted(make=Net, example=CLEAN[0], **options):
    model = built(make)
    apply_denoiserep(model, 'all', example_input=example, **options)
    return randomise(model, size=1e-4)


@pytest.mark.parametrize('rank', [None, 2])
def test_the_optimum_of_every_layer(rank):
    """No step from there lowers the loss over all inputs, and the report says what the loss is."""
    model, inputs = converted(rank=rank), {name: [] for name in LAYERS}
    listening = copy.deepcopy(model)
    for name, seen in inputs.items():
        listening.get_submodule(name).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
    for batch in CLEAN:
        listening(batch)
    before = {name: model.get_submodule(name).denoise_loss(torch.cat(x)).item() for name, x in inputs.items()}
    report = solve_denoisers(model, CLEAN)
    assert {row.name: row.start for row in report.layers} == pytest.approx(before, rel=1e-9)
    assert [row.name for row in report.layers] == LAYERS and report.images == 24
    for row in report.layers:
        layer = model.get_submodule(row.name)
        loss = layer.denoise_loss(torch.cat(inputs[row.name]))
        assert loss.item() == pytest.approx(row.loss, rel=1e-9)
        assert row.optimum <= row.loss * (1 + 1e-12) and row.loss < row.start
        if rank is None:
            assert row.loss == pytest.approx(row.optimum, rel=1e-12)
            loss.backward()
            slopes = [p.grad.abs().max() * layer.reverse_step.c1 for p in layer.denoiser.parameters()]
            assert max(slopes) < 1e-9


def test_pieces_and_the_whole_give_the_same_denoisers():
    pieces, whole = converted(), converted()
    solve_denoisers(pieces, CLEAN)
    solve_denoisers(whole, [torch.cat(CLEAN)])
    for (name, a), b in zip(pieces.named_parameters(), whole.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1, b.abs().max()), name
    assert not equal(pieces.state_dict(), converted().state_dict())


def test_only_the_named_denoisers_change():
    model, before = converted(), converted()
    report = solve_denoisers(model, CLEAN, layers=['fc2', 'conv1'])
    assert [row.name for row in report.layers] == ['conv1', 'fc2']
    assert changed(model, before) == {'conv1.denoiser.weight', 'fc2.denoiser.weight', 'fc2.denoiser.bias'}


def test_a_prior_keeps_few_images_from_erasing_unseen_directions():
    """Three vectors in 16 dimensions: without a prior, the step halves all that they do not span (t = 1)."""
    few, shrunk = [data(3, 16)], []
    for prior in (0.0, 100.0):
        model = converted(lambda: nn.Sequential(nn.Linear(16, 4)), few[0], rank=None)
        solve_denoisers(model, few, prior=prior)
        shrunk.append(torch.linalg.eigvalsh(model[0].denoiser.weight[0]).max().item())
    assert shrunk[0] > 0.4 and shrunk[1] < 0.01


def test_the_schedule_of_the_conversion_is_the_one_that_is_solved():
    strong, weak = converted(schedule=NoiseSchedule(0.01, 0.2, 100)), converted()
    reports = [solve_denoisers(model, CLEAN) for model in (strong, weak)]
    assert all(a.moved > 10 * b.moved for a, b in zip(*(report.layers for report in reports), strict=True))


def test_a_layer_that_no_image_reaches_is_skipped():
    model = converted(Branch, data(1, 6, 8))
    report = solve_denoisers(model, [data(9, 5, 8)])
    assert [row.name for row in report.layers] == ['a', 'o'] and 'reaches' in report.skipped['b']


@pytest.mark.parametrize('chunks', [1, 2])
def test_an_expert_that_few_vectors_reach_is_skipped(chunks):
    """Three vectors span no covariance of eight channels."""
    images = data(80, 1, 8) * 2
    images[:, 0, 0] = -images[:, 0, 0].abs()
    model = converted(Experts, torch.cat([images[:2] - 9, images[:2] + 9, images[:2] * 0 + 1]))
    before = copy.deepcopy(model.experts[1].state_dict())
    images[:3, 0, 0] = 1.0
    report = solve_denoisers(model, images.chunk(chunks))
    assert [row.name for row in report.layers] == ['experts.0', 'o']
    assert '3 vectors' in report.skipped['experts.1'] and equal(model.experts[1].state_dict(), before)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(layers=['fc9']), ('fc9',)),
        (dict(prior=-1.0), ('prior', '-1')),
        (dict(batches=[]), ('no image',)),
        (dict(module=Net()), ('apply_denoiserep',)),
    ],
)
def test_what_cannot_be_solved_is_refused_in_one_sentence(options, words):
    model = converted()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        solve_denoisers(**{'module': model, 'batches': CLEAN, **options})
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)
    assert equal(model.state_dict(), before)
