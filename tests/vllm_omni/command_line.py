"""Run by test_registration: `vllm serve --omni` up to its stage's configuration, from a model folder without weights."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.benchmarks.omni_stand_ins import stand_in  # noqa: E402

# Every setting, as it is written in a flag and as it must arrive; in two parts, for not all go together.
OWN = {"sparsity": 0.7, "start_step": 10, "end_step": 2, "precision": "bf16", "skip_layers": "0-1"}
SETTINGS: tuple[dict[str, tuple[Any, Any]], ...] = (
    {
        "backend": ("triton", "triton"),
        "schedule": ("table", "table"),
        "schedule_table": ([[1.0, 0.5, 0.3]], ((1.0, 0.5, 0.3),)),
        "selector": ("subblock", "subblock"),
        "remainder": ("linear", "linear"),
        "keep_diagonal": (False, False),
        "keep_first_frame": (True, True),
        "block_size": ("128x64", (128, 64)),
        "token_order": ("hilbert", "hilbert"),
        "kv_exchange": ("all_gather", "all_gather"),
        "num_steps": (30, 30),
    },
    {"preset": ("fast", "linear"), "schedule": ("aggressive", "aggressive"), "window": (2, 2), "num_steps": (30, 30)},
)
FLAG = "--diffusion-attention-config"


def main() -> None:
    stand_in()
    from sp_sparse.integrations.vllm_omni.settings import known_options
    from tests.vllm_omni import cpu

    cpu.install()
    from vllm_omni.diffusion import data
    from vllm_omni.entrypoints.cli import serve
    from vllm_omni.utils.tracking_parser import TrackingArgumentParser

    assert "SP_SPARSE" not in data.BLOCK_SPARSE_BACKENDS
    serve._ensure_vllm_platform()
    parser = TrackingArgumentParser()
    commands = parser.add_subparsers(required=False, dest="subparser")
    for command in serve.cmd_init():
        command.subparser_init(commands)
    assert "SP_SPARSE" in data.BLOCK_SPARSE_BACKENDS, "registered before a configuration is read"
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder))
        for settings in SETTINGS:
            # The first has densities of its own, beside which a sparsity is refused.
            own = {name: value for name, value in OWN.items() if name != "sparsity" or "schedule_table" not in settings}
            given = {name: value for name, (value, _) in settings.items()}
            for here, there in (({**own, **given}, {}), (own, given)):
                additional = ["--additional-config", json.dumps({"sp_sparse": there})] if there else []
                for flags in (_as_json(here), _dotted(here)):
                    _check(parser, folder, [*flags, *additional], settings, own)
        _check_refused(parser, folder)
    assert set().union(*SETTINGS) == known_options(), "every setting has a case"
    print("command line: ok")


def _write_model(folder: Path) -> None:
    parts = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    index = {"_class_name": "WanPipeline", "_diffusers_version": "0.35.0", "boundary_ratio": 0.875, **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in parts:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(
            json.dumps({"_class_name": "WanTransformer3DModel", "num_layers": 2})
        )


def _as_json(block_sparse: dict[str, Any]) -> list[str]:
    return [FLAG, json.dumps({"per_role": {"self": {"backend": "SP_SPARSE", "block_sparse": block_sparse}}})]


def _dotted(block_sparse: dict[str, Any]) -> list[str]:
    flags = [f"{FLAG}.per_role.self.backend", "SP_SPARSE"]
    for name, value in block_sparse.items():
        text = value if isinstance(value, str) else json.dumps(value)
        flags += [f"{FLAG}.per_role.self.block_sparse.{name}", text]
    return flags


def _diffusion_config(parser: Any, model: str, flags: list[str]) -> Any:
    """What the stage is configured with."""
    from vllm_omni.config.resolver import resolve_omni_config

    degrees = ["--ulysses-degree", "2", "--ring-degree", "2"]
    args = parser.parse_args(["serve", model, "--omni", *degrees, *flags])
    names = ("diffusion_attention_config", "additional_config", "ulysses_degree", "ring_degree")
    resolved = resolve_omni_config(
        model,
        trust_remote_code=None,
        deploy_config_path=None,
        cli_overrides={name: getattr(args, name) for name in names},
        stage_overrides=None,
        strategy_config_path=None,
    )
    (stage,) = resolved.stage_configs
    return stage.diffusion_config


def _check(parser: Any, model: str, flags: list[str], wanted: dict[str, tuple[Any, Any]], own: dict[str, Any]) -> None:
    from sp_sparse.integrations.vllm_omni.settings import Settings

    diffusion = _diffusion_config(parser, model, flags)
    spec, _ = diffusion.diffusion_attention_config.resolve_with_source("self")
    settings = Settings.read(spec.backend_kwargs(), diffusion.additional_config)
    assert (settings.start_step, settings.end_step, settings.skip_layers) == (10, 2, frozenset({0, 1}))
    assert settings.config.topk == (0.3 if "sparsity" in own else 0.2)
    for name, (_, value) in wanted.items():
        place, name = (settings, name) if name == "num_steps" else (settings.config, name)
        found = getattr(place, "remainder" if name == "preset" else name)
        assert found == value, (flags, name, found)
    assert diffusion.diffusion_attention_config.resolve_with_source("cross") == (None, None)


def _check_refused(parser: Any, model: str) -> None:
    for name, message in (
        ("remaindr", "unknown options remaindr in block_sparse"),
        ("topk", "use block_sparse.sparsity"),
    ):
        for flags in (_as_json({name: 0.5}), _dotted({name: 0.5})):
            said = "nothing"
            try:
                _diffusion_config(parser, model, flags)
            except ValueError as error:
                said = str(error)
            assert message in said, (flags, said)


if __name__ == "__main__":
    main()
