"""Small YAML texts that people write: read safely, faults in one line with their place. Knows no recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pcam_automl.errors import RecipeError


def read_config_text(path: Path, limit_bytes: int = 1 << 20) -> str:
    """A small UTF-8 text file.

    Raises:
        RecipeError: missing, a folder, larger than ``limit_bytes``, unreadable or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit_bytes + 1)
        if len(raw) > limit_bytes:
            raise RecipeError(f"{path} is larger than {limit_bytes} bytes; that is not a recipe or a search space")
        return raw.decode("utf-8")
    except OSError as fault:
        raise RecipeError(f"{path} cannot be read ({fault.strerror})") from None
    except UnicodeDecodeError as fault:
        raise RecipeError(f"{path} is not UTF-8 text (byte {fault.start})") from None


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping by the safe loader, a repeated key being a fault; an empty text is an empty mapping.

    Raises:
        RecipeError: not YAML, a key repeated at any level, or not a mapping.
    """
    faults: list[str] = []
    value = read_yaml(text, where, faults)
    if faults:
        raise RecipeError("; ".join(faults))
    return value


def read_yaml(text: str, where: str, faults: list[str]) -> dict[str, Any]:
    """As :func:`parse_yaml`, but keys given twice are noted in ``faults`` (the last value holds), so that they can be
    reported with what else is wrong in the file.

    Raises:
        RecipeError: not YAML (``where``, line and column are named), or not a mapping.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            faults.extend(f"{where}: {key} given twice; keep one" for key in _repeated_keys(node))
        value = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise RecipeError(f"{where} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, UnicodeError, ValueError) as fault:
        raise RecipeError(f"{where} is not valid YAML: {_yaml_fault(fault, text)}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RecipeError(f"{where} must be a mapping of names to values, got {type(value).__name__}")
    return value


def _repeated_keys(root: yaml.Node) -> list[str]:
    """Dotted names of the keys given twice in one mapping, at every level."""
    found: list[str] = []
    waiting, seen = [("", root)], set()
    while waiting:
        path, node = waiting.pop()
        if id(node) in seen:  # an alias, which may even lead back to where it stands
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(f"{path}{number}.", item) for number, item in enumerate(node.value, start=1)]
        elif isinstance(node, yaml.MappingNode):
            names = [str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            found += [path + name for name in dict.fromkeys(names) if names.count(name) > 1]
            waiting += [(f"{path}{key.value}.", item) for key, item in node.value]
    return sorted(found)


def _yaml_fault(fault: Exception, text: str) -> str:
    """``line 3, column 5: expected ',' or ']', but got '<stream end>'``, on one line."""
    if isinstance(fault, yaml.MarkedYAMLError) and (mark := fault.problem_mark or fault.context_mark) is not None:
        said = ", ".join(part for part in (fault.context, fault.problem) if part)
        line, column = mark.line, mark.column
    elif isinstance(fault, yaml.reader.ReaderError):
        before = text[: fault.position]
        said = f"{fault.reason} (character {fault.character:#x})"
        line, column = before.count("\n"), len(before) - before.rfind("\n") - 1
    else:  # a value that YAML reads and Python cannot hold, such as the date 2020-13-45
        return " ".join(str(fault).split())[:300]
    return f"line {line + 1}, column {column + 1}: {' '.join(said.split())[:300]}"


def parse_scalar(text: str) -> Any:
    """One value as YAML reads it, and ``1e-3`` (a string to YAML 1.1) as the float it means."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
