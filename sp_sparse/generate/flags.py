"""Flags from dataclasses: one definition gives the flag, its help and the key of a configuration file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, NoReturn

from sp_sparse import SparseAttentionConfig


def option(default: Any, text: str, parse: Any = str, choices: tuple[str, ...] = ()) -> Any:
    """A field that is also a flag."""
    return field(default=default, metadata={"help": text, "parse": parse, "choices": choices})


def same_option(kind: type[Any], name: str, **changed: Any) -> Any:
    """A field as `kind` has it; `changed` may give another `default` or `help`."""
    found = next(f for f in fields(kind) if f.name == name)
    default = changed.pop("default", found.default)
    return field(default=default, metadata={**found.metadata, **changed})


def options_of(kind: type[Any]) -> list[Field[Any]]:
    """The fields of `kind` that are flags."""
    return [f for f in fields(kind) if "parse" in f.metadata]


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def make_parser(kind: type[Any], prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of the flags of `kind`, of `--sparse-attn-…` and of `--config`; what is not given stays absent."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML or JSON file with the same names as the flags, which override it")
    for entry in options_of(kind):
        _add_flag(parser, entry)
    SparseAttentionConfig.add_flags(parser)
    return parser


def parse(parser: argparse.ArgumentParser, kind: type[Any], argv: Sequence[str] | None) -> tuple[dict[str, Any], ...]:
    """What the command line gives, and what the `--config` file gives.

    Raises:
        ValueError: an unknown flag or key, or a value that cannot be read.
        OSError: a configuration file that cannot be read.
    """
    given = vars(parser.parse_args(argv))
    path = given.pop("config")
    if path is None:
        return given, {}
    values = vars(parser.parse_args(_config_flags(Path(path), kind)))
    values.pop("config")
    return given, values


class _Parser(argparse.ArgumentParser):
    """Takes `_` for `-` in flags, and raises instead of printing its usage once a rank."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args([_dashes(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")


def _dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def _add_flag(parser: argparse.ArgumentParser, entry: Field[Any]) -> None:
    text, default = entry.metadata["help"], entry.default
    kind: dict[str, Any] = {"type": entry.metadata["parse"], "choices": entry.metadata["choices"] or None}
    if entry.metadata["parse"] is bool:
        kind = {"action": "store_true"}
    elif default not in (None, ""):
        text = f"{text} (default: {default})"
    parser.add_argument(flag_of(entry.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)


def _config_flags(path: Path, kind: type[Any]) -> list[str]:
    """The file as flags, so that the same rules read both."""
    values = {str(key).replace("-", "_"): value for key, value in _read_mapping(path).items()}
    switches = {entry.name for entry in options_of(kind) if entry.metadata["parse"] is bool}
    known = {entry.name for entry in options_of(kind)}
    known |= {f"sparse_attn_{entry.name}" for entry in fields(SparseAttentionConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    flags = []
    for name, value in values.items():
        if name in switches and not isinstance(value, bool):
            raise ValueError(f"{path}: {name} is {value!r}; write true or false")
        if name in switches and value:
            flags.append(flag_of(name))
        elif name not in switches and value is not None:
            flags.append(f"{flag_of(name)}={json.dumps(value) if isinstance(value, list) else value}")
    return flags


def _read_mapping(path: Path) -> dict[Any, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        values = json.loads(text)
    else:
        import yaml

        try:
            values = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; write one `flag: value` a line")
    return values
