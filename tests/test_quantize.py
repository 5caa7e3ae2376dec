"""`--quantization fp8`: which layers it computes in float8, that meshes give the video of one rank, and what it refuses.

Its operators run on CPUs too, slowly: the tests take the check of the hardware away.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("torchao")


from sp_sparse import SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.fidelity.arguments import FidelityArguments
from sp_sparse.fidelity.job import _shared_by_all
from sp_sparse.generate import quantize
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.float8 import Float8Linear
from sp_sparse.generate.models import find_model, load_pipeline, transformers_of
from sp_sparse.generate.placement import check_placement
from sp_sparse.generate.quantize import check_hardware, quantize_block
from sp_sparse.generate.ranks import Ranks
from sp_sparse.integrations.diffusers import enable_sparse_attention
from sp_sparse.serve.arguments import parse_serve_arguments
from tests.offload_device import pretended_device
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.tiny_wan import inputs, run

CPU = torch.device("cpu")
FLAGS = ["--dtype", "bfloat16", "--quantization", "fp8"]
CONFIG = SparseAttentionConfig(backend="reference", topk=0.4, schedule="constant", block_size=(16, 16))

_cache: dict[str, Tensor] = {}


@pytest.fixture
def float8_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "check_hardware", lambda *_: None)


def _dequantized(layer: Any) -> Tensor:
    weight: Tensor = layer.values.float() * layer.scale
    return weight


def _loaded(*flags: str) -> Any:
    arguments = parse_arguments(["--model", "tiny", *flags])
    pipe = load_pipeline(arguments, find_model(arguments, CPU), CPU)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.usefixtures("float8_on_cpu")
def test_the_linear_layers_of_the_blocks_are_quantized_and_nothing_else() -> None:
    whole, quantized = _loaded("--dtype", "bfloat16"), _loaded(*FLAGS)
    for before, after in zip(transformers_of(whole), transformers_of(quantized), strict=True):
        linear = {f"{name}.weight" for name, part in before.blocks.named_modules() if isinstance(part, nn.Linear)}
        changed = {f"blocks.{name}" for name in linear}
        found = dict(after.named_parameters())
        assert len(changed) == 2 * 10
        assert len(found) == len(list(before.parameters())) + len(changed)  # values and scales
        for name, weight in before.named_parameters():
            if name in changed:
                layer = after.get_submodule(name.removesuffix(".weight"))
                assert layer.values.dtype == torch.float8_e4m3fn
                assert layer.scale.shape == (weight.shape[0], 1)  # a scale a row
                assert layer.weight.dtype == torch.bfloat16
                assert relative_error(_dequantized(layer), weight.float()) < 0.04
            else:
                assert torch.equal(found[name], weight), name
                assert found[name].dtype == weight.dtype, name


def _video(pipe: Any, mesh: SequenceParallelMesh | None = None) -> Tensor:
    enable_sparse_attention(pipe, CONFIG, mesh)
    return run(pipe).float()


def _check_video(rank: int, degrees: tuple[int, int, int], flags: tuple[str, ...]) -> None:
    pipe = _loaded(*FLAGS, *flags)
    if flags:
        values = pipe.transformer.blocks[0].ffn.net[2].values.to_local()
        assert (values.dtype, values.shape) == (torch.float8_e4m3fn, (64, 64))  # half of the 128 rows
    error = relative_error(_video(pipe, SequenceParallelMesh(*degrees)), _cache["fp8"])
    assert error < 2e-2  # bfloat16's rounding


@pytest.mark.usefixtures("float8_on_cpu")
@pytest.mark.parametrize(
    ("degrees", "flags"),
    [
        ((2, 1, 1), ()),
        ((1, 2, 1), ()),
        ((1, 1, 2), ()),
        ((1, 2, 1), ("--fsdp", "--ring-degree", "2", "--sparse-attn-backend", "auto")),
    ],
)
def test_every_mesh_gives_the_video_of_one_rank(degrees: tuple[int, int, int], flags: tuple[str, ...]) -> None:
    if not _cache:
        _cache.update(fp8=_video(_loaded(*FLAGS)), whole=_video(_loaded("--dtype", "bfloat16")))
    assert 5e-3 < relative_error(_cache["fp8"], _cache["whole"]) < 0.2
    run_ranks(2, _check_video, degrees, flags)


@pytest.mark.usefixtures("float8_on_cpu")
def test_lora_weights_are_fused_before(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    lora = tmp_path / "lora.safetensors"
    save_file(
        {
            f"transformer.{layer}.lora_{side}.weight": torch.randn(*shape, generator=generator)
            for layer in ("blocks.0.attn1.to_q", "condition_embedder.text_embedder.linear_2", "proj_out")
            for side, shape in (("A", (4, 128)), ("B", (64 if layer == "proj_out" else 128, 4)))
        },
        lora,
    )
    flags = ["--lora", str(lora), "--lora-scale", "0.5"]
    changed, plain = _loaded(*flags, *FLAGS).transformer, _loaded("--dtype", "bfloat16").transformer
    adapted = _loaded(*flags, "--dtype", "bfloat16").transformer
    for name in ("blocks.0.attn1.to_q", "condition_embedder.text_embedder.linear_2", "proj_out"):
        layer = adapted.get_submodule(name)
        ((adapter, down),) = layer.lora_A.items()
        expected = plain.get_submodule(name).weight + 0.5 * layer.lora_B[adapter].weight @ down.weight
        layer = changed.get_submodule(name)
        found = _dequantized(layer) if isinstance(layer, Float8Linear) else layer.weight.float()
        assert relative_error(found, expected.float()) < 0.04, name
        assert relative_error(found, plain.get_submodule(name).weight.float()) > 0.5, name
    assert isinstance(changed.blocks[0].attn1.to_q, Float8Linear)
    assert not [name for name, _ in changed.named_parameters() if "lora" in name]
    assert getattr(changed, "peft_config", None) is None


@pytest.mark.usefixtures("float8_on_cpu")
def test_compiled_blocks_give_the_same() -> None:
    model = _loaded(*FLAGS).transformer
    given = {
        name: x.bfloat16() if name != "timestep" else x for name, x in inputs(model).items() if name != "return_dict"
    }
    with torch.no_grad():
        once = model(**given).sample
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        assert torch.equal(model(**given).sample, once)


@pytest.mark.parametrize("kind", ["idle", "layers"])
def test_what_waits_gives_the_same(kind: str, float8_on_cpu: None, tmp_path: Path) -> None:
    size = ["--height", "64", "--width", "64", "--num-frames", "5", "--num-inference-steps", "4"]
    sparse = ["--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.4"]

    def latents(name: str, *flags: str) -> Tensor:
        places = ["--output", str(tmp_path / f"{name}.mp4"), "--output-latents", str(tmp_path / f"{name}.pt")]
        assert main(["--model", "tiny", *FLAGS, *size, *sparse, *places, *flags]) == 0
        found: Tensor = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        return found

    with pretended_device() as came:
        waited = latents("waited", "--offload", kind)
    assert came, "weights have come from where they waited"
    torch.testing.assert_close(waited, latents("plain"), rtol=0, atol=0)


def test_layers_of_odd_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16, and 0 is 16 x 24; leave --quantization out"):
        quantize_block(nn.Sequential(nn.Linear(16, 24)))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "needs a GPU of compute capability 8.9 or higher, and this job runs on a CPU; leave --quantization out"),
        (["--model", "a14b-random", "--lora", "a/b"], "a CPU; leave --quantization out"),
    ],
)
def test_refused_on_a_cpu(flags: list[str], text: str) -> None:
    arguments = parse_arguments([*FLAGS, *flags])
    with pytest.raises(ValueError, match=text):
        check_placement(arguments, CPU, torch.float32)


def test_refused_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "tiny", *FLAGS]) == 2
    assert "this job runs on a CPU; leave --quantization out" in capsys.readouterr().err
    assert main(["--quantization", "int8"]) == 2
    assert "invalid choice: 'int8' (choose from" in capsys.readouterr().err


def test_refused_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(ValueError, match=r"8\.9 or higher, and A100 has 8\.0; leave it"):
        check_hardware(torch.device("cuda"), "leave it")


@pytest.mark.usefixtures("float8_on_cpu")
def test_refused_in_another_dtype() -> None:
    with pytest.raises(ValueError, match="the transformers are in float32; use --dtype bfloat16, or leave"):
        check_placement(parse_arguments(["--quantization", "fp8"]), CPU, torch.float32)


def test_refused_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sp_sparse.generate.float8")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"needs torchao, .* halted.*; pip install \"sp-sparse\[fp8\]\", or leave"):
        check_placement(parse_arguments(FLAGS), CPU, torch.float32)


def test_the_commands_share_the_flags() -> None:
    assert parse_serve_arguments(FLAGS).base().quantization == "fp8"
    base = FidelityArguments(prompts="p.txt", output="o", model="tiny", quantization="fp8").base()
    assert base.quantization == "fp8"
    # Videos of one folder are compared with each other.
    assert _shared_by_all(base, find_model(base, CPU), Ranks(0, 1, CPU))["quantization"] == "fp8"


@pytest.mark.gpu
def test_a_block_in_float8_on_a_gpu() -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 matrix products")
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).to(device, torch.bfloat16)
    x = torch.randn(2, 300, 512, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = block(x)
        quantize_block(block)
        compiled = torch.compile(block)
        for found in (block(x), compiled(x)):
            assert 1e-3 < relative_error(found.float().cpu(), expected.float().cpu()) < 0.06
        # A token's scale is its own: a rank that holds some of them computes what one with all would.
        assert relative_error(block(x[:, 100:200]).float().cpu(), block(x)[:, 100:200].float().cpu()) < 1e-2
