"""The metric of re-identification: a case by hand, explicit loops as the reference, and mmengine's evaluation."""

import json
import logging
import os
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import METRICS, init_default_scope
from mmpretrain.datasets import PackInputs
from mmpretrain.structures import DataSample

from engine_helpers import message
from mmdenoiserep.core import InputError
from mmdenoiserep.evaluation import reid_ranking as ranking
from mmdenoiserep.evaluation.reid_metric import KEYS, ReIDMetric, centre_by_camera, draw_queries
from mmdenoiserep.evaluation.reid_ranking import rank_matches

GALLERY = [(0.0, 1, 0), (1.0, 2, 1), (3.0, 1, 1), (6.0, 1, 1)]  # a to d: feature, pid, camid
QUERIES = [
    (2.5, 1, 0),  # a is removed; c .25, b 2.25, d 12.25: matches at ranks 1 and 3
    (2.0, 2, 1),  # b, its only match, is removed: no valid query
    (2.0, 1, 2),  # nothing is removed; b 1, c 1 (a tie, b comes first in the gallery), a 4, d 16: ranks 2, 3 and 4
]
PRECISIONS = (1 + Fraction(2, 3)) / 2, (Fraction(1, 2) + Fraction(2, 3) + Fraction(3, 4)) / 3
BY_HAND = dict(
    mAP=sum(PRECISIONS) / 2, rank1=Fraction(1, 2), rank2=Fraction(1), mINP=(Fraction(2, 3) + Fraction(3, 4)) / 2
)


def columns(rows):
    """Features (N, 1), identities and cameras of rows (feature, pid, camid)."""
    features, pids, camids = zip(*rows, strict=True)
    return torch.tensor(features)[:, None], torch.tensor(pids), torch.tensor(camids)


def by_hand(**options):
    arguments = [side for sides in zip(columns(QUERIES), columns(GALLERY), strict=True) for side in sides]
    return rank_matches(*arguments, **options)


def test_a_case_by_hand():
    assert list(PRECISIONS) == [Fraction(5, 6), Fraction(23, 36)]
    assert (BY_HAND['mAP'], BY_HAND['mINP']) == (Fraction(53, 72), Fraction(17, 24))
    result = by_hand()
    assert result.queries.tolist() == [0, 2] and result.first_rank.tolist() == [1, 2]
    assert result.average_precision.tolist() == pytest.approx([5 / 6, 23 / 36], abs=1e-15)
    assert result.metrics((1, 2)) == pytest.approx({name: float(value) for name, value in BY_HAND.items()}, abs=1e-15)


def test_the_nearest_entries_leave_out_what_is_removed():
    result = by_hand(num_nearest=9)
    assert result.nearest[0, :3].tolist() == [2, 1, 3]
    assert result.distances[0].tolist() == [0.25, 2.25, 12.25, float('inf')]
    assert result.nearest[1].tolist() == [1, 2, 0, 3]
    assert result.distances[1].tolist() == [1, 1, 4, 16]
    assert by_hand(num_nearest=2).nearest.tolist() == [[2, 1], [1, 2]]


def reference(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids):
    """AP, first rank, INP and ranked gallery of every valid query, in plain Python."""
    rows = {}
    for q, feature in enumerate(query.tolist()):

        def distance(g, feature=feature):
            return sum((a - b) ** 2 for a, b in zip(feature, gallery[g].tolist(), strict=True)), g

        same = [p == query_pids[q] and c == query_camids[q] for p, c in zip(gallery_pids, gallery_camids, strict=True)]
        ordered = sorted((g for g in range(len(gallery)) if not same[g]), key=distance)
        ranks = [rank for rank, g in enumerate(ordered, 1) if gallery_pids[g] == query_pids[q]]
        if ranks:
            precisions = [(ranks.index(rank) + 1) / rank for rank in ranks]
            rows[q] = (sum(precisions) / len(ranks), ranks[0], len(ranks) / ranks[-1], ordered)
    return rows


def random_case(seed, queries=23, gallery=61, whole=True, dtype=torch.float32):
    """Few identities and cameras, distractors, and with whole numbers many equal distances, which are exact."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (queries, gallery)]
    pids = [torch.randint(12, (n,), generator=generator) for n in (queries, gallery)]
    pids[1][pids[1] < 4] = 0  # distractors; the queries of identities 1 to 3 find no match
    camids = [torch.randint(2, (n,), generator=generator) for n in (queries, gallery)]
    return [*((x.mul(2).round() if whole else x).to(dtype) for x in features), *pids, *camids]


@pytest.mark.parametrize('chunk_size', [1, 2, 7, 23, None])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_against_explicit_loops(chunk_size, dtype):
    for seed in range(4):
        case = random_case(seed, dtype=dtype)
        expected = reference(*case)
        assert 0 < len(expected) < len(case[0])
        result = rank_matches(*case, num_nearest=61, chunk_size=chunk_size)
        assert result.queries.tolist() == list(expected)
        precision, first, inverse, ordered = zip(*expected.values(), strict=True)
        assert result.average_precision.tolist() == pytest.approx(list(precision), abs=1e-12)
        assert result.first_rank.tolist() == list(first) and result.inverse_penalty.tolist() == list(inverse)
        for nearest, distances, right in zip(result.nearest, result.distances, ordered, strict=True):
            assert nearest[: len(right)].tolist() == right
            assert distances[: len(right)].isfinite().all() and distances[len(right) :].isinf().all()
        figures = result.metrics((1, 3))
        assert figures['mAP'] == pytest.approx(np.mean(precision), abs=1e-12)
        assert figures['mINP'] == pytest.approx(np.mean(inverse), abs=1e-12)
        assert [figures[f'rank{k}'] for k in (1, 3)] == [np.mean(np.array(first) <= k) for k in (1, 3)]


def test_float64_tells_apart_what_float32_can_not():
    """Two gallery entries at distances 1 and 1 - 2e-12: in float32 the first one wins, in float64 the nearer one."""
    ids = torch.tensor([1]), torch.tensor([2, 1]), torch.tensor([0]), torch.tensor([1, 1])
    query, gallery = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[1.0], [1 - 1e-12]], dtype=torch.float64)
    assert rank_matches(query, gallery, *ids).first_rank.tolist() == [1]
    assert rank_matches(query.float(), gallery.float(), *ids).first_rank.tolist() == [2]


@pytest.mark.parametrize(('dtype', 'error'), [(torch.float32, 1e-5), (torch.float64, 1e-14)])
def test_distances_are_in_the_dtype_of_the_features_and_autocast_changes_nothing(dtype, error):
    case = random_case(9, whole=False, dtype=dtype)
    result = rank_matches(*case, num_nearest=5)
    assert result.distances.dtype == dtype
    pairs = case[1][result.nearest] - case[0][result.queries][:, None]
    assert (result.distances.double() - pairs.double().square().sum(2)).abs().max() < error
    with torch.autocast('cpu', torch.bfloat16):
        again = rank_matches(*case, num_nearest=5)
    assert torch.equal(again.distances, result.distances) and again.metrics() == result.metrics()


def test_distances_come_in_chunks_of_bounded_size(monkeypatch):
    """Of 23 x 61 distances never more than the bound are sorted at a time; a row of its own where even that is less."""
    sizes = []
    scores = ranking._scores
    monkeypatch.setattr(ranking, '_scores', lambda hits: sizes.append(hits.numel()) or scores(hits))
    expected = rank_matches(*random_case(0)).metrics()
    for bound, chunks in ((200, 8), (10, 23)):  # 3 rows and 1 row of 61
        sizes.clear()
        monkeypatch.setattr(ranking, 'CHUNK', bound)
        assert rank_matches(*random_case(0)).metrics() == expected
        assert len(sizes) == chunks and max(sizes) <= max(bound, 61)


def make_samples(seed=0, queries=20, gallery=50, **options):
    """Data samples as a model returns them: queries, then the gallery; metainfo is packed by mmpretrain."""
    case = random_case(seed, queries, gallery, whole=False, **options)
    features, pids, camids = (torch.cat(case[i : i + 2]) for i in (0, 2, 4))
    pack = PackInputs(meta_keys=KEYS)
    samples = []
    for i in range(queries + gallery):
        info = dict(sample_idx=i, img_path=f'{i}.jpg', pid=int(pids[i]), camid=int(camids[i]), is_query=i < queries)
        sample = pack(info)['data_samples']
        sample.set_field(features[i], 'pred_feature', dtype=torch.Tensor)
        samples.append(sample)
    return samples


def evaluate(samples, **options):
    """Runs mmengine's Evaluator over the samples in batches of eight, with mmpretrain's scope as in its runners."""
    init_default_scope('mmpretrain')
    evaluator = Evaluator([dict(type='ReIDMetric', **options)])
    for start in range(0, len(samples), 8):
        evaluator.process(samples[start : start + 8])
    return evaluator.evaluate(len(samples))


def arguments(samples, normalize=True):
    """What the samples are to rank_matches."""
    features = torch.stack([sample.pred_feature for sample in samples])
    features = F.normalize(features) if normalize else features
    values = [features, *(torch.tensor([getattr(s, key) for s in samples]) for key in ('pid', 'camid'))]
    is_query = torch.tensor([sample.is_query for sample in samples])
    return [value[side] for value in values for side in (is_query, ~is_query)]


def percent(figures, prefix='reid'):
    return {f'{prefix}/{name}': pytest.approx(100 * value, abs=1e-9) for name, value in figures.items()}


def labelled(index, x, pid, camid, is_query):
    """A data sample whose feature is one number."""
    known = dict(sample_idx=index, img_path='', pid=pid, camid=camid, is_query=is_query)
    return DataSample(metainfo=known, pred_feature=torch.tensor([x]))


def test_figures_in_percent():
    samples = [labelled(i, *row, is_query=i < 3) for i, row in enumerate(QUERIES + GALLERY)]
    result = evaluate(samples, topk=(1, 2), normalize=False)
    assert result == percent({name: float(value) for name, value in BY_HAND.items()})


@pytest.mark.parametrize('normalize', [True, False])
def test_features_are_normalised_unless_told_not_to(normalize):
    samples = make_samples()
    expected = rank_matches(*arguments(samples, normalize)).metrics()
    assert evaluate(samples, normalize=normalize) == percent(expected)
    assert expected.keys() == {'mAP', 'rank1', 'rank5', 'rank10', 'mINP'}
    assert expected != rank_matches(*arguments(samples, not normalize)).metrics()


def camera_samples(seed=3):
    """Data samples of three cameras with unequal numbers of images, in float64; each camera shifts its features."""
    samples = make_samples(seed, dtype=torch.float64)
    for i, sample in enumerate(samples):
        sample.set_field(camid := (0, 5, 0, 9, 0, 5, 0)[i % 7], 'camid', field_type='metainfo')
        sample.pred_feature += torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64) * camid
    return samples


def centred_by_loop(samples, counted=lambda sample: True):
    """The features less the mean of the counted images of their camera, (N, C), float64, one image after the other."""
    features = [sample.pred_feature.numpy().astype(np.float64) for sample in samples]
    rows = []
    for sample, feature in zip(samples, features, strict=True):
        own = [f for f, s in zip(features, samples, strict=True) if s.camid == sample.camid and counted(s)]
        rows.append(feature - sum(own) / len(own))
    return np.array(rows)


def figures_by_loop(samples, features):
    """mAP, rank-1 and mINP of float64 features, (N, C), by the loops of :func:`reference`."""
    arrays = features, np.array([s.pid for s in samples]), np.array([s.camid for s in samples])
    is_query = np.array([sample.is_query for sample in samples])
    rows = reference(*(array[side] for array in arrays for side in (is_query, ~is_query))).values()
    precision, first, inverse, _ = (np.array(column, dtype=object) for column in zip(*rows, strict=True))
    return dict(mAP=precision.mean(), rank1=(first == 1).mean(), mINP=inverse.mean())


@pytest.mark.parametrize('normalize', [True, False])
def test_features_are_centred_by_camera_and_then_normalised(normalize):
    """Against loops in NumPy; the other orders and the mean of the gallery alone give other figures."""
    samples = camera_samples()

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows

    plain = np.stack([sample.pred_feature.numpy() for sample in samples])
    expected = figures_by_loop(samples, unit(centred_by_loop(samples)))
    result = evaluate(samples, centre_cameras=True, normalize=normalize, topk=(1,))
    assert result == percent(expected, 'reid_centred')
    others = [unit(plain), unit(centred_by_loop(samples, lambda s: not s.is_query))]
    if normalize:
        units = [
            DataSample(metainfo=s.metainfo, pred_feature=torch.from_numpy(row))
            for s, row in zip(samples, unit(plain), strict=True)
        ]
        others += [centred_by_loop(units), unit(centred_by_loop(units))]
    assert all(figures_by_loop(samples, other) != pytest.approx(expected, abs=1e-9) for other in others)


@pytest.mark.parametrize(('dtype', 'error'), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_mean_of_each_camera(dtype, error):
    samples = camera_samples()
    features, camids = torch.stack([s.pred_feature for s in samples]), torch.tensor([s.camid for s in samples])
    kept = features.to(dtype, copy=True)
    centred = centre_by_camera(kept, camids)
    assert centred.dtype == dtype and torch.equal(kept, features.to(dtype))
    np.testing.assert_allclose(centred, centred_by_loop(samples), rtol=0, atol=error)


@pytest.mark.parametrize('options', [dict(), dict(trials=3, seed=7)])
def test_centring_takes_a_shift_of_a_camera_away(options):
    """A shift of all features of one camera changes the plain figures only, with the protocol of VehicleID too."""
    samples, shifted = camera_samples(), camera_samples()
    for sample in shifted:
        sample.pred_feature += (sample.camid == 9) * torch.tensor([4.0, 0.0, -3.0], dtype=torch.float64)
    assert evaluate(samples, **options) != pytest.approx(evaluate(shifted, **options), abs=1e-9)
    centred = evaluate(samples, centre_cameras=True, **options)
    assert centred == pytest.approx(evaluate(shifted, centre_cameras=True, **options), abs=1e-9)


def test_metrics_with_and_without_centring_in_one_evaluation():
    samples = camera_samples()
    both = [dict(type='ReIDMetric'), dict(type='ReIDMetric', centre_cameras=True)]
    init_default_scope('mmpretrain')
    evaluator = Evaluator(both)
    evaluator.process(samples)
    assert evaluator.evaluate(len(samples)) == {**evaluate(samples), **evaluate(samples, centre_cameras=True)}
    assert {name.split('/')[0] for name in evaluate(samples, centre_cameras=True, prefix='own')} == {'own'}


@pytest.mark.parametrize('trials', [None, 2])
def test_centring_needs_cameras(trials):
    samples = make_samples()
    same_camera(samples)
    with pytest.raises(InputError) as error:
        evaluate(samples, centre_cameras=True, trials=trials)
    assert 'needs camera ids, but all 70 images have camid 0: leave it off' in message(error)


def test_the_order_of_the_samples_does_not_matter():
    samples = make_samples(1)
    for sample in samples:
        sample.pred_feature = sample.pred_feature.round()
    shuffled = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]
    assert evaluate(shuffled) == evaluate(samples)
    assert evaluate(shuffled, trials=2) == evaluate(samples, trials=2)


@pytest.fixture
def log(monkeypatch):
    """The lines of mmengine's log."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [handler])
    return lines


def test_a_log_line_says_how_many_queries_are_left_out(log):
    samples = make_samples()
    left_out = 20 - len(reference(*arguments(samples)))
    assert left_out > 0
    evaluate(samples)
    assert f'20 queries, 50 gallery images; {left_out} queries without a match' in '\n'.join(log)


def test_a_log_line_names_the_centring(log):
    evaluate(camera_samples())
    assert 'centre_cameras' not in '\n'.join(log)
    evaluate(camera_samples(), centre_cameras=True)
    assert 'centre_cameras is on, 3 cameras of 10 to 40 images; results are not comparable' in '\n'.join(log)


def test_features_are_kept_compact_and_in_their_dtype():
    metric = ReIDMetric()
    for dtype, kept in ((torch.float16, np.float32), (torch.float32, np.float32), (torch.float64, np.float64)):
        batch = torch.randn(64, 100).to(dtype).requires_grad_()
        metric.process(None, [dict(make_samples()[0].to_dict(), pred_feature=feature) for feature in batch])
        assert metric.results[-1]['feature'].dtype == kept
        assert metric.results[-1]['feature'].flags.owndata
        assert len(pickle.dumps(metric.results[-1])) < 100 * np.dtype(kept).itemsize + 500
        np.testing.assert_array_equal(metric.results[-1]['feature'], batch[-1].detach().numpy())


def test_each_trial_draws_one_image_of_each_identity():
    pids = torch.tensor([5, 3, 5, 5, 8, 3, 5])
    drawn = []
    for seed in range(200):
        is_query = draw_queries(pids, seed, 1)
        assert torch.equal(pids[~is_query].sort().values, torch.tensor([3, 5, 8]))
        assert torch.equal(is_query, draw_queries(pids, seed, 1))
        drawn.append(~is_query)
    share = torch.stack(drawn).double().mean(0)
    assert torch.allclose(share, torch.tensor([1 / 4, 1 / 2, 1 / 4, 1 / 4, 1, 1 / 2, 1 / 4]).double(), atol=0.1)
    many = torch.arange(30).repeat_interleave(9)  # seeds share no trial
    assert len({draw_queries(many, seed, trial).numpy().tobytes() for seed in range(4) for trial in range(4)}) == 16


def test_figures_are_means_over_the_trials():
    """No camera removes anything: every identity has one image in the gallery, which all its queries find."""
    samples = make_samples(2)
    features, pids = torch.stack([s.pred_feature for s in samples]), torch.tensor([s.pid for s in samples])
    features = F.normalize(features)
    expected = []
    for trial in range(3):
        is_query = draw_queries(pids, 7, trial)
        values = (features, pids, is_query.long())
        rows = reference(*(value[side] for value in values for side in (is_query, ~is_query)))
        assert len(rows) == is_query.sum()
        precision, first, inverse, _ = (np.array(column, dtype=object) for column in zip(*rows.values(), strict=True))
        expected.append(
            dict(mAP=precision.mean(), **{f'rank{k}': (first <= k).mean() for k in (1, 5, 10)}, mINP=inverse.mean())
        )
    means = {name: float(np.mean([trial[name] for trial in expected])) for name in expected[0]}
    assert evaluate(samples, trials=3, seed=7) == percent(means)
    assert evaluate(samples, trials=1, seed=7) != evaluate(samples, trials=1, seed=8)


def test_an_identity_with_one_image_has_no_query():
    samples = [labelled(i, 1.0, pid, 0, is_query=False) for i, pid in enumerate((1, 1, 2))]
    assert evaluate(samples, trials=4)['reid/rank5'] == 100
    with pytest.raises(InputError, match='0 queries and 2 gallery images: every identity has only one image') as error:
        evaluate(samples[1:], trials=4)
    assert message(error)


def test_the_matches_file(tmp_path):
    samples = make_samples(4)
    path = tmp_path / 'new/matches.json'
    figures = evaluate(samples, matches_file=str(path), num_matches=7)
    assert [file.name for file in path.parent.iterdir()] == ['matches.json']
    entries = json.loads(path.read_text())
    expected = reference(*arguments(samples))
    queries, gallery = samples[:20], samples[20:]
    assert [entry['sample_idx'] for entry in entries] == list(expected)
    for entry, (q, (precision, _, _, ordered)) in zip(entries, expected.items(), strict=True):
        assert entry['ap'] == pytest.approx(precision, abs=1e-12)
        assert (entry['img_path'], entry['pid'], entry['camid']) == (f'{q}.jpg', queries[q].pid, queries[q].camid)
        assert [match['sample_idx'] for match in entry['matches']] == [20 + g for g in ordered[:7]]
        for match, g in zip(entry['matches'], ordered, strict=False):
            found = gallery[g]
            assert (match['img_path'], match['pid'], match['camid']) == (found.img_path, found.pid, found.camid)
            assert match['correct'] == (found.pid == queries[q].pid)
            pair = F.normalize(torch.stack([queries[q].pred_feature, found.pred_feature]))
            assert match['distance'] == pytest.approx((pair[0] - pair[1]).square().sum().item(), abs=1e-5)
    assert figures['reid/mAP'] == pytest.approx(100 * np.mean([entry['ap'] for entry in entries]))


def test_fewer_matches_where_the_gallery_is_small_and_the_first_trial(tmp_path):
    samples = make_samples(5)
    path = tmp_path / 'matches.json'
    evaluate(samples, matches_file=str(path), num_matches=100)
    assert {len(entry['matches']) for entry in json.loads(path.read_text())} <= set(range(40, 51))
    evaluate(samples, matches_file=str(path), trials=3, seed=2)
    is_query = draw_queries(torch.tensor([sample.pid for sample in samples]), 2, 0)
    entries = json.loads(path.read_text())
    assert [entry['sample_idx'] for entry in entries] == is_query.nonzero().flatten().tolist()
    assert all(not is_query[match['sample_idx']] for entry in entries for match in entry['matches'])


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'matches.json'
    path.write_text('old')

    def full(*args):
        raise OSError('no space')

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='no space'):
        evaluate(make_samples(), matches_file=str(path))
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def worker(rank, folder):
    """One of two processes; the sampler pads 69 images to 70."""
    os.chdir(folder)
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    samples = make_samples(6, gallery=49)
    own = [samples[i] for i in DefaultSampler(samples, shuffle=False)]
    results = []
    for options in (dict(matches_file=f'{folder}/rank{rank}.json'), dict(trials=3), dict(centre_cameras=True)):
        init_default_scope('mmpretrain')
        evaluator = Evaluator([dict(type='ReIDMetric', **options)])
        evaluator.process(own)
        results.append(evaluator.evaluate(len(samples)))
    Path(folder, f'result{rank}.json').write_text(json.dumps([len(own), *results]))
    dist.destroy_process_group()


def test_two_processes_give_the_figures_of_one(tmp_path):
    """With a padded sample, on both ranks; the main process alone writes the matches."""
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    samples = make_samples(6, gallery=49)
    options = dict(matches_file=str(tmp_path / 'alone.json')), dict(trials=3), dict(centre_cameras=True)
    expected = [35, *(evaluate(samples, **option) for option in options)]
    for rank in range(2):
        assert json.loads((tmp_path / f'result{rank}.json').read_text()) == expected
    assert (tmp_path / 'rank0.json').read_text() == (tmp_path / 'alone.json').read_text()
    assert not (tmp_path / 'rank1.json').exists()


def test_registered_in_the_root():
    for scope in (None, 'mmpretrain', 'mmdet'):
        assert type(METRICS.build(dict(type='ReIDMetric', _scope_=scope))) is ReIDMetric


def same_camera(samples):
    """As where the data set knows no cameras and says 0 for all."""
    for sample in samples:
        sample.set_field(0, 'camid', field_type='metainfo')


PACK = "PackInputs(meta_keys=('sample_idx', 'img_path', 'pid', 'camid', 'is_query'))"
NOT_FINITE = 'pred_feature of 30.jpg has NaN or infinite values'


@pytest.mark.parametrize(
    ('change', 'texts'),
    [
        *((lambda samples, key=key: delattr(samples[3], key), (f'ReIDMetric needs {key} ', PACK)) for key in KEYS),
        (
            lambda samples: delattr(samples[0], 'pred_feature'),
            ('needs pred_feature, which heads such as BNNeckReIDHead predict',),
        ),
        (lambda samples: samples[30].pred_feature[1:2].fill_(float('nan')), (NOT_FINITE,)),
        (lambda samples: samples[30].pred_feature[1:2].fill_(float('inf')), (NOT_FINITE,)),
        (lambda samples: setattr(samples[0], 'pred_feature', torch.zeros(1, 3)), ('shape (C,), got (1, 3)',)),
        (lambda samples: samples.__delitem__(slice(20)), ('0 queries and 50 gallery images',)),
        (lambda samples: samples.__delitem__(slice(20, None)), ('20 queries and 0 gallery images',)),
        (list.clear, ('got no images',)),
        (same_camera, ('none of the 20 queries has a match in the gallery from another',)),
    ],
)
def test_samples_that_cannot_be_ranked(change, texts):
    samples = make_samples()
    change(samples)
    with pytest.raises(InputError) as error:
        evaluate(samples)
    assert all(text in message(error) for text in texts)


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (dict(topk=(0, 5)), 'topk of ReIDMetric must be 1 or more, got 0'),
        (dict(topk=()), 'topk'),
        (dict(trials=0), 'trials of ReIDMetric must be 1 or more, got 0'),
        (dict(num_matches=0), 'num_matches'),
        (dict(matches_file='matches.pkl'), 'must end with .json, got matches.pkl'),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(InputError) as error:
        ReIDMetric(**options)
    assert text in message(error)
