"""How does a file become typed settings? Unknown, missing and repeated keys are refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

Kind = TypeVar("Kind")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, which YAML 1.1 takes for text, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        return _once(
            [
                (self.construct_object(k, deep), self.construct_object(v, deep=True))
                for k, v in node.value
            ]
        )


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_mapping(path: Path, extended_by: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a YAML file, or a JSON where the name ends so.

    Its key ``extends`` names other files, by the path from this one: one, or a list. What they say
    holds where this one, or a later one of them, says nothing; of mappings, key by key.

    Args:
        path: of the file.
        extended_by: files that this one is read for.

    Raises:
        ValueError: it is none, no mapping, a key stands in it twice, or it extends itself.
        OSError: it cannot be read.
    """
    try:
        text = path.read_bytes().decode()
        if path.suffix == ".json":
            parsed = json.loads(text, object_pairs_hook=_once)
        else:
            parsed = yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is no YAML or JSON: {' '.join(str(error).split())}") from None
    if not isinstance(parsed, dict):
        raise ValueError("it must be a mapping, with task, optimizers and so on")
    extends = parsed.pop("extends", [])
    readers = (*extended_by, path.resolve())
    joined: dict[str, Any] = {}
    for name in extends if isinstance(extends, list) else [extends]:
        below = path.parent / str(name)
        if below.resolve() in readers:
            raise ValueError(f"extends={name!r} comes back to that file; name another")
        try:
            joined = _laid_on(joined, read_mapping(below, readers))
        except (ValueError, OSError) as error:
            raise ValueError(f"extends={name!r}: {error}") from None
    return _laid_on(joined, parsed)


def _laid_on(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    joined = {key: _laid_on(below.get(key), value) for key, value in above.items()}
    return {**below, **joined}


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"{twice} stands there twice; rename or remove one")
    return found


def build(kind: type[Kind], given: Any, where: str) -> Kind:
    """Make a dataclass of a mapping.

    Args:
        kind: the dataclass, whose own checks name a setting first.
        given: what the file says.
        where: path of the mapping in the file, such as ``task``; empty for the whole file.

    Raises:
        ValueError: names the key by its path, and what to write instead.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}={given!r} must be a mapping")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    check_known(given, fields, where)
    for name, field in fields.items():
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in given and not has_default:
            raise ValueError(f"{join(where, name)} is missing")
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(join(where, str(error))) from None


def check_known(given: Collection[str], known: Collection[str], where: str) -> None:
    """Refuse keys that there are not.

    Raises:
        ValueError: names the first of them, and one that is near.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{join(where, str(name))} is no setting; {remedy}")


def join(where: str, name: str) -> str:
    """The path of a key in the file."""
    return f"{where}.{name}" if where else name
