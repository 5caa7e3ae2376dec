"""Schedulers by name, for models that were distilled with another one than their folder has."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler


class _EvenNoise:
    """Shares of noise in even steps before they are shifted: 1, 0.75, 0.5, 0.25 for four steps.

    diffusers' own start from the shifted range and shift it again, down to almost none at the last step; distilled models
    were taught at the even ones (Wan2.2-Lightning at timesteps 1000, 937.5, 833.3 and 625, for a shift of 5).
    """

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **given: Any) -> None:
        if num_inference_steps is not None and given.get("sigmas") is None and given.get("timesteps") is None:
            given["sigmas"] = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        super().set_timesteps(num_inference_steps, device, **given)  # type: ignore[misc]  # of the scheduler beside


class EvenFlowEuler(_EvenNoise, FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # torch gives it no type
    """Euler's method."""


class EvenFlowLCM(_EvenNoise, FlowMatchLCMScheduler):  # type: ignore[misc]
    """Each step ends in new noise on what the model takes the video for: latent consistency, or Euler's method with
    stochastic sampling."""


def named_scheduler(name: str, shift: float) -> Any:
    """`unipc`, `euler` or `lcm`, with this shift of the noise."""
    if name == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    return {"euler": EvenFlowEuler, "lcm": EvenFlowLCM}[name](shift=shift)
