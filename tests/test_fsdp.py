"""`--fsdp`: weights dealt out over all ranks give the videos of one rank that has them whole, and failures still end all."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusers.hooks import TaylorSeerCacheConfig
from torch.distributed.fsdp import FSDPModule

from sp_sparse import SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.fidelity.arguments import FidelityArguments
from sp_sparse.generate import models
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.attach import prepare_transformers
from sp_sparse.generate.fsdp import world_mesh
from sp_sparse.generate.models import transformers_of
from sp_sparse.generate.placement import Placement, check_placement
from sp_sparse.generate.real_sizes import T2V_A14B
from sp_sparse.integrations.diffusers import enable_sparse_attention
from sp_sparse.serve.arguments import parse_serve_arguments
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.tiny_wan import run, tiny_pipeline

ROOT = Path(__file__).resolve().parent.parent
CONFIG = SparseAttentionConfig(
    backend="reference", topk=0.4, schedule="constant", block_size=(16, 16), token_order="hilbert"
)
SOON_S = 15.0

# Ulysses, ring and CFG degrees.
ULYSSES, RING, HYBRID, HALVES, HALVES_OF_TWO = (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2)

_cache: dict[str, Tensor] = {}


def _single(family: str) -> Tensor:
    """One rank with whole weights: computed once in the parent, inherited by forked ranks."""
    if family not in _cache:
        pipe = tiny_pipeline(family)
        enable_sparse_attention(pipe, CONFIG)
        _cache[family] = run(pipe)
    return _cache[family]


def _dealt_out(family: str, degrees: tuple[int, int, int]) -> Any:
    pipe = tiny_pipeline(family)
    placement = Placement(torch.device("cpu"), torch.float32, False, world_mesh(torch.device("cpu")))
    for transformer in transformers_of(pipe):
        placement.place(transformer)
    placement.place_text_encoder(pipe.text_encoder)
    enable_sparse_attention(pipe, CONFIG, SequenceParallelMesh(*degrees))
    return pipe


def _check_video(rank: int, family: str, degrees: tuple[int, int, int]) -> None:
    pipe = _dealt_out(family, degrees)
    blocks = [*pipe.text_encoder.encoder.block, *(b for model in transformers_of(pipe) for b in model.blocks)]
    assert all(isinstance(block, FSDPModule) for block in blocks)
    whole, held = (
        sum(count(weight) for block in blocks for weight in block.parameters())
        for count in (Tensor.numel, lambda weight: weight.to_local().numel())
    )
    world = degrees[0] * degrees[1] * degrees[2]
    assert held < 1.03 * whole / world
    assert relative_error(run(pipe), _single(family)) < 2e-5
    for model in transformers_of(pipe):
        assert not model._get_fsdp_state()._comm_ctx.post_forward_order, "grows with every forward"


@pytest.mark.parametrize(
    ("family", "degrees"),
    [("t2v", ULYSSES), ("t2v", RING), ("i2v", HYBRID), ("ti2v", HALVES), ("t2v", HALVES_OF_TWO)],
)
def test_dealt_out_weights_give_the_video_of_one_rank(family: str, degrees: tuple[int, int, int]) -> None:
    _single(family)
    run_ranks(degrees[0] * degrees[1] * degrees[2], _check_video, family, degrees)


def _fail_in(module: Any, call: int, before: bool) -> None:
    """`module` raises before or after its `call`-th call from now, once."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise torch.OutOfMemoryError("no memory")

    (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)


def _check_heard(rank: int, degrees: tuple[int, int, int], failing: int, place: str, call: int, before: bool) -> None:
    pipe = _dealt_out("t2v", degrees)
    if rank == failing:
        _fail_in(pipe.transformer.get_submodule(place), call, before)
    start = time.monotonic()
    with pytest.raises(torch.OutOfMemoryError, match="no memory") as raised:
        run(pipe)
    assert time.monotonic() - start < SOON_S
    told = f"another rank failed, and with it this step here (rank {failing}: OutOfMemoryError: no memory)"
    assert str(raised.value).startswith("no memory" if rank == failing else told)
    assert relative_error(run(pipe), _single("t2v")) < 2e-5


@pytest.mark.parametrize(
    ("degrees", "failing", "place", "call", "before"),
    [
        (ULYSSES, 1, "blocks.0", 1, True),
        (ULYSSES, 0, "blocks.0.ffn", 2, False),
        (ULYSSES, 1, "blocks.1.ffn", 1, False),
        (RING, 0, "condition_embedder", 1, False),
        (HALVES, 1, "blocks.0.ffn", 2, False),
        # Within attention, which is no collective where a half is one rank.
        (HALVES, 0, "blocks.0.attn1.to_out.0", 1, True),
        # The whole transformer: before its own forward, of either half.
        (HALVES, 0, "", 1, True),
        (HALVES, 1, "", 2, True),
        (HALVES_OF_TWO, 2, "blocks.1.ffn", 1, False),
    ],
)
def test_a_rank_that_fails_between_all_gathers_is_heard_by_all(
    degrees: tuple[int, int, int], failing: int, place: str, call: int, before: bool
) -> None:
    _single("t2v")
    run_ranks(degrees[0] * degrees[1] * degrees[2], _check_heard, degrees, failing, place, call, before)


def _check_cached(rank: int) -> None:
    pipe = _dealt_out("t2v", HALVES)
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True))
    with pytest.raises(ValueError, match=r"TaylorSeerCacheConfig skips blocks.*; call disable_cache\(\)"):
        run(pipe)
    pipe.transformer.disable_cache()
    assert relative_error(run(pipe), _single("t2v")) < 2e-5


def test_a_step_cache_is_refused() -> None:
    _single("t2v")
    run_ranks(2, _check_cached)


def _check_order(rank: int) -> None:
    del FSDPModule.reset_iter_state
    pipe = _dealt_out("t2v", ULYSSES)
    run(pipe)
    blocks = pipe.transformer.blocks
    assert not pipe.transformer._get_fsdp_state()._comm_ctx.post_forward_order
    assert not any(block._get_fsdp_state()._fsdp_param_group._post_forward_indices for block in blocks)
    assert relative_error(run(pipe), _single("t2v")) < 2e-5


@pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="what an older torch has is tested by the others"
)
def test_nothing_grows_with_an_older_torch() -> None:
    _single("t2v")
    run_ranks(2, _check_order)


SMALL = ["--height", "64", "--width", "64", "--num-frames", "5", "--num-inference-steps", "4"]
SPARSE = ["--sparse-attn-backend", "reference", "--sparse-attn-block-size", "8", "--sparse-attn-topk", "0.5"]


def _rank_generates(rank: int, flags: list[str]) -> None:
    assert main(flags) == 0


def _lora(path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (4, 128), "B": (128, 4)}
    weights = {
        f"transformer.{layer}.lora_{side}.weight": torch.randn(*shapes[side], generator=generator)
        for layer in ("blocks.0.attn1.to_q", "blocks.1.attn2.to_v", "condition_embedder.text_embedder.linear_2")
        for side in shapes
    }
    # A difference, which is added to the model's own weight before it is dealt out.
    weights["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.randn(128, generator=generator)
    save_file(weights, path)
    return str(path)


def test_a_folder_with_lora_weights_gives_the_video_of_one_rank(tmp_path: Path) -> None:
    tiny_pipeline("t2v").save_pretrained(tmp_path / "model")
    lora = _lora(tmp_path / "lora.safetensors")
    flags = ["--model", str(tmp_path / "model"), *SMALL, *SPARSE]
    with_lora = [*flags, "--lora", lora, "--lora-2", lora, "--lora-scale-2", "0.5"]

    def named(name: str, flags: list[str]) -> list[str]:
        return [*flags, "--output", str(tmp_path / f"{name}.mp4"), "--output-latents", str(tmp_path / f"{name}.pt")]

    run_ranks(2, _rank_generates, named("two", [*with_lora, "--ring-degree", "2", "--fsdp"]))
    assert main(named("one", with_lora)) == 0
    assert main(named("without", flags)) == 0
    two, one, without = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("two", "one", "without"))
    assert relative_error(two, one) < 2e-5
    assert relative_error(without, one) > 1e-2


@pytest.mark.parametrize("full", [False, True], ids=["transformers", "full"])
def test_random_weights_are_dealt_out_as_they_are_drawn(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "ffn_dim": 64}
    text = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    size = replace(
        T2V_A14B,
        transformer={**T2V_A14B.transformer, **narrow},
        text_encoder={**T2V_A14B.text_encoder, **text},
        vae={"base_dim": 4},
    )
    monkeypatch.setattr(models, "T2V_A14B", size)
    flags = ["--model", "a14b-random", "--layers", "3", *["--full"] * full, *SMALL, *SPARSE]

    def named(name: str) -> list[str]:
        return ["--output", str(tmp_path / f"{name}.mp4"), "--output-latents", str(tmp_path / f"{name}.pt")]

    assert main([*flags, *named("one")]) == 0
    run_ranks(2, _rank_generates, [*flags, "--ulysses-degree", "2", "--fsdp", *named("two")])
    two, one = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("two", "one"))
    assert relative_error(two, one) < 2e-5


def _check_compiled(rank: int) -> None:
    compile_ = nn.Module.compile
    nn.Module.compile = partialmethod(compile_, backend="eager")  # type: ignore[assignment,method-assign]
    pipe = _dealt_out("t2v", ULYSSES)
    arguments = parse_arguments([*SPARSE, "--ulysses-degree", "2", "--compile"])
    prepare_transformers(pipe, arguments, SequenceParallelMesh(*ULYSSES))
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    assert relative_error(run(pipe), _single("t2v")) < 2e-5


def test_compiled_blocks_are_dealt_out_too() -> None:
    _single("t2v")
    run_ranks(2, _check_compiled)


def _rank_fails(rank: int, flags: list[str]) -> None:
    if rank == 1:
        placed = Placement.place

        def place(self: Placement, transformer: Any) -> None:
            placed(self, transformer)
            _fail_in(transformer.blocks[0].ffn, 1, before=False)

        Placement.place = place  # type: ignore[method-assign]
    assert main(flags) == 2  # 1 for one that waited in vain


def test_generate_ends_on_all_ranks_when_one_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _single("t2v")  # what is imported on the way is imported once
    flags = ["--model", "tiny", *SMALL, *SPARSE, "--output", str(tmp_path / "video.mp4")]
    run_ranks(2, _rank_fails, [*flags, "--cfg-parallel-degree", "2", "--fsdp"])
    errors = {line for line in capfd.readouterr().err.splitlines() if "error:" in line}
    told = "(another rank failed, and with it this step here (rank 1: OutOfMemoryError: no memory); mend that"
    assert any(told in line for line in errors)
    assert any("rank 1: error: memory ran out in denoise" in line and line.endswith("(no memory)") for line in errors)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (SPARSE, "over the ranks of a job, and there is one; start several, such as"),
        (["--ulysses-degree", "2"], "which --sparse-attn-backend none leaves off; use --sparse-attn-backend auto"),
        ([*SPARSE, "--ring-degree", "2", "--model", "a14b-random", "--lora", "a/b"], "before --lora could change them"),
    ],
)
def test_refused(flags: list[str], text: str) -> None:
    for arguments in (parse_arguments(["--fsdp", *flags]), parse_serve_arguments(["--fsdp", *flags]).base()):
        with pytest.raises(ValueError, match=text):
            check_placement(arguments, torch.device("cpu"), torch.float32)


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(ValueError, match=r"needs torch 2\.7 or newer, and this is 2\.6\.0\+cpu"):
        check_placement(parse_arguments(["--fsdp", *SPARSE, "--ring-degree", "2"]), torch.device("cpu"), torch.float32)


def test_one_rank_is_refused_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "tiny", "--fsdp", *SPARSE]) == 2
    assert "start several, such as `torchrun --nproc-per-node 2`" in capsys.readouterr().err


def test_the_commands_share_the_flag() -> None:
    flags = ["--fsdp", *SPARSE, "--ring-degree", "2"]
    assert parse_serve_arguments(flags).base().fsdp
    assert FidelityArguments(prompts="p.txt", output="o", fsdp=True, ring_degree=2).base().fsdp


@pytest.mark.multigpu
@pytest.mark.parametrize("flags", [[], ["--quantization", "fp8", "--compile"]], ids=["bf16", "fp8"])
def test_two_gpus_equal_one(tmp_path: Path, flags: list[str]) -> None:
    """At full width, over NCCL."""
    if flags and (torch.cuda.get_device_capability() < (8, 9) or find_spec("torchao") is None):
        pytest.skip("needs torchao, and a GPU with float8 matrix products")
    size = ["--height", "256", "--width", "256", "--num-frames", "17", "--num-inference-steps", "4"]
    made = ["--model", "a14b-random", "--layers", "3", *size, "--sparse-attn-backend", "triton", *flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    latents = []
    for name, start, mesh in (("one", [], []), ("two", torchrun, ["--ulysses-degree", "2", "--fsdp"])):
        out = ["--output", str(tmp_path / f"{name}.mp4"), "--output-latents", str(tmp_path / f"{name}.pt")]
        command = [sys.executable, *start, "-m", "sp_sparse.generate", *made, *mesh, *out]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        latents.append(torch.load(tmp_path / f"{name}.pt", weights_only=True).float())
    assert relative_error(latents[1], latents[0]) < 5e-2
