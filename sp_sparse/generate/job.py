"""One job of `generate`: check, load, encode, make the videos, verify, report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sp_sparse import AttentionRecorder, SequenceParallelMesh
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.asked import check_second_expert, fill_defaults
from sp_sparse.generate.attach import attach, build_mesh, prepare_transformers
from sp_sparse.generate.auto_mesh import with_mesh
from sp_sparse.generate.checks import checked_model, checked_video
from sp_sparse.generate.files import check_writable
from sp_sparse.generate.lora import check_line_lora, check_lora, differ_in_lora, with_all_lora
from sp_sparse.generate.models import WanModel, load_pipeline
from sp_sparse.generate.offload import comings
from sp_sparse.generate.prompts import WantedVideo, wanted_videos
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.recorded_masks import MaskSampler, RecordedMasks
from sp_sparse.generate.report import attention_report, exchanges_told, job_report, write_report
from sp_sparse.generate.stages import Stages
from sp_sparse.generate.start import Start
from sp_sparse.generate.verify import verify
from sp_sparse.generate.video import VideoMaker, encode_prompts
from sp_sparse.integrations.diffusers import SparseWan
from sp_sparse.parallel.agreement import check_all_same


def generate(arguments: GenerateArguments, ranks: Ranks, load: Callable[..., Any] | None = None) -> int:
    """Run the job; every rank calls it with the same arguments.

    `load` gives the pipeline in place of `load_pipeline`, from what that takes.

    Returns:
        0, or 1 if `--verify` found a difference above `--verify-tolerance`.
    """
    ranks.check_same(arguments)
    asked = arguments
    arguments, wanted, model = ranks.together(lambda: _check(with_mesh(asked, ranks), ranks))
    check_all_same({f"video {number}": video for number, video in enumerate(wanted)}, ranks.groups)

    stages = Stages(ranks)
    with stages.measure("load"):
        everything = with_all_lora(arguments, wanted)
        pipe = ranks.together(lambda: (load or load_pipeline)(everything, model, ranks.device))
    pipe.set_progress_bar_config(disable=not ranks.first, desc="denoise", unit="step")
    with stages.measure("encode"):
        prompts = encode_prompts(pipe, wanted, ranks.device)
    own_lora = differ_in_lora(wanted)
    makers = [VideoMaker(pipe, own, ranks, Start.of(own, model), own_lora) for own in wanted]
    for maker in makers:
        for name, source in maker.start.told(maker.arguments).items():
            if source is not None:
                ranks.say(
                    f"{name}: {source['width']}x{source['height']} fills {maker.arguments.width}x{maker.arguments.height}; "
                    f"{source['cropped_share']:.1%} of it is cropped"
                )
    recorder = _recorder(arguments, len(pipe.transformer.blocks))
    mesh, handle = ranks.together(lambda: _prepare(pipe, arguments, recorder))

    videos, told = [], []
    for number, (maker, prompt) in enumerate(zip(makers, prompts, strict=True)):
        before = Counter(stages.seconds)
        videos.append(maker.make(prompt, stages, arguments.repeat))
        told.append(maker.save(videos[-1], number, len(makers), stages))
        told[-1]["seconds"] = dict(Counter(stages.seconds) - before)
    attention = attention_report(arguments.sparse, recorder, mesh)
    if attention is not None:
        calls = ", ".join(f"{kernel} x {count}" for kernel, count in attention["calls"].items())
        ranks.say(f"attention: {calls}; mean density {attention['mean_density']:.3f}")
        if attention["kv_exchange"]:
            ranks.say(f"keys and values: {exchanges_told(attention)}")
    if isinstance(recorder, MaskSampler):
        _save_masks(arguments, recorder, mesh, ranks)
    handle.remove()
    came = comings(pipe)  # of the videos, not of those that verify them
    verified = verify(makers, videos)
    report = job_report(arguments, ranks, stages, came, attention, told, verified)
    if ranks.first:
        write_report(report, arguments.report_path())
    ranks.say(f"report: {arguments.report_path()}")
    return 0 if verified is None or verified["passed"] else 1


def _check(
    arguments: GenerateArguments, ranks: Ranks
) -> tuple[GenerateArguments, tuple[GenerateArguments, ...], WanModel]:
    """Refuse what can be refused before weights are read.

    Returns:
        The arguments and those of each video, with the model's own values for what is open, and the model.
    """
    wanted = wanted_videos(arguments)
    model = checked_model(wanted[0].arguments, ranks)
    _check_lora(wanted, model)
    _check_alike(wanted, model)
    filled = tuple(_filled(video, model) for video in wanted)
    if ranks.first:
        masks = () if arguments.output_masks is None else (Path(arguments.output_masks),)
        for path in (arguments.output_path(), arguments.report_path(), *arguments.tensor_paths().values(), *masks):
            check_writable(path)
    # A size may follow a line's picture, so that the job's own is told where one video is all.
    return filled[0] if len(filled) == 1 else fill_defaults(arguments, model), filled, model


def _check_lora(wanted: tuple[WantedVideo, ...], model: WanModel) -> None:
    for video in {(video.arguments.lora, video.arguments.lora_2): video for video in reversed(wanted)}.values():
        try:
            check_second_expert(video.arguments, model)
            check_lora(video.arguments)
        except ValueError as error:
            raise video.error(error) from error
    check_line_lora([video.arguments for video in wanted])


def _check_alike(wanted: tuple[WantedVideo, ...], model: WanModel) -> None:
    """Refuse lines of which some start from an image or a video and others do not, where that decides how the model is
    loaded."""
    for name, decides in (("image", model.may_take_image), ("video", not model.takes_control)):
        given = [getattr(video.arguments, name) is not None for video in wanted]
        if decides and len(set(given)) > 1:
            raise ValueError(
                f"{wanted[given.index(True)].place} starts from {'an' if name == 'image' else 'a'} {name}, "
                f"{wanted[given.index(False)].place} from text alone; put them into two files"
            )


def _filled(video: WantedVideo, model: WanModel) -> GenerateArguments:
    try:
        return checked_video(video.arguments, model)
    except ValueError as error:
        raise video.error(error) from error


def _prepare(
    pipe: Any, arguments: GenerateArguments, recorder: AttentionRecorder
) -> tuple[SequenceParallelMesh, SparseWan]:
    mesh = build_mesh(arguments)
    handle = attach(pipe, arguments.sparse, mesh, recorder)
    prepare_transformers(pipe, arguments, mesh)
    return mesh, handle


def _recorder(arguments: GenerateArguments, layers: int) -> AttentionRecorder:
    if arguments.output_masks is None:
        return AttentionRecorder()
    assert arguments.num_inference_steps is not None  # filled
    return MaskSampler(layers=layers, steps=arguments.num_inference_steps)


def _save_masks(arguments: GenerateArguments, recorder: MaskSampler, mesh: SequenceParallelMesh, ranks: Ranks) -> None:
    """Write the masks of the first sequence, put together from the ranks that share it. A collective call."""
    parts = ranks.gather((recorder.kept, recorder.shape))[: mesh.sequence_degree]
    sparse = arguments.sparse
    about = {
        "model": arguments.model,
        "topk": sparse.topk,
        "selector": sparse.selector,
        "schedule": sparse.schedule,
        "token_order": sparse.token_order,
        "num_inference_steps": arguments.num_inference_steps,
    }

    def save() -> None:
        if ranks.first:
            assert arguments.output_masks is not None
            RecordedMasks.assemble(parts, mesh.ulysses_degree, about).save(Path(arguments.output_masks))

    ranks.together(save)
    ranks.say(f"masks: {arguments.output_masks}")
