"""Reads the option ``targets``: presets, and regular expressions on module names."""

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
"""Pattern and layer classes of each preset; ``mlp`` takes the Linear layers of transformer MLPs."""

OPTIONS = ('bias', 'rank')
"""Denoiser options that an entry may override."""

POSITION_BIAS = re.compile(r'(.*\.)?cpb_mlp\..*')
"""SwinV2's position-bias MLP, which presets leave out: its input is a constant table instead of features."""


@dataclass(frozen=True, eq=False)
class Target:
    """One entry of ``targets``: as the user wrote it, what it matches, and the :data:`OPTIONS` that it overrides."""

    text: str
    pattern: re.Pattern
    types: tuple[type[nn.Module], ...]
    overrides: Mapping

    def matches(self, name: str, layer: nn.Module) -> bool:
        """Whether this entry matches a layer by name and class."""
        if self.text in PRESETS and POSITION_BIAS.fullmatch(name):
            return False
        return isinstance(layer, self.types) and self.pattern.fullmatch(name) is not None


def parse_targets(targets: Targets) -> list[Target]:
    """Parses ``targets``.

    Args:
        targets: One entry or a list of entries. An entry is a preset (a key of :data:`PRESETS`), a regular expression
            that must match the whole module name, or ``dict(pattern=<either>, <option>=...)`` with :data:`OPTIONS`.

    Raises:
        ValueError: There is no entry, or an entry is malformed.
    """
    entries = list(targets) if isinstance(targets, Sequence) and not isinstance(targets, str) else [targets]
    if not entries:
        raise ValueError(f'targets is empty: name a preset ({", ".join(PRESETS)}) or a regular expression')
    return [_parse_target(entry) for entry in entries]


def compile_pattern(text: object) -> re.Pattern:
    """Compiles a regular expression.

    Raises:
        ValueError: The text is no string or no valid regular expression.
    """
    if not isinstance(text, str):
        raise ValueError(f'{text!r} is not a regular expression (a string) on module names')
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f'{text!r} is no valid regular expression: {error}') from None


def near_names(text: str, names: Collection[str]) -> str:
    """Returns the end of an error message that suggests similar names."""
    plain = re.sub(r'\\d\+?', '0', text).replace('\\', '')
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.4) or sorted(names)[:3]
    return f'; near names: {", ".join(near)}' if near else '; the model has no Linear and no Conv2d layer'


def _parse_target(entry: str | Mapping) -> Target:
    overrides: dict = {}
    if isinstance(entry, Mapping):
        overrides = {key: value for key, value in entry.items() if key != 'pattern'}
        unknown = sorted(set(overrides) - set(OPTIONS))
        if unknown or 'pattern' not in entry:
            raise ValueError(
                f'the target {dict(entry)} must have a key pattern and may have {", ".join(OPTIONS)}'
                + (f'; unknown: {", ".join(unknown)}' if unknown else '')
            )
        entry = entry['pattern']
    if isinstance(entry, str) and entry in PRESETS:
        pattern, types = PRESETS[entry]
        return Target(entry, re.compile(pattern), types, overrides)
    return Target(str(entry), compile_pattern(entry), (nn.Linear, nn.Conv2d), overrides)
