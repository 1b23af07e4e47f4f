"""Tests of studies/study.py: its statistics on made-up logs, and one small run of everything."""

import json
import re
import sys

import pytest
import torch

from helpers import ROOT
from mmdenoiserep.core import InputError
from studies import study, study_report
from tools_helpers import run_process, run_tool

NOTE = dict(
    command='python -m studies.study --jobs 3',
    cores=6,
    jobs=3,
    seconds=120.0,
    cpu_seconds=300.0,
    images={'fashion-mnist': 8000, 'scenes': 1000},
    versions={'torch': '9.9'},
)


def write_log(path, *entries):
    """Writes a log as mmengine does, one JSON object a line."""
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))


def write_run(folder, metrics, losses=(0.0101, 0.0099)):
    for stage, logged in zip(study_report.STAGES, metrics, strict=True):
        if stage.endswith('fused'):
            write_log(folder / stage / 'time/time.json', logged)
            continue
        steps = (20, 1000) if stage == 'baseline' else (20, 300)
        extra = [dict(loss_denoise=loss) if stage == 'denoised' else {} for loss in losses]
        trained = [dict(step=step, loss=1.0, **more) for step, more in zip(steps, extra, strict=True)]
        write_log(folder / stage / 'time/vis_data/scalars.json', *trained, logged)
    trained = [dict(step=step, loss=loss, loss_denoise=loss) for step, loss in zip((20, 300), (1.2, 0.9), strict=True)]
    write_log(folder / 'label-free/time/vis_data/scalars.json', *trained)
    (folder / 'label-free-fused.json').write_text('{}')


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Work dir of a made-up study: a ViT with three seeds, a detector with two, and an unfinished run."""
    monkeypatch.chdir(ROOT)
    baseline, control, unfused, fused = [70, 70, 70], [80, 81, 82], [81, 82.1, 82.85], [81, 82.1, 82.9]
    label_free = [70.5, 69.5, 70.3]
    losses = [(0.0101, 0.0095), (0.0102, 0.0096), (0.0103, 0.0097)]
    for seed in (2, 0, 1):
        stages = (baseline[seed], control[seed], unfused[seed], fused[seed], label_free[seed])
        metrics = [{'accuracy/top1': value} for value in stages]
        write_run(tmp_path / f'vit/seed_{seed}', metrics, losses[seed])
    for seed, values in {0: (0.3, 0.4, 0.41, 0.41, 0.32), 1: (0.35, 0.42, 0.4, 0.4, 0.37)}.items():
        metrics = [{'coco/bbox_mAP': value, 'coco/segm_mAP': value / 2} for value in values]
        write_run(tmp_path / f'mask-rcnn/seed_{seed}', metrics)
    write_log(tmp_path / 'swin/seed_0/baseline/time/vis_data/scalars.json', {'accuracy/top1': 1.0})
    (tmp_path / 'study.json').write_text(json.dumps(NOTE))
    return tmp_path


def test_paired_differences():
    """By hand: 0.5, -0.5, 0.6 have mean 0.2 and deviation sqrt(0.74 / 2); Student's t for 2 degrees is 4.3027."""
    pair = study_report.Paired([50.5, 51.5, 54.6], [50.0, 52.0, 54.0])
    assert pair.differences == pytest.approx([0.5, -0.5, 0.6])
    assert pair.mean == pytest.approx(0.2)
    assert pair.margin == pytest.approx(4.3027 * 0.37**0.5 / 3**0.5, rel=1e-4)
    assert pair.interval == '-1.31 to +1.71' and pair.verdict == 'no effect within noise'
    assert study_report.spread(pair.differences, '+.2f') == '+0.20 ± 0.61'


@pytest.mark.parametrize(
    ('after', 'before', 'step', 'verdict'),
    [
        ([81.0, 82.1, 82.9], [80.0, 81.0, 82.0], 0.0, 'higher'),
        ([79.0, 79.9, 81.1], [80.0, 81.0, 82.0], 0.0, 'lower'),
        ([80.0, 81.0, 82.0], [80.0, 81.0, 82.0], 0.0, 'no effect within noise'),
        ([81.0, 81.0, 82.5], [80.0, 81.0, 82.0], 0.0, 'no effect within noise'),
        ([10.1, 20.1, 30.1], [10.0, 20.0, 30.0], 0.1, 'no effect within noise'),
        ([10.1, 20.1, 30.1], [10.0, 20.0, 30.0], 0.01, 'higher'),
        ([90.0], [80.0], 0.0, 'no effect within noise'),
    ],
)
def test_verdicts(after, before, step, verdict):
    pair = study_report.Paired(after, before, **(dict(step=step) if step else {}))
    assert pair.verdict == verdict
    if len(after) == 1:
        assert pair.interval == '-inf to +inf' and study_report.spread(after) == '90.00'


def test_rounding_is_no_certainty():
    """Three equal differences of values rounded to 0.1: the deviation is at least 0.1 / sqrt(6)."""
    equal = study_report.Paired([10.1, 20.1, 30.1], [10.0, 20.0, 30.0], step=0.1)
    assert equal.margin == pytest.approx(4.3027 * 0.1 / 6**0.5 / 3**0.5, rel=1e-4)
    wide = study_report.Paired([51.0, 51.0, 53.0], [50.0, 51.0, 51.0], step=0.1)
    assert wide.margin == pytest.approx(4.3027 / 3**0.5, rel=1e-4), 'a larger deviation counts as it is'


def test_reading_the_logs(logs):
    vit, detector = study.read_results(logs, NOTE['images'])
    assert (vit.seeds, vit.iterations, vit.images) == ([0, 1, 2], (1000, 300), 8000)
    assert vit.metrics['top-1']['fused'] == [81, 82.1, 82.9], 'in the order of the seeds'
    assert sum(vit.losses, ()) == pytest.approx((1.01, 0.95, 1.02, 0.96, 1.03, 0.97)), 'divided by the weight'
    assert vit.label_free_losses == [(1.2, 0.9)] * 3, 'as it is'
    assert (detector.seeds, detector.images) == ([0, 1], 1000)
    assert detector.metrics['box AP']['control'] == pytest.approx([40, 42]), 'fractions become percent'
    assert detector.metrics['mask AP']['control'] == pytest.approx([20, 21])
    assert (vit.steps, detector.steps) == ({'top-1': 0.01}, {'box AP': 0.1, 'mask AP': 0.1})


def test_the_page(logs, tmp_path, monkeypatch, capsys):
    page = tmp_path / 'page.md'
    page.write_text('before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n')
    for _ in range(2):
        monkeypatch.setattr(sys, 'argv', ['study.py', '--report', '--work-dir', str(logs), '--out', str(page)])
        study.main()
        text = page.read_text()
        assert text.startswith('before\n<!-- results: begin -->\n') and text.endswith('<!-- results: end -->\nafter\n')
        assert 'old' not in text and text.count('| ViT | top-1 |') == 2, 'joint and label-free'
    assert (
        '| ViT | top-1 | 70.00 ± 0.00 | 81.00 ± 1.00 | 82.00 ± 0.95 | +11.00 ± 1.00 | +1.00 ± 0.10 '
        '| +0.75 to +1.25 | higher |' in text
    )
    assert '| ViT | top-1 | 70.00 ± 0.00 | 70.10 ± 0.53 | +0.10 ± 0.53 | -1.21 to +1.41 | no effect' in text
    assert '| Mask R-CNN Swin | mask AP | 16.25 ± 1.77 | 17.25 ± 1.77 | +1.00 ± 0.00 | ' in text
    assert 'In 2 of 3 rows denoising is above the baseline' in text
    assert '| 1000 + 300 | 0, 1, 2 | 1.020 to 0.960 | 1.200 to 0.900 | 0.05 |' in text
    assert '| +1.00 to' not in text and '-0.50 ± 2.12' in text, 'box AP: +1 and -2'
    assert 'In 2 of 3 rows the 95 % interval of the paired difference contains zero' in text
    assert 'In 1 of 3 rows denoising is above the control' in text and '(top-1 of ViT +1.00)' in text
    assert '6 CPU cores, 3 processes at a time, one thread each: 5 minutes of CPU time in 2 minutes' in text
    assert '`python -m studies.study --jobs 3`. torch 9.9.' in text


def test_bad_pages_and_folders(logs, tmp_path, monkeypatch):
    (tmp_path / 'page.md').write_text('no markers')
    for arguments, message in {
        ('--work-dir', str(logs), '--out', str(tmp_path / 'page.md')): 'page.md needs the lines',
        ('--work-dir', str(logs), '--out', str(tmp_path / 'nothing.md')): 'nothing.md needs the lines',
        ('--work-dir', str(tmp_path / 'nothing')): 'holds no study',
    }.items():
        monkeypatch.setattr(sys, 'argv', ['study.py', '--report', *arguments])
        with pytest.raises(InputError, match=message):
            study.main()
    assert (tmp_path / 'page.md').read_text() == 'no markers'


def test_one_seed_of_one_experiment(tmp_path):
    for name in ('configs', 'tools', 'studies', 'demo'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs/study.md').write_text((ROOT / 'docs/study.md').read_text())
    options = ['--experiments', 'resnet', '--seeds', '0', '--jobs', '1']
    small = ['--cfg-options', 'train_cfg.max_iters=3', 'default_hooks.logger.interval=1']

    def repeat(*arguments, code=0):
        return run_process('study', *options, *arguments, cwd=tmp_path, code=code)

    run_tool('prepare_fashion_mnist', '--source', 'demo/fashion-mnist', cwd=tmp_path)
    printed = repeat(*small)
    assert printed.count('=== done in') == 8
    text = (tmp_path / 'docs/study.md').read_text()
    assert '| ResNet | fashion-mnist | 8,000 | 3 + 3 | 0 |' in text and '| ResNet | top-1 | ' in text
    folder = tmp_path / 'work_dirs/study/resnet/seed_0'
    assert json.loads((folder / 'control.json').read_text())['command'][-1].endswith('baseline/iter_3.pth')
    top1 = [study.last_metric(folder / stage, 'accuracy/top1') for stage in ('denoised', 'fused')]
    assert top1[1] == pytest.approx(top1[0], abs=0.1), 'fused in the vanilla config: the same as unfused'

    files = [folder / name for name in ('baseline/iter_3.pth', 'label-free-fused.pth')]
    before, after = (torch.load(file, weights_only=False)['state_dict'] for file in files)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    converted = {name for name in before if re.fullmatch(r'backbone\..*conv\d\.weight|.*downsample\.0\.weight', name)}
    assert changed and changed <= converted, 'without labels, only what the denoisers are folded into has changed'

    assert '=== done in' not in repeat(*small), 'finished steps are not run again'
    assert 'is from another command' in repeat(code=1)
    (folder / 'label-free-fused.json').unlink()
    assert repeat(*small).count('=== done in') == 1, 'only what is missing'
    bad = ['--work-dir', 'work_dirs/bad', '--cfg-options', 'nonsense']
    printed = repeat(*bad, code=1)
    assert 'failed with exit code 1, see work_dirs/bad/resnet/seed_0/baseline.log' in printed.splitlines()[-1]
