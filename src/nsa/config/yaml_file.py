"""YAML as configs are written: what YAML leaves to chance is an error with its line, and what is written reads back.

    values = read_yaml(Path("c.yaml"))
    text = write_yaml(values)

A key that stands twice, a file that unfolds to more than it shows, and nesting without end are refused. Numbers are
those of YAML 1.2: 1e-3 is one, 010 is ten written oddly and stays a text, as dates do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

MAX_BYTES = 2**18  # of a file
MAX_VALUES = 100_000  # of a file, with every alias written out

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_REPLACED = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")
_INT_FORM = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_FLOAT_FORM = re.compile(
    r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_NUMBER_STARTS = list("-+.0123456789")


class ConfigError(ValueError):
    """A config that cannot be used: missing, not YAML, or with a wrong key or value."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in forms if tag not in _REPLACED]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes what any reader, this one included, would take for a number."""


_Loader.add_implicit_resolver(_INT, _INT_FORM, _NUMBER_STARTS)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, _FLOAT_FORM, _NUMBER_STARTS)


def read_yaml(path: Path) -> Any:
    """The value in a YAML file of settings, None for an empty one.

    Raises:
        ConfigError: there is no such file, or it is not YAML that can be taken at its word.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, which no config has; give a YAML file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str) -> Any:
    """The value of a YAML text; `source` names it in errors.

    Raises:
        ConfigError: as `read_yaml`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}, "", source) > MAX_VALUES:
            raise ConfigError(f"{source} unfolds to more than {MAX_VALUES:,} values; write out its aliases (*name)")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}{place} is not valid YAML: {said}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}, line {line} is not valid YAML: character {error.character:#x} is not allowed in it"
        ) from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deep; a config has sections with keys, and lists in them") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source} is not valid YAML: {error}") from None


def write_yaml(values: Any) -> str:
    """Values as YAML text that `parse_yaml` reads back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _size(node: yaml.Node, known: dict[int, int], place: str, source: str) -> int:
    """Values under a node with its aliases written out; keys are checked on the way."""
    if id(node) not in known:
        known[id(node)] = 0  # until it is counted: what refers to itself has no end
        known[id(node)] = 1 + sum(_size(child, known, name, source) for child, name in _children(node, place, source))
    if not known[id(node)]:
        raise ConfigError(f"{source}, line {_line(node)}: the alias refers to what it stands in; write it out")
    return known[id(node)]


def _children(node: yaml.Node, place: str, source: str) -> list[tuple[yaml.Node, str]]:
    if isinstance(node, yaml.SequenceNode):
        return [(child, place) for child in node.value]
    if not isinstance(node, yaml.MappingNode):
        return []
    lines: dict[str, int] = {}
    children: list[tuple[yaml.Node, str]] = []
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{source}, line {_line(key)}: a key must be a plain name, not a list or mapping")
        name = f"{place}{key.value}"
        if key.value in lines:
            raise ConfigError(
                f"{source} has {name} twice, in line {lines[key.value]} and in line {_line(key)}; keep one of them"
            )
        lines[key.value] = _line(key)
        children += [(key, name), (value, f"{name}.")]
    return children


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
