"""`--offload` on a pretended device: the same videos on every mesh, each move once, and what happens where one fails."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sp_sparse import AttentionRecorder
from sp_sparse.fidelity.__main__ import main as fidelity
from sp_sparse.generate import offload as offloading
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.asked import fill_defaults
from sp_sparse.generate.attach import attach, build_mesh
from sp_sparse.generate.defaults import PROMPT
from sp_sparse.generate.files import decoded_pixels
from sp_sparse.generate.memory import NotEnoughMemoryError, is_out_of_memory
from sp_sparse.generate.models import find_model, load_pipeline
from sp_sparse.generate.offload import comings, offload
from sp_sparse.generate.random_models import tiny_text_to_video, tiny_wan_2_1_image
from sp_sparse.generate.stages import StepClock
from sp_sparse.generate.start import Start
from sp_sparse.generate.video import denoise, encode_prompt
from tests.offload_device import pretended_device
from tests.ranks import run_ranks
from tests.serving.server import RankServer

SMALL = ["--model", "tiny", "--height", "64", "--width", "64", "--num-frames", "5"]
SMALL += ["--num-inference-steps", "4"]
SPARSE = ["--sparse-attn-backend", "reference", "--sparse-attn-block-size", "8", "--sparse-attn-topk", "0.5"]
KINDS = ("idle", "layers")


def _latents(folder: Path, name: str, *flags: str) -> Tensor:
    """Of this process's job, which may be one of several ranks."""
    tensor = folder / f"{name}.pt"
    places = ["--output", str(folder / f"{name}.mp4"), "--output-latents", str(tensor)]
    assert main([*SMALL, *SPARSE, *flags, *places]) == 0
    latents: Tensor = torch.load(tensor, weights_only=True)
    return latents


def _report(folder: Path, name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return report


@pytest.mark.parametrize("model", ["tiny", "tiny-i2v", "tiny-ti2v", "tiny-2.1-i2v", "tiny-vace"])
def test_the_same_video_on_one_rank(model: str, tmp_path: Path) -> None:
    size = ["--height", "128", "--width", "128"] if model == "tiny-ti2v" else []
    flags = ["--model", model, *size]
    plain = _latents(tmp_path, "plain", *flags)
    experts = ("transformer", "transformer_2") if model in ("tiny", "tiny-i2v") else ("transformer",)
    images = ("image_encoder",) if model == "tiny-2.1-i2v" else ()
    parts = dict.fromkeys(("text_encoder", *images, *experts), 1)
    blocks = 3 + 2 if model == "tiny-vace" else 2
    with pretended_device() as came:
        assert torch.equal(_latents(tmp_path, "idle", *flags, "--offload", "idle"), plain)
        assert came == parts
        came.clear()
        assert torch.equal(_latents(tmp_path, "layers", *flags, "--offload", "layers"), plain)
        # At both branches of four steps; of the text encoder two blocks at two prompts. What is beside them comes once.
        assert came == {"block": blocks * 2 * 4 + 2 * 2, **parts}
    memory = {name: _report(tmp_path, name)["memory"] for name in ("plain", *KINDS)}
    assert {name: told["offload"] for name, told in memory.items()} == {
        "plain": "none",
        "idle": "idle",
        "layers": "layers",
    }
    assert memory["plain"]["comings"] is None
    assert memory["idle"]["comings"] == memory["layers"]["comings"] == parts


def _rank_compares(rank: int, folder: str, flags: list[str]) -> None:
    """Each kind equals `plain`, which one rank has made; two videos, between which the experts change back."""
    wanted = [torch.load(Path(folder, f"plain_{number}.pt"), weights_only=True) for number in range(2)]
    for kind in KINDS:
        with pretended_device() as came:
            name = f"{kind}_{'_'.join(flags)}"
            places = ["--output", f"{folder}/{name}.mp4", "--output-latents", f"{folder}/{name}.pt"]
            assert main([*SMALL, *SPARSE, "--videos-per-prompt", "2", *flags, "--offload", kind, *places]) == 0
        parts = {"text_encoder": 1, "transformer": 2, "transformer_2": 2}
        # With guidance on two halves each of them makes one branch.
        branches = 1 if "--cfg-parallel-degree" in flags else 2
        blocks = {"block": 2 * 2 * 4 * branches + 2 * 2} if kind == "layers" else {}
        assert came == {**parts, **blocks}, "on each rank"
        for number, latents in enumerate(wanted):
            if rank == 0:
                got = torch.load(Path(folder, f"{name}_{number}.pt"), weights_only=True)
                torch.testing.assert_close(got, latents, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two videos without offloading, on one rank."""
    folder = tmp_path_factory.mktemp("plain")
    places = ["--output", str(folder / "plain.mp4"), "--output-latents", str(folder / "plain.pt")]
    assert main([*SMALL, *SPARSE, "--videos-per-prompt", "2", *places]) == 0
    return folder


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, ["--ulysses-degree", "2"]),
        (2, ["--ring-degree", "2"]),
        (4, ["--ulysses-degree", "2", "--ring-degree", "2"]),
        (2, ["--cfg-parallel-degree", "2"]),
    ],
    ids=["ulysses", "ring", "hybrid", "halves"],
)
def test_the_same_videos_on_every_mesh(world: int, flags: list[str], plain: Path) -> None:
    run_ranks(world, _rank_compares, str(plain), flags)


def _rank_fails(rank: int, folder: str, flags: list[str], kind: str, failing: int) -> None:
    """On one rank the second expert finds no room, or a block amid the first forward of all."""
    left = {"transformer_2": 1} if kind == "idle" else {"block": 2}
    armed = False

    def before_coming(name: str) -> None:
        if armed and rank == failing and name in left:
            left[name] -= 1
            if left[name] == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")

    cpu = torch.device("cpu")
    arguments = parse_arguments([*SMALL, *SPARSE, *flags, "--offload", kind])
    model = find_model(arguments, cpu)
    arguments = fill_defaults(arguments, model)
    with pretended_device(before_coming) as came:
        pipe = load_pipeline(arguments, model, cpu)
        pipe.set_progress_bar_config(disable=True)
        prompt = encode_prompt(pipe, arguments, PROMPT, cpu)
        attach(pipe, arguments.sparse, build_mesh(arguments), AttentionRecorder())
        armed = True
        told = "memory ran out in denoise; less is taken, in this order, with "
        told += r"--quantization fp8 \(compute capability 8\.9 and newer\); "
        told += "--offload layers; a higher" if kind == "idle" else "a higher"
        with pytest.raises(NotEnoughMemoryError, match=told) as raised:
            denoise(pipe, arguments, prompt, StepClock(cpu), Start())
        words = f"rank {failing}: OutOfMemoryError: CUDA out of memory"
        assert rank == failing or words in str(raised.value), "the others hear whose it was"
        came.clear()
        latents = denoise(pipe, arguments, prompt, StepClock(cpu), Start())
        if kind == "idle":
            assert came == {"transformer": 1, "transformer_2": 1}
    wanted = torch.load(Path(folder, "plain_0.pt"), weights_only=True)
    torch.testing.assert_close(latents, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "flags", [["--ulysses-degree", "2"], ["--cfg-parallel-degree", "2"]], ids=["ulysses", "halves"]
)
def test_a_rank_without_room_is_heard_and_the_next_video_is_right(flags: list[str], kind: str, plain: Path) -> None:
    run_ranks(2, _rank_fails, str(plain), flags, kind, 1)


def test_of_all_parts_one_at_most_is_on_the_device(plain: Path) -> None:
    """And none while the VAE works."""
    arguments = parse_arguments([*SMALL, *SPARSE, "--offload", "idle"])
    cpu = torch.device("cpu")
    model = find_model(arguments, cpu)
    arguments = fill_defaults(arguments, model)
    seen: list[list[str]] = []
    with pretended_device():
        pipe = load_pipeline(arguments, model, cpu)
        pipe.set_progress_bar_config(disable=True)
        parts = {name: getattr(pipe, name) for name in ("text_encoder", "transformer", "transformer_2")}

        def there() -> list[str]:
            usable = {name: all(x.isfinite().all() for x in part.parameters()) for name, part in parts.items()}
            return [name for name, is_usable in usable.items() if is_usable]

        for name, part in parts.items():
            inner = part.encoder if name == "text_encoder" else part.blocks[0]
            inner.register_forward_pre_hook(lambda *_: seen.append(there()))
        assert there() == []
        prompt = encode_prompt(pipe, arguments, PROMPT, cpu)
        for _ in range(2):
            latents = denoise(pipe, arguments, prompt, StepClock(cpu), Start())
            assert there() == []
    assert torch.isfinite(latents).all()
    at_work = [now for now, before in zip(seen, [[], *seen], strict=False) if now != before]
    assert at_work == [["text_encoder"], *(["transformer"], ["transformer_2"]) * 2], "one change a video, and back"


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_encoder_is_gone_when_the_vae_encodes(kind: str) -> None:
    arguments = parse_arguments([*SMALL, *SPARSE, "--model", "tiny-2.1-i2v", "--offload", kind])
    cpu = torch.device("cpu")
    model = find_model(arguments, cpu)
    arguments = fill_defaults(arguments, model)
    seen: list[bool] = []
    with pretended_device() as came:
        pipe = load_pipeline(arguments, model, cpu)
        pipe.set_progress_bar_config(disable=True)
        prompt = encode_prompt(pipe, arguments, PROMPT, cpu)
        weights = [weight for part in (pipe.image_encoder, pipe.transformer) for weight in part.parameters()]
        pipe.vae.encoder.register_forward_pre_hook(
            lambda *_: seen.append(any(weight.isfinite().any() for weight in weights))
        )
        denoise(pipe, arguments, prompt, StepClock(cpu), Start.of(arguments, model))
    assert came["image_encoder"] == 1
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_go_where_a_part_computes_and_not_where_it_waits(kind: str) -> None:
    from diffusers.utils.torch_utils import get_module_execution_device

    device = torch.device("cpu", 0)
    assert torch.empty(0, device=device).device != device, "weights that wait tell another device"
    pipe = tiny_wan_2_1_image(torch.float32)
    offload(pipe, parse_arguments([*SMALL, *SPARSE, "--offload", kind]), device)
    for part in (pipe.text_encoder, pipe.image_encoder, pipe.transformer):
        assert get_module_execution_device(part) == device


def _lora(path: Path) -> str:
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for block in range(2):
        key = f"transformer.blocks.{block}.attn1.to_q"
        weights[f"{key}.lora_A.weight"] = torch.randn(4, 128, generator=generator)
        weights[f"{key}.lora_B.weight"] = torch.randn(128, 4, generator=generator)
    save_file(weights, path)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_with_lora_and_compiled_blocks(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder; all blocks of an expert are one graph, whatever hooks each has."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    tiny_text_to_video(torch.float32).save_pretrained(tmp_path / "model")
    lora = _lora(tmp_path / "lora.safetensors")
    flags = ["--model", str(tmp_path / "model"), "--guidance-scale", "3", "--flow-shift", "3"]
    flags += ["--lora", lora, "--lora-2", lora, "--lora-scale-2", "0.5"]
    plain = _latents(tmp_path, "plain", *flags)
    assert not torch.equal(plain, _latents(tmp_path, "other", *flags, "--lora-scale", "0.5")), "they change the video"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    try:
        with pretended_device():
            assert torch.equal(_latents(tmp_path, kind, *flags, "--offload", kind, "--compile"), plain)
    finally:
        torch.compiler.reset()
    assert len(graphs) == 2, "one an expert, whose scales differ"


def test_quantised_weights_take_turns_too() -> None:
    """They are tensors made of tensors, which have no data of their own to exchange."""
    torchao = pytest.importorskip("torchao.quantization")
    cpu = torch.device("cpu")
    arguments = parse_arguments([*SMALL, *SPARSE, "--offload", "idle"])
    pipe = tiny_text_to_video(torch.float32)
    for model in (pipe.transformer, pipe.transformer_2):
        torchao.quantize_(model.blocks, torchao.Int8WeightOnlyConfig())
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1)),
        "return_dict": False,
    }
    with torch.no_grad(), pretended_device():
        wanted = [model(**inputs)[0] for model in (pipe.transformer, pipe.transformer_2)]
        offload(pipe, arguments, cpu)
        spoilt = pipe.transformer.blocks[0].attn1.to_q.weight.dequantize()
        assert not spoilt.nan_to_num().any(), "they wait"
        for _ in range(2):
            for model, latents in zip((pipe.transformer, pipe.transformer_2), wanted, strict=True):
                assert torch.equal(model(**inputs)[0], latents)
    assert comings(pipe) == {"transformer": 2, "transformer_2": 2}


def test_copies_are_packed_and_keep_their_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "_CHUNK_BYTES", 4096)
    tensors = [
        torch.randn(7, 9).t(),
        torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        torch.tensor(5),
        torch.empty(0, 3),
        torch.randn(40, 50, dtype=torch.float64),  # larger than a chunk
        torch.arange(300, dtype=torch.int8)[::2],
        torch.randn(1, 4).expand(3, 4),
        *(torch.randn(11).to(torch.bfloat16) for _ in range(20)),
    ]
    copies = offloading._copies(tensors, pinned=False)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
    assert [copy.stride() for copy in copies[:2]] == [tensor.stride() for tensor in tensors[:2]]
    chunks = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in copies}
    assert len(chunks) == 3
    assert sum(chunks.values()) < 1.3 * sum(max(256, tensor.nbytes) for tensor in tensors)


def test_without_room_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **how: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    tensors = [torch.randn(10)]
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: refuse() if how.get("pin_memory") else make(*size, **how))
    told = r"no room for 0\.0 GB .* page-locked, on each rank; .* or --offload none"
    with pytest.raises(RuntimeError, match=told) as raised:
        offloading._copies(tensors, pinned=True)
    assert not is_out_of_memory(raised.value), "no flag of a GPU's memory helps"


def test_a_text_encoder_without_room_may_come_again() -> None:
    cpu, left = torch.device("cpu"), [1]

    def before_coming(name: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    plain = parse_arguments([*SMALL, *SPARSE])
    model = find_model(plain, cpu)
    wanted = encode_prompt(load_pipeline(plain, model, cpu), plain, "a cat", cpu)
    arguments = parse_arguments([*SMALL, *SPARSE, "--offload", "idle"])
    with pretended_device(before_coming):
        pipe = load_pipeline(arguments, model, cpu)
        with pytest.raises(NotEnoughMemoryError, match=r"memory ran out in encode; .* with --offload layers "):
            encode_prompt(pipe, arguments, "a cat", cpu)
        assert torch.equal(encode_prompt(pipe, arguments, "a cat", cpu).embeds, wanted.embeds)


def _serve(kind: str, flags: list[str]) -> int:
    """As `sp_sparse.serve`, on a pretended device; by its prompt a job fails on rank 1, where a part or block comes."""
    from sp_sparse.serve import wan
    from sp_sparse.serve.__main__ import main as serve

    real, rank, prompts, left = wan.denoise, int(os.environ["RANK"]), [""], [0]

    def denoise(pipe: Any, arguments: Any, prompt: Any, *others: Any) -> Any:
        prompts.append(prompt.text)
        left[0] = 3 if kind == "layers" else 2
        return real(pipe, arguments, prompt, *others)

    def before_coming(name: str) -> None:
        if prompts[-1] == "fail" and rank == 1 and name != "text_encoder":
            left[0] -= 1
            if left[0] == 0:
                prompts.append("")
                raise torch.OutOfMemoryError("CUDA out of memory")

    vars(wan).update(denoise=denoise)
    with pretended_device(before_coming):
        return serve(flags)


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_after_one_that_failed_is_right(kind: str, tmp_path: Path) -> None:
    job = {"size": "64x64", "num_frames": 5, "num_inference_steps": 4, "seed": 1}
    flags = ["--ulysses-degree", "2", "--warmup-steps", "0", "--offload", kind]
    with RankServer(tmp_path, 2, *flags, program=partial(_serve, kind)) as server:
        videos = []
        for _ in range(2):
            videos.append(decoded_pixels(server.content(server.completed(prompt="a cat", **job)["id"])))
            failed = server.ended(server.create(prompt="fail", **job)["id"])
            assert (failed["status"], failed["error"]["code"]) == ("failed", "out_of_memory")
            helps = "--quantization fp8 (compute capability 8.9 and newer)"
            helps += " or --offload layers" if kind == "idle" else ""
            assert failed["error"]["message"].endswith(f"shorter video, or have it started with {helps}")
        assert server.stop() == [0, 0], "no process was started anew"
        assert "NotEnoughMemoryError: memory ran out in denoise; less is taken" in server.log
    run_ranks(2, _rank_makes, str(tmp_path / "plain.mp4"))
    assert videos == [decoded_pixels((tmp_path / "plain.mp4").read_bytes())] * 2


def _rank_makes(rank: int, output: str) -> None:
    served = ["--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.3", "--seed", "1", "--prompt", "a cat"]
    assert main([*SMALL, *served, "--ulysses-degree", "2", "--output", output]) == 0


def test_fidelity_measures_the_same(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    flags = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        *SMALL,
        *SPARSE[:2],
        "--block-sizes",
        "8",
        "--densities",
        "0.5",
    ]
    figures = {}
    for kind in ("none", *KINDS):
        with pretended_device() as came:
            assert fidelity([*flags, "--offload", kind, "--output", str(tmp_path / kind)]) == 0
        lines = [json.loads(line) for line in (tmp_path / kind / "fidelity.jsonl").read_text().splitlines()]
        figures[kind] = [(line["kind"], line["prompt"], line["psnr"], line["ssim"]) for line in lines]
        if kind == "idle":
            # Of two prompts a dense video, one by another kernel and a sparse one, and the masks of the first.
            assert came == {"text_encoder": 1, "transformer": 7, "transformer_2": 7}
    assert len(figures["none"]) == 6
    assert figures["idle"] == figures["layers"] == figures["none"]
