"""What each model of the family makes if nothing is asked for: a prompt; sizes, steps and guidance as its authors run it.

The shift of the noise schedule is the checkpoint's own, in its scheduler's configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PROMPT = "a cat walks on the grass"
# Of the words that mini knows, which are no others than those of its captions.
MINI_PROMPT = "A red circle moves to the right over dark blue stripes."


@dataclass(frozen=True)
class VideoDefaults:
    """What a model makes if nothing is asked for."""

    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    prompt: str = PROMPT


# 8 x 8 x 5 = 320 tokens, 20 blocks of 16.
TINY = VideoDefaults(128, 128, 17, 8, 4, 3.0)
# Its VAE shrinks by 16: 6 x 6 x 5 = 180 tokens.
TINY_TI2V = replace(TINY, height=192, width=192)
# 16 x 16 x 13 = 3,328 tokens, 52 blocks of 64: what it was trained on.
MINI = VideoDefaults(128, 128, 49, 16, 12, 3.0, MINI_PROMPT)
# Wan 2.2.
T2V_A14B = VideoDefaults(480, 832, 81, 16, 40, 4.0)
I2V_A14B = replace(T2V_A14B, guidance_scale=3.5)
TI2V_5B = VideoDefaults(704, 1280, 121, 24, 50, 5.0)
# Wan 2.1, VACE among it; FLF2V is published for 720p alone.
T2V_2_1 = VideoDefaults(480, 832, 81, 16, 50, 5.0)
I2V_2_1 = replace(T2V_2_1, num_inference_steps=40)
FLF2V_2_1 = replace(T2V_2_1, height=720, width=1280)
# Of video-to-video, which keeps the less of a video the higher it is.
STRENGTH = 0.8


def defaults_of(from_image: bool, per_token: bool, experts: int, needs_last_image: bool) -> VideoDefaults:
    """Those of a published model, by what its configuration tells.

    Args:
        from_image: the video starts from an image.
        per_token: every token has its own timestep, which TI2V-5B alone has.
        experts: two from Wan 2.2 on.
        needs_last_image: the image embedding has places for two images.
    """
    if per_token:
        return TI2V_5B
    if experts > 1:
        return I2V_A14B if from_image else T2V_A14B
    if needs_last_image:
        return FLF2V_2_1
    return I2V_2_1 if from_image else T2V_2_1
