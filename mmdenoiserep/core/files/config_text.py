"""The text of a config without denoising, from that of the training run; nothing of it is executed."""

import ast
from collections.abc import Iterator

HOOKS = ('DenoiseLossHook', 'DenoiseFusionHook', 'DenoiseVisHook')
PACKAGE = 'mmdenoiserep'
REGISTERED = ('VMamba',)
"""What importing the package registers besides, which a config without denoising may use."""


def vanilla_text(text: str) -> str:
    """Returns the text of the config without denoising.

    Every ``DenoiseRepBackbone`` becomes the backbone in it; its hooks, the settings of ``.denoiser.`` parameters and
    the import of this package go, unless the config needs the package for something else.

    Args:
        text: What mmengine writes into ``meta['cfg']``: a Python file.

    Returns:
        The text; statements that do not change stay as they are, to the letter.

    Raises:
        ValueError: The text speaks of denoising and is no Python file.
    """
    if 'denoise' not in text.lower():
        return text
    try:
        module = ast.parse(text)
        old = [ast.get_source_segment(text, statement) or '' for statement in module.body]
        before = [ast.dump(statement) for statement in module.body]
        _Vanilla().visit(module)
        if not _needs_package(module):
            _drop_import(module)
        if [ast.dump(statement) for statement in module.body] == before:
            return text
        new = []
        for statement in module.body:
            dump = ast.dump(statement)
            new.append(old[before.index(dump)] if dump in before else ast.unparse(statement))
        return '\n'.join(new) + '\n'
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f'it is no Python file: {error}') from None


def _needs_package(module: ast.Module) -> bool:
    values = [node.value for node in ast.walk(module) if isinstance(node, ast.Constant)]
    names = {value.rpartition('.')[2] for value in values if isinstance(value, str)}
    return not names.isdisjoint({'DenoiseRepBackbone', *HOOKS, *REGISTERED})


def _drop_import(module: ast.Module) -> None:
    """Drops this package from ``custom_imports``, and ``custom_imports`` where nothing else is in it."""
    for statement in list(module.body):
        if not isinstance(statement, ast.Assign) or ast.unparse(statement.targets[0]) != 'custom_imports':
            continue
        imports = _fields(statement.value).get('imports')
        listed = imports.elts if isinstance(imports, ast.List | ast.Tuple) else [imports]
        kept = [item for item in listed if item and not (isinstance(item, ast.Constant) and item.value == PACKAGE)]
        if isinstance(imports, ast.List | ast.Tuple) and kept:
            imports.elts = kept
        elif len(kept) < len(listed):
            module.body.remove(statement)


class _Vanilla(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replaces ``dict(type='DenoiseRepBackbone', backbone=...)``; drops the hooks in ``default_hooks``."""
        self.generic_visit(node)
        node.keywords = [keyword for keyword in node.keywords if _kind(keyword.value) not in HOOKS]
        return self._unwrap(node)

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        """Likewise in ``{...}``, and drops ``'.denoiser.'`` from the settings of parameters."""
        self.generic_visit(node)
        items = [
            (key, value)
            for key, value in zip(node.keys, node.values, strict=True)
            if not (isinstance(key, ast.Constant) and key.value == '.denoiser.') and _kind(value) not in HOOKS
        ]
        node.keys, node.values = [key for key, _ in items], [value for _, value in items]
        return self._unwrap(node)

    def visit_List(self, node: ast.List) -> ast.AST:
        """Drops the hooks."""
        self.generic_visit(node)
        node.elts = [item for item in node.elts if _kind(item) not in HOOKS]
        return node

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        """Drops the hooks."""
        self.generic_visit(node)
        node.elts = [item for item in node.elts if _kind(item) not in HOOKS]
        return node

    @staticmethod
    def _unwrap(node: ast.Call | ast.Dict) -> ast.AST:
        fields = _fields(node)
        if _kind(node) != 'DenoiseRepBackbone' or 'backbone' not in fields:
            return node
        inner, pretrained = fields['backbone'], fields.get('pretrained')
        if pretrained is None or (isinstance(pretrained, ast.Constant) and pretrained.value is None):
            return inner
        return ast.Call(
            func=ast.Name('dict', ast.Load()),
            args=[inner],
            keywords=[ast.keyword('pretrained', pretrained)],
        )


def _fields(node: ast.AST) -> dict[str, ast.expr]:
    """Returns the items of ``dict(a=1)``, ``{'a': 1}`` or ``dict({'a': 1})``."""
    return dict(_items(node))


def _items(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        for argument in node.args:
            yield from _items(argument)
        for keyword in node.keywords:
            if keyword.arg:
                yield keyword.arg, keyword.value


def _kind(node: ast.AST) -> str | None:
    """Returns the bare name of what a config builds; lazy configs are written with the whole one."""
    kind = _fields(node).get('type')
    return kind.value.rpartition('.')[2] if isinstance(kind, ast.Constant) and isinstance(kind.value, str) else None
