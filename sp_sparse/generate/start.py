"""What a video starts from beside its text: nothing, a first frame, a first and a last one, or another video; and what
controls VACE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.models import WanModel
from sp_sparse.generate.sources import open_picture, read_clip


@dataclass(frozen=True)
class Start:
    """Pictures, as they were given.

    Attributes:
        image: the first frame, for models that take one.
        last_image: the last frame, likewise.
        frames: those of the video that is made into another one, or controls it.
        mask: as many, white where the video is made anew.
        references: what the video shows.
    """

    image: Any | None = None
    last_image: Any | None = None
    frames: tuple[Any, ...] = ()
    mask: tuple[Any, ...] = ()
    references: tuple[Any, ...] = ()

    @classmethod
    def of(cls, arguments: GenerateArguments, model: WanModel) -> Start:
        """What filled arguments ask for; a first frame that is not given is drawn."""
        if model.takes_video or model.takes_control:
            count = arguments.num_frames
            assert count is not None  # filled
            frames = () if arguments.video is None else read_clip(arguments.video, count)
            mask = [] if arguments.mask is None else read_clip(arguments.mask, count)
            if len(mask) == 1:
                mask *= count
            return cls(None, None, tuple(frames), tuple(mask), tuple(map(open_picture, arguments.reference_image)))
        if not model.takes_image:
            return cls()
        last = None if arguments.last_image is None else open_picture(arguments.last_image)
        return cls(_drawn(arguments) if arguments.image is None else open_picture(arguments.image), last)

    def inputs(self, arguments: GenerateArguments) -> dict[str, Any]:
        """What the pipeline is given of it, filling frames of the asked size."""
        assert arguments.height is not None  # filled
        assert arguments.width is not None
        size = arguments.height, arguments.width
        inputs: dict[str, Any] = {}
        for name, frames in (("video", self.frames), ("mask", self.mask)):
            if frames:
                inputs[name] = [fill_frame(frame, *size) for frame in frames]
        if self.references:  # the pipeline fits them, on white
            inputs["reference_images"] = list(self.references)
        if arguments.conditioning_scale is not None:
            inputs["conditioning_scale"] = arguments.conditioning_scale
        if arguments.strength is not None:  # video-to-video makes as many frames as it is given
            return {**inputs, "strength": arguments.strength}
        inputs["num_frames"] = arguments.num_frames
        for name, picture in (("image", self.image), ("last_image", self.last_image)):
            if picture is not None:
                inputs[name] = fill_frame(picture, *size)
        return inputs

    def told(self, arguments: GenerateArguments) -> dict[str, dict[str, Any] | None]:
        """Of each file that the video starts from, where it is, and how much was cropped; None without one of the user's."""
        assert arguments.height is not None  # filled
        assert arguments.width is not None
        pictures = {
            "image": self.image,
            "last_image": self.last_image,
            "video": next(iter(self.frames), None),
            "mask": next(iter(self.mask), None),
        }
        told: dict[str, dict[str, Any] | None] = {}
        for name, picture in pictures.items():
            path = getattr(arguments, name)
            if picture is None or path is None:
                told[name] = None
                continue
            width, height = picture.size
            cropped = cropped_share((width, height), arguments.height, arguments.width)
            told[name] = {"path": path, "width": width, "height": height, "cropped_share": cropped}
        return told


def fill_frame(image: Any, height: int, width: int) -> Any:
    """The picture scaled until it fills the frame, and cropped equally on two sides: stretching would distort it."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def cropped_share(picture: tuple[int, int], height: int, width: int) -> float:
    """The share of a picture of this width and height that `fill_frame` crops."""
    wide = picture[0] * height / (picture[1] * width)
    return 1.0 - min(wide, 1.0 / wide)


def _drawn(arguments: GenerateArguments) -> Any:
    from PIL import Image

    height, width = arguments.height or 1, arguments.width or 1
    rows, columns = np.mgrid[0:height, 0:width]
    channels = (rows * 255 // height, columns * 255 // width, (rows // 16 + columns // 16) % 2 * 255)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
