"""What is refused before weights are read, for all that make videos: `generate`, the server, `fidelity`."""

from __future__ import annotations

from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.asked import check_second_expert, check_start, check_video, fill_defaults
from sp_sparse.generate.attach import check_ranks
from sp_sparse.generate.lora import check_lora
from sp_sparse.generate.models import WanModel, find_model
from sp_sparse.generate.placement import check_placement
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.tiles import check_tiling


def checked_model(arguments: GenerateArguments, ranks: Ranks) -> WanModel:
    """The model of `arguments`, once all is checked that does not depend on the single video.

    Raises:
        ValueError: degrees that do not fit the ranks, no such model, or settings that it has no use for.
    """
    check_ranks(arguments, ranks)
    model = find_model(arguments, ranks.device)
    check_second_expert(arguments, model)
    check_lora(arguments)
    check_placement(arguments, ranks.device, model.dtype)
    if arguments.vae_tiling:
        check_tiling()
    return model


def checked_video(arguments: GenerateArguments, model: WanModel) -> GenerateArguments:
    """The arguments of a video with the model's own values for what they leave open.

    Raises:
        ValueError: a picture or video too many or too few, or a video that the model cannot make.
    """
    check_start(arguments, model)
    filled = fill_defaults(arguments, model)
    check_video(filled, model)
    return filled
