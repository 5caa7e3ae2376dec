"""Flags from dataclasses: one definition gives the field, its flag, its help and its key in a configuration file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

# Dataclasses by what stands before the names of their fields: {"": …, "sparse_attn_": …}.
Kinds = Mapping[str, type[Any]]


# Of numbers that have no bound of their own: more would overflow where it is multiplied, timed or stored.
_MOST = {int: 2**63 - 1, float: 1e9}


def option(
    default: Any,
    text: str,
    parse: Any = str,
    choices: tuple[str, ...] = (),
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    many: bool = False,
) -> Any:
    """A field that is also a flag.

    Args:
        parse: reads a text; `bool` makes a switch.
        at_least, above, at_most: bounds of a number, which `check_numbers` holds it to.
        many: the flag may be given several times, and `parse` gives a sequence, to which the next is added.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    return field(default=default, metadata={"help": text, "parse": parse, "choices": choices, "many": many, **bounds})


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


def check_numbers(settings: Any, named: Callable[[str], str] = flag_of) -> None:
    """Hold the options of a dataclass that are numbers to their bounds; None is left to the model.

    Raises:
        ValueError: a value that is no finite number, or one out of bounds, with what is allowed.
    """
    for entry in options_of(type(settings)):
        value, kind = getattr(settings, entry.name), entry.metadata["parse"]
        if kind not in _MOST or (value is None and entry.default is None):
            continue
        low, above = entry.metadata["at_least"], entry.metadata["above"]
        most = _MOST[kind] if entry.metadata["at_most"] is None else entry.metadata["at_most"]
        wrong = _wrong(value, kind, low, above, most)
        if wrong:
            what = "a whole number" if kind is int else "a number"
            span = (
                f"from {_told(-most if low is None else low)} to" if above is None else f"above {_told(above)}, at most"
            )
            raise ValueError(f"{named(entry.name)} {value!r} is {wrong}; give {what} {span} {_told(most)}")


def _wrong(value: Any, kind: type[Any], low: float | None, above: float | None, most: float) -> str | None:
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        return "not a whole number" if kind is int else "not a finite number"
    if above is not None and not above < value <= most:
        return f"outside ({_told(above)}, {_told(most)}]"
    if low is not None and value < low:
        return f"below {_told(low)}"
    if abs(value) > most:
        return f"above {_told(most)}" if value > 0 else f"below {_told(-most)}"
    return None


def _told(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def add_flags(parser: argparse._ActionsContainer, kind: type[Any], prefix: str = "") -> None:
    """Add the flags of `kind`, `_` for `-` accepted; one that is not given stays absent from the namespace."""
    for entry in options_of(kind):
        name, text = prefix + entry.name, entry.metadata["help"]
        how: dict[str, Any] = {"type": _reads(entry.metadata["parse"]), "choices": entry.metadata["choices"] or None}
        if entry.metadata["parse"] is bool:
            how = {"action": "store_true"}
        elif entry.metadata["many"]:
            how["action"] = "extend"
        elif entry.default not in (None, "", ()):
            text = f"{text} (default: {entry.default})"
        how |= {"dest": name, "default": argparse.SUPPRESS}
        parser.add_argument(flag_of(name), help=text.replace("%", "%%"), **how)
        if "_" in name:
            parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **how)


def _reads(parse: Any) -> Any:
    """`parse`, whose errors argparse would otherwise tell by its name."""
    if isinstance(parse, type):
        return parse

    def read(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, TypeError) as error:
            raise argparse.ArgumentTypeError(f"{text!r} cannot be read ({error})") from error

    return read


def parse_flags(
    command: str, description: str | None, kinds: Kinds, argv: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the command line gives, and what the `--config` file that it names gives.

    Raises:
        ValueError: an unknown flag or key, or a file or value that cannot be read.
    """
    parser = _Parser(prog=command, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML or JSON file with the same names as the flags, which override it")
    for prefix, kind in kinds.items():
        add_flags(parser.add_argument_group(f"{flag_of(prefix)}…") if prefix else parser, kind, prefix)
    given = vars(parser.parse_args(argv))
    path = given.pop("config")
    if path is None:
        return given, {}
    flags = _config_flags(Path(path), kinds)
    try:
        values = vars(parser.parse_args(flags))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    values.pop("config")
    return given, values


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage once a rank."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")


def _config_flags(path: Path, kinds: Kinds) -> list[str]:
    """The file as flags, so that the same rules read both."""
    values = {str(key).replace("-", "_"): value for key, value in _read_mapping(path).items()}
    known = {prefix + entry.name: entry for prefix, kind in kinds.items() for entry in options_of(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{path} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    flags = []
    for name, value in values.items():
        parse = known[name].metadata["parse"]
        is_switch = parse is bool
        if is_switch and not isinstance(value, bool):
            raise ValueError(f"{path}: {name} is {value!r}; write true or false")
        if value is not None and parse is str and not isinstance(value, str):
            # YAML reads yes and 0123 as true and 83.
            raise ValueError(f"{path}: {name} is {value!r}, not a text; write it in quotes")
        if isinstance(value, dict):
            raise ValueError(f"{path}: {name} is {value!r}; write one value, or a list of them")
        if is_switch and value:
            flags.append(flag_of(name))
        elif not is_switch and value is not None:
            flags.append(f"{flag_of(name)}={json.dumps(value, default=str) if isinstance(value, list) else value}")
    return flags


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"--config {path} cannot be read ({told}); give a YAML or JSON file") from error
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f'{path} is not JSON ({error}); write {{"flag": value}}') from error
    else:
        try:
            import yaml
        except ImportError as error:
            raise ValueError(
                f"{path} is read with pyyaml, which is not installed; pip install pyyaml, or write JSON"
            ) from error
        try:
            values = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML ({error}); write one `flag: value` a line") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; write one `flag: value` a line")
    return values
