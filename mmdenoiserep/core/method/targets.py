"""Which layers get a denoiser: full-match regular expressions on module names, and presets."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

Targets = str | Mapping | Sequence[str | Mapping]

PRESETS: dict[str, tuple[str, tuple[type[nn.Module], ...]]] = {
    'mlp': (r'(.*\.)?(mlp|ffn)\..*', (nn.Linear,)),
    'linear': (r'.*', (nn.Linear,)),
    'conv2d': (r'.*', (nn.Conv2d,)),
    'all': (r'.*', (nn.Linear, nn.Conv2d)),
}
"""Name: (pattern, layer types). ``mlp`` takes the Linear layers of transformer MLPs."""

POSITION_BIAS = re.compile(r'(.*\.)?cpb_mlp\..*')
"""SwinV2's position-bias MLP sees a constant table instead of features: presets leave it out, a pattern may name it."""


@dataclass(frozen=True, eq=False)
class Target:
    """One entry of ``targets``: what it matches and the denoiser options that it overrides."""

    text: str
    pattern: re.Pattern
    types: tuple[type[nn.Module], ...]
    overrides: Mapping

    def matches(self, name: str, layer: nn.Module) -> bool:
        """Whether this entry takes the layer of that name."""
        if self.text in PRESETS and POSITION_BIAS.fullmatch(name):
            return False
        return isinstance(layer, self.types) and self.pattern.fullmatch(name) is not None


def parse_targets(targets: Targets, options: Collection[str]) -> list[Target]:
    """Reads ``targets`` as users write them.

    Args:
        targets: One entry or a list of them. An entry is a preset (a key of :data:`PRESETS`), a regular expression that
            must match the whole module name, or ``dict(pattern=<either>, <option>=...)`` with overrides.
        options: The options that an entry may override.

    Raises:
        ValueError: An entry is not one of these, or there is none.
    """
    entries = list(targets) if isinstance(targets, Sequence) and not isinstance(targets, str) else [targets]
    if not entries:
        raise ValueError(f'targets is empty: name a preset ({", ".join(PRESETS)}) or a regular expression')
    return [_parse_target(entry, options) for entry in entries]


def compile_pattern(text: object) -> re.Pattern:
    """Compiles a regular expression, or raises a ValueError that shows it."""
    if not isinstance(text, str):
        raise ValueError(f'{text!r} is not a regular expression (a string) on module names')
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f'{text!r} is no valid regular expression: {error}') from None


def near_names(text: str, names: Collection[str]) -> str:
    """Returns the end of an error message: the names that were probably meant."""
    plain = re.sub(r'\\d\+?', '0', text).replace('\\', '')
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.4) or sorted(names)[:3]
    return f'; near names: {", ".join(near)}' if near else '; the model has no Linear and no Conv2d layer'


def _parse_target(entry: str | Mapping, options: Collection[str]) -> Target:
    overrides: dict = {}
    if isinstance(entry, Mapping):
        overrides = {key: value for key, value in entry.items() if key != 'pattern'}
        unknown = sorted(set(overrides) - set(options))
        if unknown or 'pattern' not in entry:
            raise ValueError(
                f'the target {dict(entry)} must have a key pattern and may have {", ".join(sorted(options))}'
                + (f'; unknown: {", ".join(unknown)}' if unknown else '')
            )
        entry = entry['pattern']
    if isinstance(entry, str) and entry in PRESETS:
        pattern, types = PRESETS[entry]
        return Target(entry, re.compile(pattern), types, overrides)
    return Target(str(entry), compile_pattern(entry), (nn.Linear, nn.Conv2d), overrides)
