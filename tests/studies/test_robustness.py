"""Tests of studies/robustness.py: its corruptions, its rivals, its page on made-up results, and one small run."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from helpers import ROOT
from mmdenoiserep.core import InputError
from mmdenoiserep.core.calibration.moments import Moments
from tools_helpers import run_tool

os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'

from studies import rivals, robustness, robustness_report, robustness_rivals, robustness_run, study

CORRUPTIONS = ('clean', *robustness_run.SEVERITIES['fashion-mnist'])
NOTE = dict(
    command='python -m studies.robustness', cores=6, jobs=3, seconds=120.0, cpu_seconds=300.0, versions={'torch': '9.9'}
)


@pytest.mark.parametrize(
    ('data', 'corruption'), [(d, c) for d, found in robustness_run.SEVERITIES.items() for c in found]
)
def test_corruptions_are_drawn_by_seed_and_number(data, corruption):
    shape = (1, 28, 28) if data == 'fashion-mnist' else (3, 64, 48)
    images = torch.randint(40, 216, (6, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    severity = robustness_run.SEVERITIES[data][corruption]
    before = images.clone()
    corrupted = robustness_run.corrupt(images, corruption, severity, seed=3)
    assert corrupted.shape == images.shape and corrupted.dtype == torch.uint8 and torch.equal(images, before)
    assert (corrupted != images).flatten(1).any(1).all()
    assert torch.equal(robustness_run.corrupt(images[:4], corruption, severity, seed=3), corrupted[:4])
    if corruption in ('noise', 'occlusion', 'shot', 'mixture', 'varying'):
        assert not torch.equal(robustness_run.corrupt(images, corruption, severity, seed=4), corrupted)


def test_corruptions_do_what_their_severity_says():
    grey = torch.full((20, 3, 50, 50), 120, dtype=torch.uint8)
    noise = robustness_run.corrupt(grey, 'noise', 0.1, 0).float()
    assert noise.mean() == pytest.approx(120, abs=0.5) and noise.std() == pytest.approx(25.5, rel=0.03)
    assert (robustness_run.corrupt(grey, 'contrast', 0.3, 0) == 36).all()
    occluded = robustness_run.corrupt(grey, 'occlusion', 0.4, 0)
    assert ((occluded == 0).flatten(1).float().mean(1) - 0.16).abs().max() < 1e-6
    assert torch.equal(robustness_run.corrupt(grey, 'clean', 0, 0), grey)
    grey[:, 1:] = 0  # JPEG spares brightness: a blue image (BGR) stays blue
    corrupted = robustness_run.corrupt(grey + grey // 2, 'jpeg', 30, 0).float().mean((0, 2, 3))
    assert corrupted[0] > 140 and corrupted[1:].max() < 60


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', rivals.FILTERS)
def test_filters_remove_noise_and_keep_the_brightness(name, channels):
    grey = torch.full((3, channels, 32, 24), 120, dtype=torch.uint8)
    noisy = robustness_run.corrupt(grey, 'noise', 0.05, 0)
    smoothed = rivals.smooth(noisy, name)
    assert smoothed.shape == noisy.shape and smoothed.dtype == torch.uint8
    assert (smoothed.float().mean((0, 2, 3)) - 120).abs().max() < 1.5
    if name == rivals.NO_FILTER:
        assert torch.equal(smoothed, noisy)
    else:
        assert smoothed.float().std() < 0.9 * noisy.float().std()


@pytest.mark.parametrize('model', ['vit', 'swin', 'resnet', 'vmamba'])
def test_blocks_are_aligned_as_far_as_they_are_from_the_source(model):
    init_default_scope('mmpretrain')
    cfg = Config.fromfile(ROOT / f'configs/demo/{model}_fashion-mnist.py')
    backbone = MODELS.build(cfg.model.backbone)
    backbone.eval()
    images = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    dark = 0.3 * images - 0.5
    with torch.no_grad():
        source = rivals.BlockAlignment.measure(backbone, [images])
        before = {
            name: rivals.distance(m, source[name])
            for name, m in rivals.BlockAlignment.measure(backbone, [dark]).items()
        }
        aligned = rivals.BlockAlignment(backbone, source)
        aligned(dark)
        worst = max(before, key=before.get)
        seen, forward = {}, aligned._align

        def align(strengths, name, *args):
            output = forward(strengths, name, *args)
            channels = rivals.BLOCKS[type(aligned.blocks[name]).__name__]
            seen[name] = rivals.distance(Moments.of(rivals.vectors(output, channels)), source[name]), strengths[name]
            return output

        aligned._align = align
        aligned(dark)
        assert torch.equal(aligned.backbone(images)[0], backbone(images)[0]), 'the backbone itself stays'
    assert seen[worst][1] == 1.0 and min(strength for _, strength in seen.values()) == 0.0
    assert seen[worst][0] < 0.2 * before[worst]


def made_up(gains, *, metric='top-1', latency=1.0, more=True):
    """Returns one run: the model as trained has 80 on clean images and 40 on the others, 60 with labels."""
    base = {corruption: 80.0 if corruption == 'clean' else 40.0 for corruption in CORRUPTIONS}
    labels = dict.fromkeys(CORRUPTIONS[1:], 20.0)
    fits = {'early half': {}, 'first layer': {}, 'half strength': {}, 'what the check writes': gains['all layers']}
    methods = {'as trained': {}, 'schedule': {}, **fits, **gains, 'fine-tuned with labels': labels}
    table = {
        corruption: {name: {metric: value + gain.get(corruption, 0.0)} for name, gain in methods.items()}
        for corruption, value in base.items()
    }
    names = ('all layers', 'early half', 'first layer', 'half strength', 'what the check writes')
    pair = {c: {n: {metric: base[c] + 2.0} for n in names} for c in ('noise', 'clean')}
    filters = {corruption: 'none' if corruption == 'clean' else 'median 3' for corruption in CORRUPTIONS}
    run = dict(images=dict(source=9, target=100, test=7), filters=filters, table=table, latency=latency)
    run |= dict(counts={'8': pair, '32': pair})
    if more:
        run |= dict(skewed=dict(images=5, scores=pair), elsewhere={'noise': pair})
    return run


@pytest.fixture
def results(tmp_path):
    """Work dir of made-up measurements: a ViT and a ResNet with three seeds, SegFormer with two."""
    good = {'noise': 25.0, 'blur': 9.0, 'clean': -0.2}
    for seed in (2, 0, 1):
        harm = {'entropy': {'noise': -9.0 - seed}}
        shift = {key: value + 0.1 * seed for key, value in good.items()}
        write(tmp_path, 'vit', seed, made_up({'all layers': shift, **harm}))
        norm = {'BatchNorm': {**good, 'blur': 10.0}}
        write(tmp_path, 'resnet', seed, made_up({'all layers': good, **norm}, latency=1.05))
    for seed in (0, 1):
        fit = {'all layers': {'noise': 30.0, 'blur': 20.0 + seed}}
        write(tmp_path, 'segformer', seed, made_up(fit, metric='mIoU', more=False))
    (tmp_path / robustness.NOTE).write_text(json.dumps(NOTE))
    return tmp_path


def write(work_dir, name, seed, run):
    folder = work_dir / f'{name}/seed_{seed}'
    folder.mkdir(parents=True)
    table = {key: {} for key in run['table']}
    parts = dict(rivals={'table': run['table'], 'images': run['images'], 'filters': run['filters']})
    parts['fits'] = {key: value for key, value in run.items() if key not in parts['rivals']} | dict(table=table)
    for part, found in parts.items():
        robustness_run.path_of(folder, part).write_text(json.dumps(found | dict(cpu_seconds=1.0)))


def test_goals_are_judged_by_what_was_measured(results):
    read = robustness.read_results(results)
    assert [result.seeds for result in read] == [[0, 1, 2], [0, 1, 2], [0, 1]]
    judged = {goal.text: (goal.measured, goal.met) for goal in robustness_report.goals(read)}
    assert judged == {
        'noise, ViT: at least +20 top-1': ('+25.10 ± 0.10', True),
        'noise, ResNet: at least +30 top-1': ('+25.00 ± 0.00', False),
        'blur, ViT: at least +8 top-1': ('+9.10 ± 0.10', True),
        'blur, ResNet: at least +8 top-1': ('+9.00 ± 0.00', True),
        'noise, SegFormer MiT: at least 60 % of the lost mIoU recovered': ('75.0 ± 0.00 %', True),
        'blur, SegFormer MiT: at least 60 % of the lost mIoU recovered': ('51.2 ± 1.77 %', False),
        '4 of 10 classes, ViT: at least +15 on noise, clean within 1': ('+2.00 ± 0.00, clean +2.00 ± 0.00', False),
        'the check: harm in at most 3 % of the cases': ('0.0 %', True),
        'the check: harm of at most 2': ('-0.20 at worst', True),
        'the check: mean regret of at most 1.5': ('0.01', True),
        'the check: clean images lose at most 0.3': ('-0.20 at worst', True),
        'fitted to clean images: every model within 0.5 on them': ('-0.20 at worst (ResNet)', True),
        'latency, fused over baseline: every model within 0.02 of 1.00': ('1.050 at worst (ResNet)', False),
        'ResNet: at least re-estimated BatchNorm in every column': ('-1.00 at worst (blur)', False),
    }


def test_harm_and_regret():
    def cell(gains, harm=0.5):
        names = 'first layer', 'all layers', 'what the check writes'
        return robustness_report.Cell('ViT', 'noise', '32', dict(zip(names, gains, strict=True)), harm)

    cells = [cell([1.0, 3.0, 3.0]), cell([-0.6, -4.0, -0.6]), cell([-0.6, 2.0, -0.6], harm=0.7), cell([1.0, 2.0, 0.0])]
    harm, worst, regret = robustness_report.judge(cells, 'what the check writes')
    assert (harm, worst) == (25, -0.6) and regret == pytest.approx((0 + 0.6 + 2.6 + 2) / 4)
    assert robustness_report.judge(cells, 'all layers') == (25, -4.0, 1.0)


def test_the_page_and_the_picture(results, tmp_path, monkeypatch):
    page = tmp_path / 'page.md'
    page.write_text('before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n')
    arguments = ['robustness.py', '--report', '--work-dir', str(results), '--out', str(page)]
    monkeypatch.setattr(sys, 'argv', arguments)
    monkeypatch.chdir(ROOT)
    robustness.main()
    text = page.read_text()
    assert text.startswith('before\n') and text.endswith('after\n') and 'old' not in text
    assert '9 of 14 goals are met' in text and text.count('**missed**') == 5
    assert '| entropy | 10 | 0 | 9 | 1 | +0.00 (ViT, clean) | -10.00 (ViT, noise) |' in text
    assert '**entropy** helps nowhere by more than the noise of the seeds.' in text
    assert '**all layers** ' not in text
    assert '| all layers | -0.10 ± 0.10 | +25.10 ± 0.10 |' in text
    assert '| all layers | 63 / 126 | 23 / 46 | 0 / 0 |' in text, 'of the loss of 40, and of the 20 that labels give'
    assert '| fine-tuned with labels | 50 / 100 |' in text and '| chosen | none | median 3 |' in text
    assert '| what the check writes | 0.0 % | -0.2 (ViT, clean, 100 images) | 0.01 |' in text
    assert '| 32 | +2.0 ± 0.00 / +2.0 ± 0.00 |' in text and text.count('| 5, skewed | ') == 2
    assert '| 100 | +25.1 ± 0.10 / -0.1 ± 0.10 | +0.0 ± 0.00 / +0.0 ± 0.00 |' in text
    assert '| scenes | 0.157 | 2 | 5 | 0.5 | 0.4 | 0.05 | 0.3 | 0.7 | 0.314 | 0.8 |' in text
    assert page.with_suffix('.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--report'], 'holds no finished measurement'),
        (['--one', 'vit', '0', 'fits'], 'vit/seed_0 has no trained baseline'),
    ],
)
def test_no_measurement_is_said_so(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['robustness.py', *arguments, '--work-dir', str(tmp_path)])
    with pytest.raises(InputError, match=words):
        robustness.main()


def test_a_finished_measurement_is_not_made_again(tmp_path, monkeypatch):
    trained, started = [], []

    def train(folder, name, config, seed, overrides):
        trained.append((name, Path(config).name, seed, overrides))
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / 'last_checkpoint').write_text('weights.pth')

    def run(title, *command, log):
        started.append(command)
        robustness_run.path_of(log.parent, command[5]).write_text('{}')

    monkeypatch.setattr(study, 'train', train)
    monkeypatch.setattr(robustness, 'run', run)
    monkeypatch.chdir(ROOT)
    folder = study.seed_folder(tmp_path, 'resnet', 4)
    for _ in range(2):
        robustness.run_seed(study.EXPERIMENTS['resnet'], 4, folder, ['a=1'])
    place = '--work-dir', str(tmp_path), '--cfg-options', 'a=1'
    assert started == [
        ('-m', 'studies.robustness', '--one', 'resnet', '4', part, *place) for part in ('rivals', 'fits')
    ]
    more = ['a=1', 'load_from=weights.pth']
    assert trained[:3] == [
        ('baseline', 'resnet_fashion-mnist.py', 4, ['a=1']),
        ('control', 'resnet_fashion-mnist_baseline-ft.py', 4, more),
        ('noise-augmented', 'noise-augmented.py', 4, more),
    ]
    robustness.run_seed(study.EXPERIMENTS['reid'], 4, study.seed_folder(tmp_path, 'reid', 4), [])
    assert [name for name, *_ in trained[6:]] == ['baseline'], 'beside classification nothing is fine-tuned'


def test_one_measurement(tmp_path, monkeypatch):
    for name in ('configs', 'demo'):
        (tmp_path / name).symlink_to(ROOT / name)
    cfg = Config.fromfile(ROOT / 'configs/demo/resnet_fashion-mnist.py')
    init_default_scope('mmpretrain')
    folder = tmp_path / 'work_dirs/study/resnet/seed_1'
    for step in ('baseline', 'control', 'noise-augmented'):
        (folder / step).mkdir(parents=True)
        torch.save(MODELS.build(cfg.model).state_dict(), folder / step / 'weights.pth')
        (folder / step / 'last_checkpoint').write_text(str(folder / step / 'weights.pth'))
    (folder / 'baseline.json').write_text('{}')

    run_tool('prepare_fashion_mnist', '--source', 'demo/fashion-mnist', cwd=tmp_path)
    small = ['train_dataloader.dataset.indices=80', 'test_dataloader.dataset.indices=25']
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(robustness, 'ROOT', tmp_path)
    monkeypatch.setattr(robustness_rivals, 'ITERATIONS', 3)
    for part in robustness_run.PARTS:
        monkeypatch.setattr(sys, 'argv', ['robustness.py', '--one', 'resnet', '1', part, '--cfg-options', *small])
        robustness.main()
    result = robustness_run.read_run(folder)
    assert result['images'] == dict(source=40, target=40, test=25) and list(result['table']) == list(CORRUPTIONS)
    methods = {'as trained', 'schedule', 'fine-tuned', 'fine-tuned on noise', 'fine-tuned with labels', 'BatchNorm'}
    methods |= {'all layers', 'early half', 'first layer', 'half strength', 'what the check writes'}
    methods |= {'entropy', 'block alignment'}
    methods |= {'filter, blind', 'filter, chosen', 'filter, chosen + all layers'}
    values = [value for scores in result['table'].values() for value in scores.values()]
    assert set(result['table']['blur']) == methods and all(0 <= value['top-1'] <= 100 for value in values)
    assert list(result['counts']) == ['32'] and set(result['filters']) == set(CORRUPTIONS)
    assert set(result['elsewhere']) == {'noise', 'half noise, half clean'}
    assert 0.5 < result['latency'] < 2 and 0 < result['skewed']['images'] < 40
