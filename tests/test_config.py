"""The configuration and its flags: one definition, so every field is a flag and every flag a field."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import pytest

from sp_sparse import SparseAttentionConfig
from sp_sparse.config import PRESETS


def _parse(*arguments: str) -> SparseAttentionConfig:
    parser = argparse.ArgumentParser()
    SparseAttentionConfig.add_flags(parser)
    return SparseAttentionConfig.from_flags(parser.parse_args(arguments))


# (field, what the flag takes, what the field becomes); values that differ from the defaults.
FLAGS: list[tuple[str, str, Any]] = [
    ("kv_exchange", "all_gather", "all_gather"),
    ("backend", "reference", "reference"),
    ("backend", "package.module:Class", "package.module:Class"),
    ("topk", "0.25", 0.25),
    ("topk_2", "0.125", 0.125),
    ("schedule", "aggressive", "aggressive"),
    ("schedule_2", "constant", "constant"),
    ("dense_steps", "3", 3),
    ("dense_layers", "2", 2),
    ("selector", "window", "window"),
    ("remainder", "linear", "linear"),
    ("keep_diagonal", "false", False),
    ("keep_first_frame", "true", True),
    ("window", "2", 2),
    ("block_size", "64", (64, 64)),
    ("block_size", "128x64", (128, 64)),
    ("token_order", "hilbert", "hilbert"),
]


@pytest.mark.parametrize(("name", "text", "value"), FLAGS)
def test_flags(name: str, text: str, value: Any) -> None:
    flag = f"--sparse-attn-{name.replace('_', '-')}"
    expected = SparseAttentionConfig(**{name: value})
    assert _parse(flag, text) == _parse(f"{flag}={text}") == expected != SparseAttentionConfig()
    assert SparseAttentionConfig.from_mapping({name: value}) == expected


def test_table_flags() -> None:
    """Tables come with the schedule that reads them."""
    expected = SparseAttentionConfig(schedule="table", schedule_table=((1.0, 0.5, 0.3),))
    assert _parse("--sparse-attn-schedule", "table", "--sparse-attn-schedule-table", "1,0.5,0.3") == expected
    assert _parse("--sparse-attn-schedule=table", "--sparse-attn-schedule-table=[1, 0.5, 0.3]") == expected
    rows = SparseAttentionConfig(schedule_2="table", schedule_table_2=((1.0, 0.5), (0.25,)))
    assert _parse("--sparse-attn-schedule-2=table", "--sparse-attn-schedule-table-2=[[1, 0.5], [0.25]]") == rows


def test_every_field_is_tested_as_a_flag() -> None:
    tested = {name for name, _, _ in FLAGS} | {"schedule_table", "schedule_table_2"}
    assert tested == {option.name for option in fields(SparseAttentionConfig)}


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on", "false", "FALSE", "0", "no", "off"])
@pytest.mark.parametrize("name", ["keep_diagonal", "keep_first_frame"])
def test_bool_flags(name: str, text: str) -> None:
    wanted = text.lower() in ("true", "1", "yes", "on")
    assert getattr(_parse(f"--sparse-attn-{name.replace('_', '-')}", text), name) is wanted


def test_no_flags_is_the_default_and_leaves_the_model_alone() -> None:
    assert _parse() == SparseAttentionConfig() == SparseAttentionConfig.from_mapping({})
    assert SparseAttentionConfig().backend == "none"


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    flag = "--sparse-attn-preset"
    assert _parse(flag, name) == SparseAttentionConfig(**PRESETS[name]) != SparseAttentionConfig()
    assert SparseAttentionConfig.from_mapping({"preset": name}) == _parse(flag, name)
    # A value that is the default is given too.
    default = SparseAttentionConfig()
    over = _parse(
        flag, name, "--sparse-attn-topk", "0.3", "--sparse-attn-remainder=drop", "--sparse-attn-backend=triton"
    )
    assert (over.topk, over.remainder, over.backend) == (default.topk, default.remainder, "triton")
    assert over.schedule == PRESETS[name]["schedule"]


def test_densities_of_presets_fall() -> None:
    assert [PRESETS[name]["topk"] for name in ("quality", "balanced", "fast")] == [0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            ("--sparse-attn-backend", "none"),
            "preset 'fast' makes attention sparse, and backend 'none' leaves it",
        ),
        (
            ("--sparse-attn-schedule=table", "--sparse-attn-schedule-table=1,0.2"),
            r"topk=0.1 changes nothing beside a schedule table.*; leave out preset 'fast', which brings topk, and give the "
            r"rest of it \(backend auto, remainder linear\), or choose another schedule$",
        ),
        (
            ("--sparse-attn-selector=window", "--sparse-attn-topk=0.4"),
            "topk=0.4 changes nothing with selector 'window'.*; leave out topk and preset 'fast', which brings topk, and",
        ),
        (
            ("--sparse-attn-schedule-2=table", "--sparse-attn-schedule-table-2=0.5", "--sparse-attn-topk-2=0.2"),
            "topk_2=0.2 changes nothing beside a schedule table.*; leave topk_2 out, or choose another schedule$",
        ),
    ],
)
def test_contradictions_of_presets(more: tuple[str, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _parse("--sparse-attn-preset", "fast", *more)


def test_a_truth_value_is_no_density() -> None:
    for values in ({"topk": True}, {"schedule": "table", "schedule_table": [1, True]}):
        with pytest.raises(ValueError, match=r"True .*is not a .*number; give"):
            SparseAttentionConfig.from_mapping(values)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="preset='slow' is not known; use one of quality, balanced, fast"):
        SparseAttentionConfig.from_mapping({"preset": "slow"})


def test_absent_flags_stay_absent() -> None:
    """So that a file's values can be overridden by just the flags that were given."""
    parser = argparse.ArgumentParser()
    SparseAttentionConfig.add_flags(parser)
    assert vars(parser.parse_args(["--sparse-attn-topk", "0.5"])) == {"sparse_attn_topk": 0.5}


def test_help_names_every_flag_and_default() -> None:
    parser = argparse.ArgumentParser()
    SparseAttentionConfig.add_flags(parser)
    text = parser.format_help()
    for option in fields(SparseAttentionConfig):
        assert f"--sparse-attn-{option.name.replace('_', '-')} " in text
    assert "(default: 0.3)" in " ".join(text.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--sparse-attn-topk", "many"),
        ("--sparse-attn-schedule", "sometimes"),
        ("--sparse-attn-token-order", "spiral"),
        ("--sparse-attn-keep-diagonal", "maybe"),
        ("--sparse-attn-keep-diagonal",),
        ("--sparse-attn-block-size", "128x"),
        ("--sparse-attn-block-size", "axb"),
        ("--sparse-attn-schedule-table", "1,,2"),
        ("--sparse-attn-unknown", "1"),
    ],
)
def test_bad_flags_exit_with_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[-1] == "128x":  # the key size is optional, so this is a square block
        assert _parse(*arguments).block_size == (128, 128)
        return
    with pytest.raises(SystemExit):
        _parse(*arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"topk": 0.0}, r"topk 0.0 is outside \(0, 1\]"),
        ({"topk": 1.5}, "topk 1.5 is outside"),
        ({"topk_2": 2.0}, "topk_2 2.0 is outside"),
        ({"schedule": "sometimes"}, "schedule='sometimes' is not known; use one of constant, conservative"),
        ({"schedule_2": "sometimes"}, "schedule_2='sometimes' is not known"),
        ({"token_order": "spiral"}, "token_order='spiral' is not known; use one of raster, tile, hilbert"),
        ({"schedule": "table"}, "'table' with a table of 0 rows"),
        ({"schedule_table": ((0.5,),)}, "'conservative' with a table of 1 rows"),
        ({"schedule_table_2": ((0.5,),)}, "'conservative' with a table of 1 rows"),
        ({"schedule_2": "table"}, "'table' with a table of 0 rows"),
        ({"schedule": "table", "schedule_table": ((0.5, 0.0),)}, "0.0 is outside"),
        ({"dense_steps": -1}, "dense_steps -1 is below 0"),
        ({"dense_layers": -1}, "dense_layers -1 is below 0"),
        ({"block_size": (4, 64)}, r"block_size \(4, 64\): each of \(query, key\) must be in \[8, 256\]"),
        ({"block_size": (64, 257)}, r"must be in \[8, 256\]"),
        ({"block_size": (64,)}, "block_size"),
        ({"block_size": (64, 64, 64)}, "block_size"),
        ({"window": -1}, "window -1 is below 0; give a whole number from 0"),
        ({"window": 1, "keep_diagonal": False}, "window=1 includes the diagonal; leave keep_diagonal on"),
    ],
)
def test_errors(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SparseAttentionConfig(**values)


def test_unknown_option() -> None:
    with pytest.raises(
        ValueError, match=r"unknown sparse attention options sparsity, top_k; known are backend, .*topk_2"
    ):
        SparseAttentionConfig.from_mapping({"top_k": 0.3, "topk": 0.3, "sparsity": 0.7})


def test_lists_become_tuples() -> None:
    """As JSON and YAML give them; the config stays hashable and equal on every rank."""
    config = SparseAttentionConfig.from_mapping(
        {"block_size": [64, 128], "schedule": "table", "schedule_table": [[1, 0.5], [0.25]]}
    )
    assert config.block_size == (64, 128)
    assert config.schedule_table == ((1.0, 0.5), (0.25,))
    assert hash(config) == hash(SparseAttentionConfig.from_mapping({**vars(config)}))
    flat = SparseAttentionConfig(schedule="table", schedule_table=[1, 0.5])  # type: ignore[arg-type]
    assert flat.schedule_table == ((1.0, 0.5),)


def test_experts_share_what_the_second_does_not_override() -> None:
    config = SparseAttentionConfig(topk=0.4, schedule="aggressive", dense_steps=1, dense_layers=2)
    assert config.schedule_for(0) == config.schedule_for(1)
    table = SparseAttentionConfig(schedule="table", schedule_table=((0.5, 0.25),))
    assert table.schedule_for(1).table == table.schedule_for(0).table == ((0.5, 0.25),)


def test_expert_overrides() -> None:
    config = SparseAttentionConfig(topk=0.4, topk_2=0.2, schedule="aggressive", schedule_2="constant", dense_layers=1)
    first, second = config.schedule_for(0), config.schedule_for(1)
    assert (first.topk, first.kind, first.dense_layers) == (0.4, "aggressive", 1)
    assert (second.topk, second.kind, second.dense_layers) == (0.2, "constant", 1)
    assert second.density(5, None, None) == 0.2
    assert second.density(0, None, None) == 1.0
    tables = SparseAttentionConfig(schedule="table", schedule_table=((0.5,),), schedule_table_2=((0.25,),))
    assert [tables.schedule_for(e).density(3, None, None) for e in (0, 1)] == [0.5, 0.25]
    mixed = SparseAttentionConfig(schedule="table", schedule_table=((0.5,),), schedule_2="constant")
    assert mixed.schedule_for(1).density(3, None, None) == 0.3
