"""Tests of DenoiseRep on every backbone class of mmdet, mmseg and mmpretrain, and of the page about them."""

import re
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import pytest

from helpers import ROOT
from mmdenoiserep.core.method import select
from mmdenoiserep.core.method.probe import Execution
from studies import survey_backbones
from studies.survey_backbones import (
    ARGUMENTS,
    LIBRARIES,
    PAGE,
    TOLERANCE,
    Row,
    backbone_classes,
    summary,
    survey,
    survey_apart,
    versions,
)
from tools_helpers import run_process, sentence

CLASSES = [f'{library}.{name}' for library in LIBRARIES for name in backbone_classes(library)]

NOT_BUILT = {'mmseg.VPD': 'To use VPD model, please install required packages'} | {
    kind: 'timm' for kind in ('mmseg.TIMMBackbone', 'mmpretrain.TIMMBackbone') if not find_spec('timm')
}
"""Classes that need packages which the libraries do not install, and what they say."""

NO_LAYER = {
    'mmdet.DetectoRS_ResNet': 'ConvAWS2d may compute something else',
    'mmseg.DeconvModule': 'the model has no Linear and no Conv2d layer',
    'mmpretrain.SparseResNet': 'SparseConv2d may compute something else',
}
"""Classes, as their configs build them, without a layer that could have a denoiser, and why."""

SKIPPED = {
    'mmdet.EfficientNet': {
        'Conv2dAdaptivePadding': {
            'layers.*.*.depthwise_conv.conv': 16,
            'layers.*.*.linear_conv.conv': 16,
            'layers.*.*.expand_conv.conv': 15,
            'layers.*.conv': 2,
        }
    },
    'mmseg.BEiT': {'bypassed': {'layers.*.attn.qkv': 12}},
    'mmseg.SVT': {'bypassed': {'layers.*.*.attn.attn.out_proj': 6}},
    'mmpretrain.BEiTViT': {'bypassed': {'layers.*.attn.qkv': 12}},
    'mmpretrain.SwinTransformerV2': {'bypassed': {'stages.*.blocks.*.attn.w_msa.qkv': 12}},
}
"""Layers that can't be exact, by a part of the reason."""

FAST = {
    'mmdet.EfficientNet',  # convolutions of a class with its own forward
    'mmdet.MobileNetV2',  # depthwise convolutions
    'mmdet.TridentResNet',  # a weight read by three branches
    'mmseg.BiSeNetV2',
    'mmseg.CGNet',  # dilated and depthwise convolutions
    'mmseg.DeconvModule',
    'mmseg.InterpConv',
    'mmseg.SVT',  # nn.MultiheadAttention
    'mmseg.TIMMBackbone',
    'mmseg.VPD',
    'mmpretrain.EdgeNeXt',
    'mmpretrain.LeNet5',  # images of one channel
    'mmpretrain.LeViT',  # a cache that only train() renews
    'mmpretrain.MobileOne',  # switch_to_deploy
    'mmpretrain.ShuffleNetV2',
    'mmpretrain.SparseResNet',
    'mmpretrain.SwinTransformerV2',  # qkv read by its parent
    'mmpretrain.TIMMBackbone',
}
"""What `make test` runs: every mechanism that makes a layer special, in small models."""


@pytest.mark.parametrize('kind', [pytest.param(k, marks=[] if k in FAST else pytest.mark.slow) for k in CLASSES])
def test_backbone(kind):
    row = survey(*kind.split('.'))
    if kind in NOT_BUILT:
        assert row.result == 'not built'
        assert NOT_BUILT[kind] in row.note
        return
    if kind in NO_LAYER:
        assert (row.result, row.converted) == ('no layer', 0)
        assert NO_LAYER[kind] in row.note
        return
    assert (row.result, row.note) == ('exact', '')
    assert row.difference <= TOLERANCE
    assert row.effect > 1e-3
    assert row.converted > 0
    assert row.extra_parameters > 0
    for reason, layers in SKIPPED.get(kind, {}).items():
        [actual] = [names for text, names in row.skipped.items() if reason in text]
        assert actual == layers


def test_no_class_is_forgotten():
    counts = Counter(kind.partition('.')[0] for kind in CLASSES)
    assert counts['mmdet'] >= 20 and counts['mmseg'] >= 31 and counts['mmpretrain'] >= 65
    assert set().union(ARGUMENTS, NOT_BUILT, NO_LAYER, FAST, SKIPPED) <= set(CLASSES)


def test_a_wrong_fusion_is_seen(monkeypatch):
    """Where the dry run does not look for bypassed layers, SwinV2 is wrong, and its row gives the reason."""
    monkeypatch.setattr(select, 'probe_execution', lambda *args: Execution(failure='nobody looked'))
    row = survey('mmpretrain', 'SwinTransformerV2')
    assert (row.result, row.note) == ('wrong', 'dry run failed: nobody looked')
    assert row.difference > 1e-3


def test_denoisers_without_effect_prove_nothing(monkeypatch):
    monkeypatch.setattr(survey_backbones, 'randomise', lambda backbone: backbone)
    row = survey('mmpretrain', 'LeNet5')
    assert (row.result, row.effect, row.difference) == ('no effect', 0, 0)


def test_failures_are_rows():
    row = survey_apart('mmpretrain', 'LeNet5', timeout=0)
    assert (row.result, row.note) == ('crash', 'no result within 0 seconds')
    row = survey_apart('mmnothing', 'LeNet5', timeout=600)
    assert (row.result, row.note) == ('crash', "ModuleNotFoundError: No module named 'mmnothing'")


def test_part_of_the_survey():
    before = PAGE.read_bytes()
    shown = run_process('survey_backbones', '--library', 'mmseg', '--only', 'InterpConv', 'DeconvModule', cwd=ROOT)
    assert (
        '2 classes, 2 of them built: 1 exact, 0 wrong, 0 no effect, 0 crash, 1 no layer; '
        '1 of 2 (50.0%) have at least one denoised layer.\n'
    ) in shown
    assert [row.name for row in read(shown)] == ['DeconvModule', 'InterpConv']
    assert PAGE.read_bytes() == before


def test_unknown_class():
    said = sentence('survey_backbones', '--library', 'mmdet', '--only', 'ResNet', 'ResNett')
    assert said == 'mmdet registers no backbone ResNett'


def read(text):
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if re.match(r'\| mm\w+\.', line):
            result, _, note = cells[-1].partition(': ')
            difference, effect = (float(cell) if cell else None for cell in (cells[7], cells[6]))
            row = Row(*cells[0].split('.'), result, converted=int(cells[3]), difference=difference, effect=effect)
            rows.append(replace(row, note=note, built=cells[1]))
    return rows


def test_page():
    text = PAGE.read_text()
    rows = read(text)
    assert f'**{summary(rows)}**' in text
    for row in rows:
        exact = row.result == 'exact'
        assert exact or row.result in ('no layer', 'not built'), row
        assert exact == (row.converted > 0) == (row.difference is not None) == (not row.note), row
        assert not exact or row.difference <= TOLERANCE < row.effect, row
    assert {f'{row.library}.{row.name}' for row in rows if row.result == 'no layer'} == set(NO_LAYER)
    built = [row for row in rows if row.result != 'not built']
    assert sum(row.converted > 0 for row in built) >= 0.95 * len(built)


@pytest.mark.skipif(versions() not in PAGE.read_text(), reason='the page was written with other versions')
def test_page_has_every_class():
    assert [f'{row.library}.{row.name}' for row in read(PAGE.read_text())] == CLASSES
