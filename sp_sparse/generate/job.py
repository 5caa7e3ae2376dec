"""One job of `generate`: check, load, encode, make the videos, verify, report."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sp_sparse import AttentionRecorder, SequenceParallelMesh
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.attach import attach, build_mesh, check_ranks, prepare_transformers
from sp_sparse.generate.files import check_writable
from sp_sparse.generate.lora import check_lora
from sp_sparse.generate.models import (
    WanModel,
    check_image,
    check_second_expert,
    check_video,
    fill_defaults,
    find_model,
    load_pipeline,
)
from sp_sparse.generate.placement import check_placement
from sp_sparse.generate.prompts import WantedVideo, wanted_videos
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.report import attention_report, job_report, write_report
from sp_sparse.generate.stages import Stages
from sp_sparse.generate.tiles import check_tiling
from sp_sparse.generate.verify import verify
from sp_sparse.generate.video import VideoMaker, encode_prompts, first_frame
from sp_sparse.integrations.diffusers import SparseWan
from sp_sparse.parallel.agreement import check_all_same


def generate(arguments: GenerateArguments, ranks: Ranks) -> int:
    """Run the job; every rank calls it with the same arguments.

    Returns:
        0, or 1 if `--verify` found a difference above `--verify-tolerance`.
    """
    ranks.check_same(arguments)
    asked = arguments
    arguments, wanted, model = ranks.together(lambda: _check(asked, ranks))
    check_all_same({f"video {number}": video for number, video in enumerate(wanted)}, ranks.groups)

    stages, recorder = Stages(ranks), AttentionRecorder()
    with stages.measure("load"):
        pipe = ranks.together(lambda: load_pipeline(arguments, model, ranks.device))
    pipe.set_progress_bar_config(disable=not ranks.first, desc="denoise", unit="step")
    with stages.measure("encode"):
        prompts = encode_prompts(pipe, wanted, ranks.device)
    makers = [VideoMaker(pipe, own, ranks, first_frame(own) if model.takes_image else None) for own in wanted]
    for maker in makers:
        if (image := maker.image_told()) is not None:
            ranks.say(
                f"image: {image['width']}x{image['height']} fills {maker.arguments.width}x{maker.arguments.height}; "
                f"{image['cropped_share']:.1%} of it is cropped"
            )
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
    handle.remove()
    verified = verify(makers, videos)
    report = job_report(arguments, ranks, stages, attention, told, verified)
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
    check_ranks(arguments, ranks)
    wanted = wanted_videos(arguments)
    model = find_model(wanted[0].arguments, ranks.device)
    check_second_expert(arguments, model)
    check_lora(arguments)
    check_placement(arguments, ranks.device, model.dtype)
    if arguments.vae_tiling:
        check_tiling()
    _check_images(wanted, model)
    filled = tuple(_filled(video, model) for video in wanted)
    if ranks.first:
        for path in (arguments.output_path(), arguments.report_path(), *arguments.tensor_paths().values()):
            check_writable(path)
    # A size may follow a line's picture, so that the job's own is told where one video is all.
    return filled[0] if len(filled) == 1 else fill_defaults(arguments, model), filled, model


def _check_images(wanted: tuple[WantedVideo, ...], model: WanModel) -> None:
    """Refuse lines of which some start from an image and others do not, where that decides how the model is loaded."""
    given = [video.arguments.image is not None for video in wanted]
    if model.may_take_image and len(set(given)) > 1:
        raise ValueError(
            f"{wanted[given.index(True)].place} starts from an image, {wanted[given.index(False)].place} from text alone; "
            "put them into two files"
        )


def _filled(video: WantedVideo, model: WanModel) -> GenerateArguments:
    try:
        check_image(video.arguments, model)
        filled = fill_defaults(video.arguments, model)
        check_video(filled, model)
    except ValueError as error:
        raise video.error(error) from error
    return filled


def _prepare(
    pipe: Any, arguments: GenerateArguments, recorder: AttentionRecorder
) -> tuple[SequenceParallelMesh, SparseWan]:
    mesh = build_mesh(arguments)
    handle = attach(pipe, arguments.sparse, mesh, recorder)
    prepare_transformers(pipe, arguments, mesh)
    return mesh, handle
