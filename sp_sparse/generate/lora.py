"""LoRA weights: each source an adapter of its own, at its own weight; what a file says and a model has not is refused."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sp_sparse.flags import flag_of
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.lora_files import LoraFile, find_lora
from sp_sparse.generate.lora_names import (
    ALPHA,
    BIAS,
    DOWN,
    MODULATION,
    UP,
    UP_BIAS,
    WEIGHT,
    LayerNames,
    has_differences,
    read_key,
)

# Name of the sources, of their weights, and the expert that they are for.
_EXPERTS = (("lora", "lora_scale", "transformer"), ("lora_2", "lora_scale_2", "transformer_2"))


def check_lora(arguments: GenerateArguments) -> None:
    """Refuse sources that cannot be there or be read, before the model's weights are.

    Raises:
        ValueError: neither a file, nor a folder with one, nor like a hub id; or a kind of weights that is not applied.
    """
    for name, _, _ in _EXPERTS:
        for source in getattr(arguments, name):
            _names(name, source)


def check_line_lora(videos: Sequence[GenerateArguments]) -> None:
    """Refuse LoRA weights that cannot change from one video to the next.

    Raises:
        ValueError: weights that are added to the model's own; blocks that would be compiled anew for every
            change; or weights that take it in before they are rounded.
    """
    if not differ_in_lora(videos):
        return
    if videos[0].compile:
        raise ValueError(
            "lora differs between the lines, and --compile would compile the blocks anew at every change; leave --compile "
            "out, or put the lines into one file for each choice of LoRA weights"
        )
    if videos[0].quantization != "none":
        raise ValueError(
            f"lora differs between the lines, and --quantization {videos[0].quantization} adds it to the weights before it "
            "rounds them; leave --quantization out, or put the lines into one file for each choice of LoRA weights"
        )
    for own in videos:
        for name, _, _ in _EXPERTS:
            for source in getattr(own, name):
                if has_differences(_names(name, source)):
                    raise ValueError(
                        f"{name} {source} has differences (.diff), which are added to the model's own weights for all "
                        f"videos; give it to all by {flag_of(name)}, and no line a lora of its own"
                    )


def differ_in_lora(arguments: Sequence[GenerateArguments]) -> bool:
    """Whether the videos have LoRA weights of their own."""
    return len({_choice(own) for own in arguments}) > 1


def with_all_lora(arguments: GenerateArguments, videos: Sequence[GenerateArguments]) -> GenerateArguments:
    """The arguments whose LoRA weights are all that some video has; of several choices, each video's must be made active
    by `use_lora`."""
    if not differ_in_lora(videos):
        same: dict[str, Any] = {field: getattr(videos[0], field) for pair in _EXPERTS for field in pair[:2]}
        return replace(arguments, **same)
    every: dict[str, Any] = {"lora_scale": (), "lora_scale_2": ()}
    for name, _, _ in _EXPERTS:
        every[name] = tuple(dict.fromkeys(source for own in videos for source in getattr(own, name)))
    return replace(arguments, **every)


def load_lora(pipe: Any, arguments: GenerateArguments) -> None:
    """Load every source into its expert, and make all of them active.

    Raises:
        ValueError: a source that cannot be read, or of which a weight does not fit the expert.
    """
    for name, scale_name, part in _EXPERTS:
        transformer, active = getattr(pipe, part, None), dict[str, float]()
        scales = _scales(arguments, name, scale_name)
        for source, scale in zip(getattr(arguments, name), scales, strict=True):
            told = f"{flag_of(name)} {source}"
            assert isinstance(transformer, nn.Module)  # checked with the arguments
            try:
                file = find_lora(source)
                weights = _fitting(file, file.weights(), transformer, f"{part} of {arguments.model}")
            except ValueError as error:
                raise ValueError(f"{told} {error}") from error
            try:
                _put(transformer, weights, _adapter(source), scale, pipe)
            except Exception as error:  # whatever diffusers, peft and torch have to say
                raise ValueError(
                    f"{told} cannot be loaded into {arguments.model} ({error}); give LoRA weights that were made for this "
                    "model"
                ) from error
            if weights.pairs:
                active[_adapter(source)] = scale
        _activate(transformer, active)


def use_lora(pipe: Any, arguments: GenerateArguments) -> None:
    """Make those of the loaded sources active that the arguments name, at their weights, and no others.

    Raises:
        ValueError: a source that is not beside the model's weights, as one that was put into them.
    """
    for name, scale_name, part in _EXPERTS:
        transformer, active = getattr(pipe, part, None), dict[str, float]()
        for source, scale in zip(getattr(arguments, name), _scales(arguments, name, scale_name), strict=True):
            if _adapter(source) not in getattr(transformer, "peft_config", {}):
                raise ValueError(
                    f"{name} {source} is not beside the weights of the {part}, so that it cannot change from line to line; "
                    f"give it to all by {flag_of(name)}"
                )
            active[_adapter(source)] = scale
        _activate(transformer, active)


def _activate(transformer: Any, scales: Mapping[str, float]) -> None:
    if scales:
        transformer.enable_lora()
        transformer.set_adapters(list(scales), list(scales.values()))
    elif getattr(transformer, "peft_config", {}):
        transformer.disable_lora()


def lora_told(arguments: GenerateArguments) -> dict[str, list[dict[str, Any]]]:
    """The sources of each expert, and at what weight."""
    return {
        name: [{"source": source, "scale": scale} for source, scale in choice]
        for (name, _, _), choice in zip(_EXPERTS, _choice(arguments), strict=True)
    }


@dataclass(frozen=True)
class _Weights:
    """What a file has for a transformer.

    Attributes:
        pairs: of each layer the two factors and alpha, by which their product is scaled over the rank.
        differences: what is added to a parameter, and at what weight of its own.
    """

    pairs: dict[str, tuple[Tensor, Tensor, float]]
    differences: list[tuple[nn.Parameter, Tensor, float]]


def _fitting(file: LoraFile, tensors: Mapping[str, Tensor], transformer: nn.Module, what: str) -> _Weights:
    """The weights by the layers that they change.

    Raises:
        ValueError: some have no layer, another shape than it, or no counterpart.
    """
    names, found = LayerNames.of(transformer), dict[str, dict[str, str]]()
    for name in tensors:
        key = read_key(name)
        layer = None if key is None else names.find(key)
        if key is not None and layer is not None:
            found.setdefault(layer, {}).setdefault(key.how, name)
    weights, taken = _Weights({}, []), set[str]()
    for layer, by_kind in found.items():
        held = {kind: tensors[name] for kind, name in by_kind.items()}
        factors = _factors(_layer(transformer, layer), held)
        alpha = 0.0
        if factors is not None:
            rank = factors[0].shape[0]
            alpha = float(held[ALPHA]) if ALPHA in held else file.alpha_of(layer, rank)
            weights.pairs[layer] = (*factors, alpha)
            taken |= {by_kind[kind] for kind in (DOWN, UP, ALPHA) if kind in by_kind}
            alpha /= rank
        for kind, own in ((WEIGHT, 1.0), (BIAS, 1.0), (MODULATION, 1.0), (UP_BIAS, alpha)):
            place = _parameter(transformer, layer, kind)
            if own and kind in held and place is not None and place.shape == held[kind].shape:
                weights.differences.append((place, held[kind], own))
                taken.add(by_kind[kind])
    misfits = [name for name in tensors if name not in taken]
    if misfits or not tensors:
        some = ", ".join(misfits[:3]) + (", …" if len(misfits) > 3 else "")
        raise ValueError(
            f"has {len(tensors)} weights, of which {len(taken)} fit the {what}{', and not ' * bool(some)}{some}; give LoRA "
            "weights that were made for this model"
        )
    return weights


def _factors(layer: nn.Module | None, held: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Both factors, if they are of the layer's shape and of one rank."""
    if not isinstance(layer, nn.Linear | nn.Conv3d) or DOWN not in held or UP not in held:
        return None
    down, up, shape = held[DOWN], held[UP], layer.weight.shape
    ones = (1,) * (len(shape) - 2)
    fits = down.shape[1:] == shape[1:] and up.shape == (shape[0], down.shape[0], *ones)
    return (down.to(layer.weight.dtype), up.to(layer.weight.dtype)) if fits else None


def _layer(transformer: nn.Module, name: str) -> nn.Module | None:
    """The layer itself, if peft has wrapped it; None where the name is a parameter's."""
    try:
        layer = transformer.get_submodule(name)
    except AttributeError:
        return None
    return getattr(layer, "base_layer", layer)


def _parameter(transformer: nn.Module, name: str, kind: str) -> nn.Parameter | None:
    """What a difference is added to: `weight` or `bias` of a layer, or the lone parameter of that name."""
    layer = _layer(transformer, name)
    if layer is None:
        return transformer.get_parameter(name)
    found = getattr(layer, BIAS if kind in (BIAS, UP_BIAS) else WEIGHT, None)
    return found if isinstance(found, nn.Parameter) else None


@torch.no_grad()
def _put(transformer: Any, weights: _Weights, adapter: str, scale: float, pipe: Any) -> None:
    pairs = weights.pairs
    if pairs:
        state = {f"{layer}.lora_{x}.weight": pair[i] for layer, pair in pairs.items() for i, x in enumerate("AB")}
        ranks = {layer: down.shape[0] for layer, (down, _, _) in pairs.items()}
        alphas = {layer: alpha for layer, (_, _, alpha) in pairs.items()}
        (rank, _), (alpha, _) = (Counter(every.values()).most_common(1)[0] for every in (ranks, alphas))
        transformer.load_lora_adapter(
            state,
            prefix=None,
            adapter_name=adapter,
            low_cpu_mem_usage=True,
            _pipeline=pipe,
            metadata={
                "r": rank,
                "lora_alpha": alpha,
                "rank_pattern": {f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank},
                "alpha_pattern": {f"^{re.escape(layer)}": a for layer, a in alphas.items() if a != alpha},
                "target_modules": list(pairs),
            },
        )
    # In float32, and at once for all videos: what they change has no place for a second value.
    for parameter, difference, own in weights.differences:
        parameter.add_(difference.to(parameter.device, torch.float32) * (scale * own))


def _names(name: str, source: str) -> Iterable[str]:
    """The names of the weights in a source, of kinds that can be applied."""
    try:
        names = find_lora(source).names()
        has_differences(names)  # refuses kinds that cannot be applied
    except ValueError as error:
        raise ValueError(f"{flag_of(name)} {source or repr(source)} {error}") from error
    return names


def _choice(arguments: GenerateArguments) -> tuple[Any, ...]:
    return tuple(
        tuple(zip(getattr(arguments, name), _scales(arguments, name, scale), strict=True))
        for name, scale, _ in _EXPERTS
    )


def _scales(arguments: GenerateArguments, name: str, scale_name: str) -> tuple[float, ...]:
    """One weight a source."""
    sources, scales = getattr(arguments, name), getattr(arguments, scale_name) or (1.0,)
    return tuple(scales) if len(scales) == len(sources) else tuple(scales) * len(sources)


def _adapter(source: str) -> str:
    """peft allows no dots."""
    return "lora_" + hashlib.sha256(source.encode()).hexdigest()[:12]
