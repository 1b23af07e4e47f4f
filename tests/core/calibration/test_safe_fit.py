"""How much of a fit is safe, by the images that there are."""

from mmdenoiserep.core import safe_fit


def test_what_is_safe_depends_on_the_images():
    layers = ['a', 'b', 'c']
    first = dict(layers=('a',), fit='covariance', prior=16.0)
    assert safe_fit(layers, 100_000) == first == safe_fit(layers, 31, representative=True)
    assert safe_fit(layers, 32, True) == dict(layers=('a', 'b'), fit='full', prior=16.0)
    assert safe_fit(layers, 511, True)['layers'] == ('a', 'b')
    assert safe_fit(layers, 512, True) == dict(layers=('a', 'b', 'c'), fit='full', prior=0.0)
