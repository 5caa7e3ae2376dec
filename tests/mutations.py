"""Would the tests notice? Breaks the source one line at a time and runs the tests that should fail.

Not collected by pytest. From the root of the repository, in an environment with the `dev` extra:

    python tests/mutations.py                 # all of them, two at a time; some minutes
    python tests/mutations.py --only ring     # those whose description or file contains "ring"
    python tests/mutations.py --workers 1

Each mutation replaces one piece of text, which must occur exactly once in its file, in a temporary copy of the tree;
its test files then run there with `-x`. `killed` means that a test failed (or a rank hung, and the time limit ended
it); `SURVIVED` that all passed: a test is missing. `stale` means that the source has changed and the mutation must be
rewritten. The exit status is 1 unless every mutation was killed. A new rule of the code deserves a mutation here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 400
# Of all test files at once, before anything is broken.
WHOLE_LIMIT_S = 1800


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `sp_sparse/<file>`, or in `file` where that begins with `launch/`; `tests` are names of test
    files without `test_` and `.py`, such as `ring` or `serving/api`."""

    what: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    # The default model
    Mutation(
        "mini starts with a prompt whose words it does not know",
        "generate/defaults.py",
        "12, 3.0, MINI_PROMPT)",
        "12, 3.0)",
        "generate",
    ),
    Mutation(
        "the default model has the blocks of another",
        "generate/arguments.py",
        'given.get("model", MINI)',
        'given.get("model", "tiny")',
        "generate",
    ),
    # A mesh that chooses itself, and masks that are recorded
    Mutation(
        "a degree that a flag gives is chosen over",
        "generate/auto_mesh.py",
        "if fits and all(getattr(mesh, name) == degree for name, degree in situation.fixed):",
        "if fits:",
        "auto_mesh",
    ),
    Mutation(
        "a long ring is preferred to Ulysses across nodes",
        "generate/auto_mesh.py",
        "        mesh.ring_degree <= _LONG_RING,\n",
        "",
        "auto_mesh",
    ),
    Mutation(
        "a flag that gives a degree of 1 is not told from none",
        "generate/arguments.py",
        "sparse=sparse_config(given), given_degrees=given_degrees(given))",
        "sparse=sparse_config(given))",
        "auto_mesh",
    ),
    Mutation(
        "the masks of ring ranks are put together as heads",
        "generate/recorded_masks.py",
        "for kept, _ in group]) for group in groups], axis=1)",
        "for kept, _ in group], axis=1) for group in groups])",
        "recorded_masks",
    ),
    # What waits in the CPU's memory, and what is told where memory runs out
    Mutation(
        "the part before stays when the next one comes",
        "generate/offload.py",
        "        self.end()\n        part.come()\n",
        "        part.come()\n",
        "offload",
    ),
    Mutation(
        "a part counts as there before it has come",
        "generate/offload.py",
        "        part.come()\n        self._at_work = part\n",
        "        self._at_work = part\n        part.come()\n",
        "offload",
    ),
    Mutation(
        "parts stay on the device while the VAE works",
        "generate/video.py",
        "    try:\n        yield\n    finally:\n        send_home(pipe)\n",
        "    yield\n",
        "offload",
    ),
    Mutation(
        "a copy forgets the strides of its tensor",
        "generate/offload.py",
        "        if _is_dense(tensor):\n",
        "        if False:\n",
        "offload",
    ),
    Mutation(
        "copies are not packed",
        "generate/offload.py",
        "max(size, min(_CHUNK_BYTES, left))",
        "size",
        "offload",
    ),
    Mutation(
        "blocks are compiled with their hooks",
        "generate/attach.py",
        'if arguments.compile and arguments.offload != "layers":',
        "if arguments.compile:",
        "offload",
    ),
    Mutation(
        "the text encoder keeps all its blocks on the device",
        "generate/offload.py",
        "stack = module if name in _TRANSFORMERS else module.encoder",
        "stack = module",
        "offload",
    ),
    Mutation(
        "the image encoder stays on the device while the VAE encodes",
        "generate/offload.py",
        "        if self.name == _IMAGE_ENCODER:\n            self.turns.end()",
        "        if self.name == _IMAGE_ENCODER:\n            pass",
        "offload",
    ),
    Mutation(
        "what is beside the blocks is left to diffusers, too",
        "generate/offload.py",
        "    beside.modules, beside.parameters, beside.buffers = [], [], []",
        "    beside",
        "offload",
    ),
    Mutation(
        "inputs go where a part waits",
        "generate/offload.py",
        "self.name, self.turns, self.execution_device = name, turns, device",
        "self.name, self.turns, self.execution_device = name, turns, torch.empty(0, device=device).device",
        "offload",
    ),
    Mutation(
        "the tensors of quantised weights stay where they are",
        "generate/offload.py",
        "            waiting += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]\n",
        "            pass\n",
        "offload",
    ),
    Mutation(
        "a remedy is told that would be refused",
        "generate/memory.py",
        "        except ValueError:\n            return False\n",
        "        except ValueError:\n            return True\n",
        "memory",
    ),
    Mutation(
        "a flag is told that is given",
        "generate/memory.py",
        "getattr(options, name) not in values",
        "False",
        "memory",
    ),
    Mutation(
        "a lost rank is taken for memory that ran out",
        "generate/memory.py",
        " or is_lost_rank(error):",
        ":",
        "memory",
    ),
    # Weights that are dealt out, rounded, and brought to their place
    Mutation(
        "a failed rank gathers no weights for the others where its half has no other ranks",
        "integrations/diffusers/forward_end.py",
        "elif error is not None and self._dealt_out and not self._go_through(error):",
        "elif False:",
        "fsdp",
    ),
    Mutation(
        "a failed rank gathers the next block later than the others",
        "integrations/diffusers/forward_end.py",
        "blocks[number : number + 2]",
        "blocks[number : number + 1]",
        "fsdp",
    ),
    Mutation(
        "the block in which a rank failed is not gathered again",
        "integrations/diffusers/forward_end.py",
        "                settle(model, blocks)",
        "                pass",
        "fsdp",
    ),
    Mutation(
        "a half that fails before its forward leaves the other in its gathers",
        "integrations/diffusers/cfg.py",
        "if error is not None and step is not None and not step.begun:",
        "if False:",
        "fsdp",
    ),
    Mutation(
        "what stands around the blocks is dealt out, too",
        "generate/fsdp.py",
        "ignored_params=others if whole else None",
        "ignored_params=None",
        "fsdp",
    ),
    Mutation(
        "FSDP2's order of blocks grows with every forward",
        "generate/fsdp.py",
        "    model.register_forward_hook(lambda *_: settle(model, blocks))\n",
        "",
        "fsdp",
    ),
    Mutation(
        "one rank deals out its weights",
        "generate/fsdp.py",
        "if arguments.ranks_wanted == 1:",
        "if False:",
        "fsdp",
    ),
    Mutation(
        "a step cache with weights that are dealt out",
        "integrations/diffusers/caches.py",
        "if is_sharded(self._model):",
        "if False:",
        "fsdp",
    ),
    Mutation(
        "LoRA weights are left behind by float8",
        "generate/placement.py",
        "            _fuse_lora(module)\n",
        "            pass\n",
        "quantize",
    ),
    Mutation(
        "weights that stay in float32 are cast",
        "generate/placement.py",
        "torch.float32 if kept else self.dtype",
        "self.dtype",
        "placement",
    ),
    Mutation(
        "a whole transformer is cast while it is loaded",
        "generate/mapped.py",
        '_stored_dtype(folder / name) or dtypes["default"]',
        "torch.bfloat16",
        "placement",
    ),
    Mutation(
        "a layer that has no float8 product",
        "generate/quantize.py",
        "if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:",
        "if False:",
        "quantize",
    ),
    Mutation(
        "float8 on a CPU",
        "generate/quantize.py",
        'if device.type != "cuda":',
        "if False:",
        "quantize",
    ),
    Mutation(
        "videos in float8 are compared with others",
        "fidelity/job.py",
        'if base.quantization != "none":',
        "if False:",
        "quantize",
    ),
    # Tiles of the VAE, and who decodes them
    Mutation(
        "a tile is blended with a neighbour that is not",
        "generate/tiles.py",
        "        blended[tile.row, tile.column] = pixels\n",
        "        blended[tile.row, tile.column] = pixels.clone() * 1.01\n",
        "decode",
    ),
    Mutation(
        "only the first column is blended downwards",
        "generate/tiles.py",
        "        if tile.row:",
        "        if tile.row and not tile.column:",
        "decode",
    ),
    Mutation("pixels are not clamped", "generate/tiles.py", ".clamp_(-1.0, 1.0)", ".clamp_(-9.0, 9.0)", "decode"),
    Mutation(
        "the overlap of patches is not halved",
        "generate/tiles.py",
        "overlap_down = vae.tile_sample_min_height // patch - step_down",
        "overlap_down = vae.tile_sample_min_height - patch * step_down",
        "decode",
    ),
    Mutation(
        "each latent frame is decoded as the first",
        "generate/tiles.py",
        "first_chunk=number == 0",
        "first_chunk=True",
        "decode",
    ),
    Mutation(
        "a failed tile leaves its memory",
        "generate/tiles.py",
        "    finally:\n        vae.clear_cache()",
        "    finally:\n        pass",
        "decode",
    ),
    Mutation(
        "a decoder of fewer frames is let through",
        "generate/tiles.py",
        "filled != out.shape[2]):",
        "False):",
        "decode",
    ),
    Mutation(
        "one tile is no tile",
        "generate/tiles.py",
        "height <= most_high and width <= most_wide",
        "height < most_high and width < most_wide",
        "decode",
    ),
    Mutation(
        "tiles that do not fit latents", "generate/tiles.py", "if getattr(vae, name) % ratio:", "if False:", "decode"
    ),
    Mutation(
        "only methods are looked for", "generate/tiles.py", 'if not hasattr(vae, "_feat_map"):', "if False:", "decode"
    ),
    Mutation(
        "another diffusers is found after loading",
        "generate/checks.py",
        "    if arguments.vae_tiling:\n        check_tiling()\n",
        "",
        "decode",
    ),
    Mutation(
        "tiles are not asked for", "generate/models.py", "    if arguments.vae_tiling:\n", "    if False:\n", "decode"
    ),
    Mutation(
        "rank 0 decodes alone",
        "generate/decode.py",
        "self._shared = ranks.world > 1 and bool(self._tiles)",
        "self._shared = False",
        "decode",
    ),
    Mutation(
        "a rank with fewer tiles says less",
        "generate/decode.py",
        "        self._idle(self.parts - len(share) * latents.shape[2], on_part)\n",
        "",
        "decode",
    ),
    Mutation(
        "the last tiles go back and forth too",
        "generate/decode.py",
        "back = turn % 2 == 1 and (turn + 1) * ranks <= len(tiles)",
        "back = turn % 2 == 1",
        "decode",
    ),
    Mutation(
        "tiles are dealt as they come",
        "generate/decode.py",
        "sorted(tiles, key=lambda tile: -tile.area)",
        "sorted(tiles, key=lambda tile: tile.area)",
        "decode",
    ),
    Mutation(
        "the frames that are decoded are not told",
        "generate/decode.py",
        "        on_frame()\n\n    # The VAE",
        "        pass\n\n    # The VAE",
        "decode",
    ),
    Mutation(
        "a rank that fails is not heard",
        "generate/video.py",
        "self.ranks.together(lambda: self._decode(decoding, bar.update))",
        "self._decode(decoding, bar.update)",
        "decode",
    ),
    # Settings of generate and the server
    Mutation(
        "any number of frames is let through",
        "generate/fits.py",
        "    if (frames - 1) % multiple:",
        "    if False:",
        "settings",
    ),
    Mutation(
        "any side is let through",
        "generate/fits.py",
        "    if pixels % multiple:",
        "    if False:",
        "settings",
    ),
    Mutation(
        "the nearest side below is told alone",
        "generate/fits.py",
        'return f"{below} or {above}" if below > 0 else str(above)',
        "return str(below)",
        "settings",
    ),
    Mutation(
        "a second guidance beside guidance that is off",
        "generate/fits.py",
        "    if scale is not None and scale <= 1:",
        "    if scale is not None and scale < 1:",
        "settings",
    ),
    Mutation(
        "a second guidance without a second expert",
        "generate/fits.py",
        "    if experts < 2:",
        "    if experts < 1:",
        "settings",
    ),
    Mutation(
        "a picture's aspect upside down",
        "generate/fits.py",
        "aspect = picture[1] / picture[0]",
        "aspect = picture[0] / picture[1]",
        "settings",
    ),
    Mutation(
        "sides of a picture rounded up",
        "generate/fits.py",
        "max(round(math.sqrt(area)) // multiple, 1) * multiple",
        "(round(math.sqrt(area)) // multiple + 1) * multiple",
        "settings",
    ),
    Mutation(
        "a picture is stretched",
        "generate/start.py",
        "ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)",
        "image.resize((width, height), Image.Resampling.LANCZOS)",
        "settings",
    ),
    Mutation(
        "a photo is not turned",
        "generate/sources.py",
        'return ImageOps.exif_transpose(image).convert("RGB")',
        'return image.convert("RGB")',
        "settings",
    ),
    Mutation(
        "the report counts videos instead of steps",
        "generate/video.py",
        '"num_inference_steps": len(video.step_seconds[-1])',
        '"num_inference_steps": len(video.step_seconds)',
        "settings",
    ),
    Mutation(
        "the report's shift is not the scheduler's",
        "generate/video.py",
        '"flow_shift": shift_of(pipe.scheduler)',
        '"flow_shift": arguments.flow_shift',
        "settings",
    ),
    Mutation(
        "the multiple is not the patch's",
        "generate/models.py",
        "scale * side for side",
        "scale * 2 for side",
        "settings",
    ),
    Mutation(
        "frames' multiple is not the VAE's",
        "generate/models.py",
        'temporal_multiple=vae.get("scale_factor_temporal", 4)',
        "temporal_multiple=4",
        "settings",
    ),
    Mutation(
        "every model has two experts",
        "generate/models.py",
        "experts, scale = 2 if has_second else 1,",
        "experts, scale = 2,",
        "settings",
    ),
    Mutation(
        "a shift that nothing uses",
        "generate/models.py",
        'return "flow_shift" if config.get("use_flow_sigmas") else None',
        'return "flow_shift"',
        "settings",
    ),
    Mutation(
        "sizes beyond the model's places",
        "generate/asked.py",
        "pixels > (most := model.positions * model.spatial_multiple)",
        "pixels > (most := 2 * model.positions * model.spatial_multiple)",
        "settings",
    ),
    Mutation(
        "LoRA weights of which some do not fit",
        "generate/lora.py",
        "    if misfits or not tensors:",
        "    if False:",
        "lora_formats",
    ),
    Mutation(
        "alpha of LoRA weights is not read",
        "generate/lora.py",
        "float(held[ALPHA]) if ALPHA in held",
        "float(rank) if ALPHA in held",
        "lora_formats",
    ),
    Mutation(
        "the alpha that peft keeps beside its weights is not read",
        "generate/lora_files.py",
        'self.config.get("lora_alpha", rank)',
        "rank",
        "lora_formats",
    ),
    Mutation(
        "only the last LoRA weights count",
        "generate/lora.py",
        "transformer.set_adapters(list(scales), list(scales.values()))",
        "transformer.set_adapters(list(scales)[-1:], list(scales.values())[-1:])",
        "settings",
    ),
    Mutation(
        "differences are added without the weight of their file",
        "generate/lora.py",
        "* (scale * own))",
        "* own)",
        "lora_formats",
    ),
    Mutation(
        "norms that swap their names in Wan's code",
        "generate/lora_names.py",
        "if name and any(True for _ in layer.parameters())]",
        "if name]",
        "lora_formats",
    ),
    Mutation(
        "all lines have the LoRA weights of the job",
        "generate/video.py",
        "        if self.own_lora:",
        "        if False:",
        "lora_formats",
    ),
    Mutation(
        "a line without LoRA weights keeps those of the line before",
        "generate/lora.py",
        "        transformer.disable_lora()\n",
        "        pass\n",
        "lora_formats",
    ),
    Mutation(
        "a LoRA file that is not there",
        "generate/lora_files.py",
        "    if hub is None or (",
        "    if hub is None and (",
        "settings",
    ),
    Mutation(
        "euler's steps are shifted twice",
        "generate/schedulers.py",
        '            given["sigmas"] = ',
        '            given["mu"] = None; unused = ',
        "few_steps",
    ),
    Mutation(
        "NaN is a number",
        "flags.py",
        "if not is_number or not math.isfinite(value):",
        "if not is_number:",
        "settings",
    ),
    Mutation(
        "no largest number",
        "flags.py",
        "    if abs(value) > most:",
        "    if False:",
        "settings",
    ),
    Mutation(
        "sparse flags without a backend",
        "generate/arguments.py",
        'if names and not {f"{FLAG_PREFIX}backend", f"{FLAG_PREFIX}preset"} & set(names):',
        "if False:",
        "settings",
    ),
    Mutation(
        "the card's multiple is not the model's",
        "serve/wan.py",
        "pixel_multiple=model.spatial_multiple",
        "pixel_multiple=16",
        "settings",
    ),
    Mutation(
        "the card has two experts",
        "serve/wan.py",
        "two_experts=model.experts > 1",
        "two_experts=True",
        "settings",
    ),
    Mutation(
        "the server does not follow a picture",
        "serve/requests.py",
        "if picture is not None and (width is None or height is None):",
        "if False:",
        "settings",
    ),
    # Ring
    Mutation(
        "hop direction (rank + hop)",
        "parallel/ring.py",
        "owner = (rank - hop) % ranks",
        "owner = (rank + hop) % ranks",
        "ring",
    ),
    Mutation(
        "hop direction, seen by the whole layer only",
        "parallel/ring.py",
        "owner = (rank - hop) % ranks",
        "owner = (rank + hop) % ranks",
        "mesh_invariant",
    ),
    Mutation(
        "shards sent the other way round",
        "parallel/ring.py",
        "sent[(rank + 1) % ranks]",
        "sent[(rank - 1) % ranks]",
        "ring",
    ),
    Mutation("ring: missing wait", "parallel/ring.py", "flying[hop - 1].join()", "pass", "ring"),
    Mutation("ring: one receive buffer", "parallel/ring.py", "spare[exchange % buffers, :,", "spare[0, :,", "ring"),
    Mutation("ring: a buffer is filled while attended", "parallel/ring.py", "max(hop - 1, 0)", "hop", "ring"),
    Mutation("ring: exchanges wait for attention", "parallel/ring.py", "max(hop - 1, 0) + buffers", "hop + 1", "ring"),
    Mutation("ring: as many buffers as shards", "parallel/ring.py", "max(3, ranks // 2)", "ranks", "ring"),
    Mutation(
        "ring: left with shards arriving", "parallel/ring.py", "            pending.join()", "            pass", "ring"
    ),
    Mutation(
        "ring: merges in bf16",
        "parallel/merge.py",
        "dtype=None if self._remaining else self._dtype",
        "dtype=self._dtype",
        "ring",
    ),
    Mutation(
        "mask columns of the wrong hop",
        "parallel/strategy.py",
        "else columns[owner]",
        "else columns[(2 * self.mesh.ring_rank - owner) % len(columns)]",
        "mesh_invariant",
    ),
    # Merge
    Mutation(
        "merge weights swapped",
        "parallel/merge.py",
        "for side in (lse, new_lse)",
        "for side in (new_lse, lse)",
        "merge",
    ),
    Mutation(
        "merge unsafe where neither side saw a key",
        "parallel/merge.py",
        'floor = torch.where(total == float("-inf"), 0.0, total)',
        "floor = total",
        "merge",
    ),
    Mutation("merge in log2", "parallel/merge.py", "torch.logaddexp(lse", "torch.logaddexp2(lse", "merge"),
    # What a mask leaves out
    Mutation(
        "the linear term over every ring shard's own keys alone",
        "attention.py",
        "self.strategy.sum_shards(means.slope)",
        "means.slope",
        "mesh_invariant",
    ),
    Mutation(
        "means of the own shard alone",
        "attention.py",
        "tokens = self.strategy.gather_blocks(means.tokens, shards, block)",
        "tokens = means.tokens",
        "mesh_invariant",
    ),
    Mutation(
        "keys that the caller gathered summed over the ring",
        "parallel/all_gather_kv.py",
        '''        """Likewise."""
        return x
''',
        '''        """Likewise."""
        return super().sum_shards(x)
''',
        "remainder",
    ),
    Mutation(
        "a remainder with a kernel without LSE",
        "attention.py",
        'elif config.remainder != "drop":',
        "elif False:",
        "remainder",
    ),
    Mutation(
        "auto takes a kernel without LSE for a remainder",
        "attention.py",
        'needs_lse = self.mesh.ring_degree > 1 or config.remainder != "drop"',
        "needs_lse = self.mesh.ring_degree > 1",
        "remainder",
    ),
    Mutation(
        "a short last block counts as a whole one",
        "remainder/attend.py",
        "log_tokens[-1] = math.log(mask.last_key_tokens)",
        "pass",
        "remainder",
    ),
    Mutation(
        "the means of kept blocks count too",
        "remainder/attend.py",
        '.masked_fill_(chosen, float("-inf"))',
        "",
        "remainder",
    ),
    Mutation(
        "the linear term without its scale",
        "remainder/attend.py",
        "means.slope * (scale / mask.key_length)",
        "means.slope / mask.key_length",
        "remainder",
    ),
    Mutation(
        "a row that leaves nothing out gets a linear term",
        "remainder/attend.py",
        '.masked_fill((total == float("-inf")).unsqueeze(-1), 0.0)',
        "",
        "remainder",
    ),
    Mutation(
        "keys are not centred",
        "remainder/means.py",
        "k - means[0], v)",
        "k, v)",
        "remainder",
    ),
    Mutation(
        "a slice of query blocks starts one late",
        "mask.py",
        "length = min(last * size, self.query_length) - first * size",
        "length = self.query_length - first * size",
        "remainder",
    ),
    Mutation(
        "Triton: a short last block counts as a whole one",
        "remainder/triton_attend.py",
        "bias[..., blocks - 1] = math.log2(mask.last_key_tokens)",
        "pass",
        "remainder",
    ),
    Mutation(
        "Triton: rows that were offered kept blocks alone",
        "remainder/triton_attend.py",
        'floor = tl.where(new_top == float("-inf"), 0.0, new_top)',
        "floor = new_top",
        "remainder",
    ),
    Mutation(
        "Triton: the biases of the first query block",
        "remainder/triton_attend.py",
        "(part // PER_BLOCK).to(tl.int64) * bias_row",
        "(part * 0).to(tl.int64) * bias_row",
        "remainder",
    ),
    Mutation(
        "Triton: blocks past the last are stand-ins",
        "remainder/triton_attend.py",
        """        float("-inf"),
        dtype""",
        """        0.0,
        dtype""",
        "remainder",
    ),
    Mutation(
        "Triton: outputs overflow",
        "remainder/triton_attend.py",
        "merged = tl.minimum(tl.maximum(merged, -most), most)",
        "merged = merged",
        "remainder",
    ),
    Mutation(
        "Triton: the last chunk of blocks is left out",
        "remainder/triton_means.py",
        "tl.minimum(share * (chunk + 1), blocks)",
        "tl.minimum(share * (chunk + 1), blocks - 1)",
        "remainder",
    ),
    Mutation(
        "Triton: means of short blocks over whole ones",
        "remainder/triton_means.py",
        "count = tl.minimum(length - first, BLOCK).to(tl.float32)",
        "count = BLOCK * 1.0",
        "remainder",
    ),
    # Ranks
    Mutation(
        "ulysses_rank for ring_rank in the tokens of a group",
        "parallel/strategy.py",
        "first = self.mesh.ring_rank * self",
        "first = self.mesh.ulysses_rank * self",
        "shards",
    ),
    Mutation(
        "ulysses_rank for ring_rank in the static blocks",
        "attention.py",
        "query_range = shards.range_of(self.mesh.ring_rank)",
        "query_range = shards.range_of(self.mesh.ulysses_rank)",
        "mesh_invariant",
    ),
    Mutation(
        "sequence rank with ring fastest",
        "parallel/mesh.py",
        "return self.ring_rank * self.ulysses_degree + self.ulysses_rank",
        "return self.ulysses_rank * self.ring_degree + self.ring_rank",
        "mesh_errors",
    ),
    Mutation(
        "ranks may differ in arguments",
        "parallel/agreement.py",
        "if len(set(texts.values())) > 1",
        "if False",
        "mesh_errors agreement",
    ),
    Mutation(
        "a failure stays on its rank",
        "parallel/agreement.py",
        "    if not failures:",
        "    if error is None:",
        "agreement",
    ),
    Mutation(
        "only the first group is asked",
        "parallel/agreement.py",
        "    for group in groups:\n        parts: list[Any]",
        "    for group in groups[:1]:\n        parts: list[Any]",
        "agreement",
    ),
    Mutation("ranks may differ in degrees", "parallel/mesh.py", "if len(set(asked)) > 1:", "if False:", "mesh_errors"),
    Mutation(
        "environment not restored",
        "parallel/mesh.py",
        "            os.environ.pop(name, None)",
        "            pass",
        "mesh_errors",
    ),
    Mutation(
        "own checks before the ranks are compared",
        "attention.py",
        'mesh.check_same("sparse attention settings", arguments)',
        'config.backend == "none" or mesh.check_same("sparse attention settings", arguments)',
        "mesh_errors",
    ),
    Mutation(
        "device mesh with unsorted ranks taken",
        "parallel/mesh.py",
        "if size > 1 and bool(",
        "if False and bool(",
        "mesh_errors",
    ),
    # What ranks agree on in diffusers
    Mutation(
        "inputs of a forward are each rank's own",
        "integrations/diffusers/agree.py",
        "            agreed[name] = x\n",
        "            agreed[name] = tensors[name]\n",
        "agreement_diffusers",
    ),
    Mutation(
        "second guidance branch with the latents of its own half",
        "integrations/diffusers/agree.py",
        "if kept.is_for(x) and (kept.by_all or second)), None)",
        "if kept.is_for(x) and not second), None)",
        "agreement_diffusers agreement_cost",
    ),
    Mutation(
        "settings of a forward are not compared",
        "integrations/diffusers/agree.py",
        "                **settings,\n",
        "",
        "agreement_diffusers",
    ),
    Mutation(
        "shapes of the inputs are not compared",
        "integrations/diffusers/agree.py",
        "                **shapes,\n",
        "",
        "agreement_diffusers",
    ),
    Mutation(
        "latents that the loop keeps may differ",
        "integrations/diffusers/agree.py",
        "    if not apart > _ROUNDING * size:",
        "    if True:",
        "agreement_diffusers",
    ),
    Mutation(
        "the scheduler's sample is each rank's own",
        "integrations/diffusers/agree.py",
        "return (from_first(out[0], self._groups), *out[1:])",
        "return out",
        "agreement_diffusers",
    ),
    Mutation(
        "a scheduler that is put in later is not watched",
        "integrations/diffusers/agree.py",
        "        scheduler = self._pipeline.scheduler\n        if not self._groups or",
        "        scheduler = self.__dict__.setdefault('first', self._pipeline.scheduler)\n        if not self._groups or",
        "agreement_diffusers",
    ),
    Mutation(
        "steps that video-to-video leaves out are counted",
        "integrations/diffusers/position.py",
        "return place - self._begin, len(self._values) - self._begin",
        "return place, len(self._values)",
        "agreement_diffusers",
    ),
    Mutation(
        "the step of a scheduler that the loop does not step",
        "integrations/diffusers/position.py",
        "if place is None or place >= len(self._values) or self._values[place] != now:",
        "if place is None or place >= len(self._values):",
        "agreement_diffusers",
    ),
    Mutation(
        "first-block cache decides from a rank's own tokens",
        "integrations/diffusers/caches.py",
        "            dist.all_reduce(sums, group=group)",
        "            pass",
        "agreement_diffusers",
    ),
    Mutation(
        "unknown caches run",
        "integrations/diffusers/caches.py",
        "if kind not in known:",
        "if False:",
        "agreement_diffusers",
    ),
    Mutation(
        "a cache that mixes the branches runs on halves",
        "integrations/diffusers/caches.py",
        "if kind == _PYRAMID and self._halves:",
        "if False:",
        "agreement_diffusers",
    ),
    Mutation(
        "a layer's calls are not compared",
        "attention.py",
        "        if self._check_calls:",
        "        if False:",
        "agreement",
    ),
    Mutation(
        "the noise of a scheduler's steps is not seeded",
        "generate/video.py",
        "partial(scheduler.step, generator=generator)",
        "partial(scheduler.step)",
        "agreement_diffusers",
    ),
    Mutation(
        "a lost rank is told in the backend's words",
        "parallel/agreement.py",
        "        if isinstance(error, LostRankError) or not is_lost_rank(error):",
        "        if True:",
        "agreement",
    ),
    # Shards
    Mutation(
        "realign off by one token",
        "parallel/shards.py",
        "(edge + block // 2) // block * block,",
        "(edge + block // 2) // block * block + 1,",
        "shards",
    ),
    Mutation(
        "realign rounds edges down", "parallel/shards.py", "(edge + block // 2) // block", "edge // block", "shards"
    ),
    Mutation(
        "realign keeps the wrong tokens",
        "parallel/collectives.py",
        "x[:, keep[0] - held[0] : keep[1] - held[0]]",
        "x[:, : keep[1] - keep[0]]",
        "shards",
    ),
    Mutation("realign: missing wait", "parallel/collectives.py", "        work.wait()", "        pass", "shards"),
    Mutation(
        "realign: padding not 0",
        "parallel/collectives.py",
        "ordered.append(x.new_zeros(",
        "ordered.append(x.new_ones(",
        "shards",
    ),
    Mutation(
        "realign: pieces in order of arrival",
        "parallel/collectives.py",
        "for peer in sorted(parts)]",
        "for peer in parts]",
        "shards",
    ),
    Mutation(
        "padding realigned as if it were tokens",
        "parallel/shards.py",
        "        length = self.sequence_length\n",
        "        length = self.edges[-1]\n",
        "shards",
    ),
    Mutation(
        "ranges hold padding",
        "parallel/shards.py",
        "min(self.edges[rank + 1], self.sequence_length)",
        "self.edges[rank + 1]",
        "mesh_invariant",
    ),
    Mutation(
        "spare blocks all go to the last ring shard",
        "parallel/shards.py",
        "for count in split_evenly(blocks, ring_degree)",
        "for count in [blocks // ring_degree] * (ring_degree - 1) + [blocks]",
        "shards",
    ),
    Mutation(
        "gather_blocks: filler of short shards not trimmed",
        "parallel/collectives.py",
        "[part[:length] for part, length",
        "[part for part, length",
        "shards",
    ),
    # Ulysses
    Mutation(
        "heads split as if they divided",
        "parallel/ulysses.py",
        "firsts = (0, *accumulate(heads))\n    of_rank",
        "firsts = tuple(i * heads[-1] for i in range(len(heads)))\n    of_rank",
        "shards",
    ),
    Mutation(
        "heads split in the other order",
        "parallel/ulysses.py",
        "zip(send.split(sent), ranges, strict=True)",
        "zip(send.split(sent), ranges[::-1], strict=True)",
        "shards",
    ),
    Mutation(
        "Ulysses mixes batch and tokens",
        "parallel/ulysses.py",
        "self.arriving[:, :, i].transpose(0, 1) for",
        "self.arriving[:, :, i].reshape(self.arriving.shape[1], -1, *self.arriving.shape[3:]) for",
        "shards",
    ),
    Mutation(
        "Ulysses: what arrives is not waited for",
        "parallel/ulysses.py",
        "        self.pending.join()\n        return",
        "        return",
        "shards",
    ),
    Mutation(
        "Ulysses: what returns is not waited for",
        "parallel/strategy.py",
        "            scattering.finish()\n\n    def give_back",
        "            pass\n\n    def give_back",
        "shards",
    ),
    Mutation(
        "the next chunk's heads are those of this one",
        "parallel/strategy.py",
        "arriving = self._start_gather(chunk + 1)",
        "arriving = self._start_gather(chunk)",
        "mesh_invariant",
    ),
    Mutation(
        "gathered keys: the own shard is attended twice",
        "parallel/all_gather_kv.py",
        "own, mask = mask.cut_keys(first, last)",
        "own, _ = mask.cut_keys(first, last)",
        "mesh_invariant",
    ),
    Mutation(
        "the exchange is chosen by a rank's own memory",
        "parallel/kv_exchange.py",
        "min(memories) if len(memories) == len(told) else None",
        "_memory(device)",
        "kv_exchange",
    ),
    Mutation(
        "the exchange is chosen by a rank's own heads",
        "parallel/auto_kv.py",
        "max(self.heads(self.num_heads))",
        "like.shape[2]",
        "kv_exchange",
    ),
    Mutation(
        "gathered keys: missing wait",
        "parallel/all_gather_kv.py",
        "        work.wait()",
        "        pass",
        "mesh_invariant",
    ),
    Mutation(
        "cut keys: nothing closes up",
        "mask.py",
        "self.indices.gather(-1, (slots + skipped)",
        "self.indices.gather(-1, (slots + 0 * skipped)",
        "mask",
    ),
    # Mask
    Mutation("split keys not rebased", "mask.py", "source.long()) - first)", "source.long()))", "mask"),
    Mutation("split keys off by one block", "mask.py", "(ordered < edge)", "(ordered <= edge)", "mask"),
    Mutation(
        "split keys reads table tails",
        "mask.py",
        "ordered = torch.where(self._used(), self.indices, self.num_key_blocks)",
        "ordered = self.indices",
        "mask",
    ),
    Mutation(
        "density of whole blocks",
        "mask.py",
        "return (length - starts).clamp_(max=size)",
        "return torch.full_like(starts, size)",
        "mask",
    ),
    # Kernels
    Mutation(
        "key tail not masked",
        "kernels/reference.py",
        "valid = used.unsqueeze(-1) & (token < mask.key_length)",
        "valid = used.unsqueeze(-1) & (token >= 0)",
        "reference_kernel",
    ),
    Mutation(
        "table tails attended",
        "kernels/reference.py",
        "valid = used.unsqueeze(-1) & (token < mask.key_length)",
        "valid = token < mask.key_length",
        "reference_kernel",
    ),
    Mutation(
        "NaN of unattended blocks let through",
        "kernels/reference.py",
        ".masked_fill(~valid.unsqueeze(2), 0.0)",
        "",
        "reference_kernel",
    ),
    Mutation(
        "NaN for rows that attend nothing",
        "kernels/reference.py",
        "torch.where(lse.isinf(), 0.0, lse).unsqueeze(-1)",
        "lse.unsqueeze(-1)",
        "reference_kernel",
    ),
    Mutation(
        "LSE in log2",
        "kernels/reference.py",
        "return weights @ v, lse",
        "return weights @ v, lse / 0.6931471805599453",
        "reference_kernel",
    ),
    Mutation(
        "wrong head's keys",
        "kernels/reference.py",
        "head * mask.num_key_blocks",
        "head * mask.num_query_blocks",
        "reference_kernel",
    ),
    Mutation(
        "dense LSE in log2",
        "kernels/dense.py",
        "lses.append(lse)",
        "lses.append(lse / 0.6931471805599453)",
        "reference_kernel",
    ),
    Mutation(
        "silent dense fallback",
        "kernels/dense.py",
        "if mask is None else kernel(",
        "if True else kernel(",
        "mesh_invariant",
    ),
    Mutation(
        "kernel without LSE taken for ring",
        "attention.py",
        "if ring_degree > 1:\n        check",
        "if False:\n        check",
        "registry",
    ),
    # Selection
    Mutation(
        "ties to the higher block",
        "selection/topk.py",
        "(bits.long() << 32) - numbers",
        "(bits.long() << 32) + numbers",
        "selection",
    ),
    Mutation("-0.0 below 0.0", "selection/topk.py", "(scores + 0.0).view", "scores.view", "selection"),
    Mutation(
        "negative scores in the wrong order",
        "selection/topk.py",
        "bits = torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits)",
        "bits = bits + 0",
        "selection",
    ),
    Mutation(
        "share rounded down",
        "selection/topk.py",
        "math.ceil(density * num_key_blocks - 1e-9)",
        "int(density * num_key_blocks)",
        "selection",
    ),
    Mutation("share rounded up past whole blocks", "selection/topk.py", " - 1e-9", "", "selection"),
    Mutation(
        "table not ascending",
        "selection/topk.py",
        "chosen.sort(dim=-1).values.clamp_",
        "chosen.flip(-1).clamp_",
        "selection",
    ),
    Mutation(
        "more static blocks than the share are cut",
        "selection/topk.py",
        "return keep, max(keep, static.most)",
        "return keep, keep",
        "selection",
    ),
    Mutation(
        "diagonal offset",
        "selection/static.py",
        "starts // key_block - window",
        "starts // key_block + 1 - window",
        "selection",
    ),
    Mutation(
        "diagonal one block too wide",
        "selection/static.py",
        "(ends - 1) // key_block",
        "ends // key_block",
        "selection",
    ),
    Mutation(
        "first frame needs whole blocks",
        "selection/static.py",
        "np.logical_or.reduceat",
        "np.logical_and.reduceat",
        "selection",
    ),
    Mutation(
        "block means by floating-point sums",
        "selection/summaries.py",
        "return total * _reciprocal(count)",
        "return tokens.float().mean(2)",
        "selection",
    ),
    Mutation(
        "one exponent for all heads",
        "selection/summaries.py",
        "amax(dim=(2, 4), keepdim",
        "amax(dim=(2, 3, 4), keepdim",
        "selection",
    ),
    Mutation(
        "scores too wide to be exact", "selection/summaries.py", "SCORE_BITS = 14", "SCORE_BITS = 24", "selection"
    ),
    Mutation(
        "scores in fp32",
        "selection/summaries.py",
        "query.double() @ key.double().transpose(-1, -2)",
        "(query @ key.transpose(-1, -2)).double()",
        "selection",
    ),
    Mutation(
        "a row's masses in floating-point sums",
        "selection/subblock_scores.py",
        "weights = (exact_exp2(masses - most) * 2.0**WEIGHT_BITS).round_().to(torch.int64)",
        "weights = exact_exp2(masses - most) * 2.0**WEIGHT_BITS",
        "subblock",
    ),
    Mutation(
        "shares by the library's exp2",
        "selection/exact_log2.py",
        "    x = x.clamp(min=LEAST_POWER)\n    whole = x.floor()",
        "    return x.clamp(min=LEAST_POWER).exp2()\n    whole = x.floor()",
        "subblock selection_triton",
    ),
    Mutation(
        "the largest query part decides alone",
        "selection/subblock_scores.py",
        "shares = (masses - _log_totals(masses))",
        "shares = masses",
        "subblock",
    ),
    Mutation(
        "a short part counts as a full one",
        "selection/subblock_scores.py",
        "float(np.float32(math.log2(rest / part)))",
        "0.0",
        "subblock",
    ),
    Mutation(
        "empty parts count", "selection/subblock_scores.py", "logs[full:] = -math.inf", "logs[full:] = 0.0", "subblock"
    ),
    Mutation(
        "sizes of query parts forgotten",
        "selection/subblock_scores.py",
        " + row_sizes[part, :, None]",
        "",
        "subblock",
    ),
    Mutation(
        "each slice of queries is taken for the first",
        "selection/subblock.py",
        "first = PARTS * (rows.start or 0)",
        "first = 0",
        "subblock",
    ),
    Mutation(
        "the temperature is that of natural exponents",
        "selection/subblock_scores.py",
        "head_dim**-0.5 * math.log2(math.e)",
        "head_dim**-0.5",
        "subblock",
    ),
    Mutation(
        "slices of pairs of parts are not bounded",
        "selection/subblock_scores.py",
        "step = max(1, _BUDGET // max(1, batch * heads * columns * PARTS**2))",
        "step = max(1, rows)",
        "subblock",
    ),
    Mutation(
        "blocks without equal parts are let through",
        "selection/subblock.py",
        "if query % PARTS or key % PARTS:",
        "if query % PARTS and key % PARTS:",
        "subblock",
    ),
    Mutation(
        "Triton counts an empty part",
        "selection/triton_subblock.py",
        'tl.where(number == full, rest, float("-inf"))',
        "rest",
        "selection_triton",
    ),
    Mutation(
        "Triton weighs one part of keys twice",
        "selection/triton_subblock.py",
        "pair, block, 3, columns, full, rest, factor, HEAD_DIM",
        "pair, block, 2, columns, full, rest, factor, HEAD_DIM",
        "selection_triton",
    ),
    Mutation(
        "Triton takes the total of the first columns alone",
        "selection/triton_subblock.py",
        "        sums += tl.where(inside, weight, 0)",
        "        sums = tl.where(inside, weight, 0)",
        "selection_triton",
    ),
    Mutation(
        "a slice of scores selected by the static blocks of the first",
        "selection/topk.py",
        "static.rows[part], static.counts[part]",
        "static.rows[: part.stop - part.start], static.counts[: part.stop - part.start]",
        "surroundings",
    ),
    Mutation(
        "keys of the own ring shard alone are selected from",
        "attention.py",
        "keys = self.strategy.gather_blocks(keys, shards, self.config.block_size[1])",
        "pass",
        "selectors",
    ),
    Mutation(
        "plans are never dropped",
        "recent.py",
        "if len(self._values) > self._most:",
        "if False:",
        "surroundings",
    ),
    Mutation(
        "a window's table begins anywhere",
        "selection/static.py",
        "np.repeat(counts.cumsum() - counts, counts)",
        "np.repeat(counts.cumsum() - 1, counts)",
        "selection",
    ),
    Mutation("autocast reaches the reference kernel", "device.py", "enabled=False", "enabled=True", "surroundings"),
    # Ranks agree
    Mutation(
        "what one rank cannot load is its own affair",
        "attention.py",
        "        return together(action, groups)",
        "        return action()",
        "ranks_agree",
    ),
    Mutation(
        "auto looks at this rank alone",
        "attention.py",
        'if config.backend == "auto" else None',
        'if config.backend == "none" else None',
        "ranks_agree",
    ),
    Mutation(
        "a group of another size than its degree",
        "parallel/mesh.py",
        "if group is not None and dist.get_world_size(group) != degree:",
        "if False:",
        "ranks_agree",
    ),
    # Video, schedule, configuration
    Mutation(
        "tiles walked along height first",
        "video.py",
        "w // TILE[2], h // TILE[1], t",
        "h // TILE[1], w // TILE[2], t",
        "video",
    ),
    Mutation("Hilbert curve without Gray code", "video.py", "x[axis] ^= x[axis - 1]", "pass", "video"),
    Mutation(
        "quarter of the steps rounded down", "schedule.py", "math.ceil(num_steps / 4)", "num_steps // 4", "schedule"
    ),
    Mutation(
        "second expert's topk ignored", "config.py", "topk if self.topk_2 is None else self.topk_2", "topk", "config"
    ),
    # Fidelity
    Mutation(
        "the mass of a short query block counts padding",
        "fidelity/mass.py",
        "own = min(query_length - start, rows.shape[0] * query_block)",
        "own = rows.shape[0] * query_block",
        "fidelity_mass",
    ),
    Mutation(
        "keys of padding have mass",
        "fidelity/mass.py",
        "    scores[:, key_length:] = -math.inf",
        "    pass",
        "fidelity_mass",
    ),
    Mutation(
        "the true mass without its scale",
        "fidelity/mass.py",
        "scores *= query_scale * head_dim**-0.5",
        "scores *= query_scale",
        "fidelity_mass",
    ),
    Mutation(
        "the heads of the second Ulysses rank are taken for the first's",
        "fidelity/observe.py",
        "sum(heads[: layer.mesh.ulysses_rank])",
        "0",
        "fidelity_mass",
    ),
    Mutation(
        "a short query block counts as a whole one in what is covered",
        "fidelity/observe.py",
        "np.minimum(starts + block, last) - starts",
        "np.full_like(starts, block)",
        "fidelity_mass",
    ),
    Mutation(
        "videos that do not pair are compared",
        "fidelity/statistics.py",
        "if math.isfinite(a) and math.isfinite(b)}",
        "}",
        "fidelity_statistics",
    ),
    Mutation(
        "prompts weigh alike, however many seeds they have",
        "fidelity/statistics.py",
        "means = (draws @ sums) / (draws @ counts)",
        "means = (draws @ sums) / counts.sum()",
        "fidelity_statistics",
    ),
    Mutation(
        "frames are cut off to 8 bits",
        "fidelity/metrics.py",
        "(frames * 255).round()",
        "(frames * 255)",
        "fidelity_statistics",
    ),
    Mutation(
        "LPIPS takes what is from 0 to 1 for what is from -1 to 1",
        "fidelity/metrics.py",
        "normalize=True",
        "normalize=False",
        "fidelity_lpips",
    ),
    Mutation(
        "LPIPS is left out though its weights are there",
        "fidelity/metrics.py",
        'self._metrics["lpips"] =',
        "_ =",
        "fidelity_lpips",
    ),
    Mutation(
        "LPIPS of videos that are too small for it",
        "fidelity/metrics.py",
        "if side < _LPIPS_SIDE:",
        "if side < _LPIPS_SIDE - 1:",
        "fidelity_lpips",
    ),
    Mutation(
        "broken weights of LPIPS end one rank alone",
        "fidelity/job.py",
        "measurement = ranks.together(",
        "measurement = (lambda action: action())(",
        "fidelity_lpips",
    ),
    Mutation(
        "fidelity loads LoRA weights at weight 1 whatever their scale",
        "generate/lora.py",
        "getattr(arguments, name), getattr(arguments, scale_name) or (1.0,)",
        "getattr(arguments, name), (1.0,)",
        "fidelity",
    ),
    Mutation(
        "videos with another boundary of the experts go into one folder",
        "fidelity/job.py",
        "*(name for name in _SHARED_IF_GIVEN if values[name])",
        "",
        "fidelity",
    ),
    # Quality against density: what tables, plots and docs/quality.md tell
    Mutation(
        "a difference is the baseline's gain",
        "fidelity/statistics.py",
        "return {place: a - b for",
        "return {place: b - a for",
        "fidelity_statistics",
    ),
    Mutation(
        "the interval leaves out one end alone",
        "fidelity/statistics.py",
        "((1 - LEVEL) / 2, (1 + LEVEL) / 2)",
        "(0.0, LEVEL)",
        "fidelity_statistics",
    ),
    Mutation(
        "each prompt is drawn once, and no interval has a width",
        "fidelity/statistics.py",
        "size=RESAMPLES)",
        "size=RESAMPLES) ** 0",
        "fidelity_statistics",
    ),
    Mutation(
        "an interval above 0 alone is told from 0",
        "fidelity/statistics.py",
        "(self.low > 0.0 or self.high < 0.0)",
        "self.low > 0.0",
        "fidelity_statistics",
    ),
    Mutation(
        "the density where a curve first is good enough, though it falls again",
        "fidelity/statistics.py",
        "in reversed(list(zip(points[:-1], points[1:], strict=True))):",
        "in zip(points[:-1], points[1:], strict=True):",
        "fidelity_statistics",
    ),
    Mutation(
        "the last density that is just good enough, not the first",
        "fidelity/statistics.py",
        "        if value < quality:\n",
        "        if value <= quality:\n",
        "fidelity_statistics",
    ),
    Mutation(
        "a curve that is too bad everywhere is taken for one that is better",
        "fidelity/statistics.py",
        "return points[-1][0], 1.0",
        "return 0.0, points[-1][0]",
        "fidelity_statistics",
    ),
    Mutation(
        "points of a curve in the order of measurement",
        "fidelity/statistics.py",
        "points = sorted(curve)",
        "points = list(curve)",
        "fidelity_statistics",
    ),
    Mutation(
        "a curve of equal quality has videos of its own",
        "fidelity/summary.py",
        "curve = [(one.density, _mean(one, shared)) for one in rows]",
        'curve = [(one.density, one.mean("psnr")) for one in rows]',
        "fidelity_statistics",
    ),
    Mutation(
        "the baseline of equal quality has videos of its own",
        "fidelity/summary.py",
        "math.isfinite(psnr := _mean(twin, shared))",
        'math.isfinite(psnr := twin.mean("psnr"))',
        "fidelity_statistics",
    ),
    Mutation(
        "equal quality at the density that was asked for, not the measured one",
        "fidelity/summary.py",
        "curve = [(one.density, ",
        "curve = [(one.setting.density, ",
        "fidelity_statistics",
    ),
    Mutation(
        "dense attention as a baseline of equal quality",
        "fidelity/summary.py",
        "or twin is row or twin.density >= 1.0:",
        "or twin is row:",
        "fidelity_statistics",
    ),
    Mutation(
        "a baseline gains over itself",
        "fidelity/summary.py",
        "if twin != key else {}",
        "if True else {}",
        "fidelity_statistics",
    ),
    Mutation(
        "equal videos have no PSNR",
        "fidelity/summary.py",
        "value = math.inf",
        "value = None",
        "fidelity_statistics",
    ),
    Mutation(
        "the reference equals itself",
        "fidelity/summary.py",
        ' and line["kind"] != DENSE:',
        ":",
        "fidelity_statistics",
    ),
    Mutation(
        "one slow video sets the seconds of a setting",
        "fidelity/summary.py",
        "seconds=median(",
        "seconds=fmean(",
        "fidelity_statistics",
    ),
    Mutation(
        "settings of a variant by descending density",
        "fidelity/summary.py",
        "(variants.index(setting.variant), setting.density)",
        "(variants.index(setting.variant), -setting.density)",
        "fidelity_statistics",
    ),
    Mutation(
        "a difference that may be 0 has its star",
        "fidelity/tables.py",
        "if signed and found.excludes_zero else",
        "if signed else",
        "fidelity_statistics",
    ),
    Mutation(
        "a density that is not reached is told as one that is",
        "fidelity/tables.py",
        'f"below {high:.3f}" if low == 0.0 else f"above {low:.3f}"',
        'f"below {high:.3f}"',
        "fidelity_statistics",
    ),
    Mutation(
        "intervals over a few prompts are told without a warning",
        "fidelity/tables.py",
        "if summary.prompts < _FEW_PROMPTS else",
        "if False else",
        "fidelity_statistics",
    ),
    Mutation(
        "a setting's twin is the first setting",
        "fidelity/plan.py",
        "return replace(setting, **self.parts)",
        "return replace(setting, density=0.1, **self.parts)",
        "fidelity_statistics",
    ),
    Mutation(
        "the same setting is made twice",
        "fidelity/plan.py",
        "dict.fromkeys(Setting(**dict(zip(names, values, strict=True))) for values in combinations)",
        "Setting(**dict(zip(names, values, strict=True))) for values in combinations",
        "fidelity_statistics",
    ),
    Mutation(
        "docs/quality.md: speed beyond the densities that were timed",
        "launch/benchmarks/quality.py",
        "_BEYOND = 0.02",
        "_BEYOND = 0.4",
        "quality",
    ),
    Mutation(
        "docs/quality.md: the time of a density is that of the next one below",
        "launch/benchmarks/quality.py",
        "return first + (density - low) / (high - low) * (last - first)",
        "return first",
        "quality",
    ),
    Mutation(
        "docs/quality.md: a bound is told as an equal quality",
        "launch/benchmarks/quality.py",
        '("", "") if low == high else ("≤ ", "≥ ")',
        '("", "")',
        "quality",
    ),
    Mutation(
        "docs/quality.md: intervals of a few videos",
        "launch/benchmarks/quality.py",
        "_FEW = 6",
        "_FEW = 2",
        "quality",
    ),
    Mutation(
        "docs/quality.md: settings of several selectors in one curve",
        "launch/benchmarks/quality.py",
        "return not setting or replace(setting, **usual) == setting",
        "return True",
        "quality",
    ),
    Mutation(
        "docs/quality.md: an all-gather layer is timed as a ring",
        "launch/benchmarks/quality.py",
        'if row.get("kv_exchange") != "all_gather":',
        "if True:",
        "quality",
    ),
    # What a command tells
    Mutation(
        "what one rank cannot import stays on it",
        "generate/console.py",
        "ranks.together(load)(ranks)",
        "load()(ranks)",
        "console",
    ),
    Mutation(
        "what cannot be imported is a fault of ours",
        "generate/ranks.py",
        ", OSError, ImportError)",
        ", OSError)",
        "console",
    ),
    Mutation(
        "a rank that only repeats the first one speaks",
        "generate/console.py",
        "                if refused.speaks:\n",
        "                if True:\n",
        "console",
    ),
    Mutation(
        "a fault of ours is not shown",
        "generate/console.py",
        "        traceback.print_exc()\n        return 1\n",
        "        return 1\n",
        "console",
    ),
    Mutation(
        "a video's figures hold those of the videos before",
        "fidelity/metrics.py",
        "            metric.reset()",
        "            pass",
        "fidelity_statistics",
    ),
    Mutation(
        "the noise floor by the same kernel",
        "fidelity/measurement.py",
        "if items[0].kind == FLOOR else nullcontext()",
        "if False else nullcontext()",
        "fidelity",
    ),
    Mutation(
        "masks of the branch without caption",
        "fidelity/observe.py",
        " and held and (expert, layer, step) not in self.seen:",
        " and held:",
        "fidelity",
    ),
    Mutation(
        "a line that was cut off stays",
        "fidelity/store.py",
        'file.truncate(file.read().rfind(b"\\n") + 1)',
        "pass",
        "fidelity",
    ),
    Mutation(
        "a line may be lost with the machine",
        "fidelity/store.py",
        "            os.fsync(file.fileno())",
        "            pass",
        "fidelity",
    ),
    Mutation(
        "videos of other sizes are compared",
        "fidelity/store.py",
        "if before.get(name) != run.get(name)]",
        "if False]",
        "fidelity",
    ),
    # Serving
    Mutation(
        "a step is no exchange",
        "serve/runner.py",
        "            self._agree(observer.command())\n\n        def on_part",
        "\n        def on_part",
        "serving/ranks",
    ),
    Mutation(
        "a failure is kept to oneself",
        "serve/runner.py",
        "                self._control.exchange(FAILED)\n        else:",
        "                pass\n        else:",
        "serving/ranks",
    ),
    Mutation(
        "a rank that failed does not say why",
        "serve/runner.py",
        "self._control.gather(error) if",
        "[error] if",
        "serving/ranks",
    ),
    Mutation(
        "nothing is cleaned up after a failed job",
        "serve/runner.py",
        "                self._backend.recover()\n",
        "                pass\n",
        "serving/ranks",
    ),
    Mutation(
        "cancelling is not heard",
        "serve/runner.py",
        "codes[0] in (CANCEL, INTERRUPT)",
        "codes[0] == INTERRUPT",
        "serving/ranks",
    ),
    Mutation(
        "the watchdog does not bite",
        "serve/watchdog.py",
        "if late is not None:",
        "if False:",
        "serving/watchdog",
    ),
    Mutation(
        "a beat does not count",
        "serve/watchdog.py",
        "self._limits[-1].ends = monotonic() + self._limits[-1].seconds",
        "pass",
        "serving/watchdog",
    ),
    Mutation(
        "interrupted jobs are forgotten",
        "serve/store.py",
        'db.execute("UPDATE jobs SET status = ?, started_at = NULL WHERE id = ?", (QUEUED, job.id))',
        "pass",
        "serving/store",
    ),
    Mutation(
        "half-written files stay",
        "serve/folder.py",
        "_OWN_NAME.fullmatch(path.name) and path.name not in known",
        "False",
        "serving/store",
    ),
    Mutation(
        "files go before their rows",
        "serve/store.py",
        "(job_id,))\n        self._unneeded.append(job_id)",
        "(job_id,))\n        self._folder.remove_video(job_id)",
        "serving/store",
    ),
    Mutation(
        "files of a failed change go with the next",
        "serve/store.py",
        "            self._unneeded.clear()\n",
        "",
        "serving/store",
    ),
    Mutation(
        "files of others are swept", "serve/folder.py", "_OWN_NAME.fullmatch(path.name) and ", "", "serving/store"
    ),
    Mutation("a folder of others is used", "serve/folder.py", "if found:", "if False:", "serving/store"),
    Mutation("a lock of others is emptied", "serve/folder.py", 'lock.open("a")', 'lock.open("w")', "serving/store"),
    Mutation(
        "a lock stays with others", "serve/store.py", "                self._folder.leave()\n", "", "serving/store"
    ),
    Mutation(
        "a found lock is taken away",
        "serve/folder.py",
        "        if self._made_lock:\n",
        "        if True:\n",
        "serving/store",
    ),
    Mutation("a broken database is used", "serve/database.py", 'if broken != "ok":', "if False:", "serving/store"),
    Mutation(
        "a database of others is used",
        "serve/database.py",
        "if names and application",
        "if False and application",
        "serving/store",
    ),
    Mutation(
        "a saved video is made again",
        "serve/store.py",
        "if path.is_file() and path.stat().st_size > 0:",
        "if False:",
        "serving/store",
    ),
    Mutation(
        "an empty file is a video",
        "serve/store.py",
        "if path.is_file() and path.stat().st_size > 0:",
        "if path.is_file():",
        "serving/store",
    ),
    Mutation(
        "what failed half-way is kept",
        "serve/database.py",
        'self._db.execute("ROLLBACK")',
        'self._db.execute("COMMIT")',
        "serving/store",
    ),
    Mutation(
        "a database is not marked",
        "serve/database.py",
        'self._db.execute(f"PRAGMA application_id = {_APPLICATION}")\n',
        "pass\n",
        "serving/store",
    ),
    Mutation(
        "a full disk is a broken one",
        "serve/database.py",
        'if "full" in str(error) or is_full(folder.path):',
        "if is_full(folder.path):",
        "serving/disk",
    ),
    Mutation(
        "a full disk is only what SQLite calls so",
        "serve/disk.py",
        "shutil.disk_usage(folder).free < _ROOM_BYTES",
        "False",
        "serving/disk",
    ),
    Mutation(
        "a share of a disk is never full",
        "generate/files.py",
        "errno.ENOSPC, errno.EDQUOT",
        "errno.ENOSPC,",
        "serving/disk",
    ),
    Mutation(
        "pictures stay in the database",
        "serve/table.py",
        "result = ?, bytes = ?, image = NULL",
        "result = ?, bytes = ?",
        "serving/api",
    ),
    Mutation(
        "room is not given back",
        "serve/database.py",
        'self._db.executescript("PRAGMA incremental_vacuum")',
        "pass",
        "serving/api",
    ),
    Mutation(
        "a full disk ends the server",
        "serve/engine.py",
        "            except StoreError as error:\n                self._complain(error)\n            else:",
        "            except KeyError:\n                raise\n            else:",
        "serving/disk",
    ),
    Mutation(
        "what could not be written is forgotten",
        "serve/engine.py",
        "            if self.draining:\n                return\n",
        "            return\n",
        "serving/disk",
    ),
    Mutation(
        "a cut off mp4 is whole",
        "generate/files.py",
        'if at != size or b"moov" not in names:',
        "if False:",
        "serving/disk",
    ),
    Mutation("NaN is a video", "serve/wan.py", "    if wrong:\n", "    if False:\n", "serving/serve"),
    Mutation(
        "hearing of a failure is bounded before a first step",
        "serve/runner.py",
        "self._fault_s = self._bounds.step_s\n        if kind",
        "self._fault_s = self._bounds.fault_s\n        if kind",
        "serving/ranks",
    ),
    Mutation(
        "bodies of any total",
        "serve/guard.py",
        "if self._held + bytes_ > self._limits.bodies_bytes:",
        "if False:",
        "serving/api",
    ),
    Mutation("bodies count for ever", "serve/guard.py", "            body.let_go()\n", "", "serving/api"),
    Mutation("pictures lie aside", "serve/images.py", "ImageOps.exif_transpose(image)", "image", "serving/images"),
    Mutation(
        "pictures of any size are stored", "serve/images.py", "if size != upright.size:", "if False:", "serving/images"
    ),
    Mutation(
        "IPv6 that is not given out is public", "serve/images.py", "if ip not in _UNICAST_6 or", "if", "serving/images"
    ),
    Mutation("the queue has no end", "serve/store.py", ">= max_queue", ">= 10**9", "serving/store serving/api"),
    Mutation("any key will do", "serve/guard.py", "and not self._has_key(headers)", "and False", "serving/api"),
    Mutation("any name will do", "serve/guard.py", 'if name in ("localhost", self._host):', "if name:", "serving/api"),
    Mutation(
        "bodies of any size",
        "serve/guard.py",
        "if received > self._limits.body_bytes:",
        "if False:",
        "serving/api",
    ),
    Mutation(
        "clients may take for ever to send",
        "serve/guard.py",
        "asyncio.wait_for(receive(), self._limits.body_s)",
        "asyncio.wait_for(receive(), None)",
        "serving/api",
    ),
    Mutation(
        "clients may take for ever to read",
        "serve/guard.py",
        "asyncio.wait_for(sending, self._limits.body_s)",
        "asyncio.wait_for(sending, None)",
        "serving/api",
    ),
    Mutation(
        "every address is public", "serve/images.py", "return ip.is_global and", "return True or", "serving/images"
    ),
    Mutation(
        "IPv4 within IPv6 is not looked at",
        "serve/images.py",
        "if inner is not None:",
        "if False:",
        "serving/images",
    ),
    Mutation(
        "the name is connected to, not the address",
        "serve/images.py",
        "httpx.URL(url).copy_with(host=address)",
        "httpx.URL(url)",
        "serving/images",
    ),
    Mutation(
        "images of any size",
        "serve/images.py",
        "if width * height > limits.image_pixels:",
        "if False:",
        "serving/api",
    ),
    Mutation(
        "any image format",
        "serve/images.py",
        "formats=_FORMATS",
        "formats=None",
        "serving/images",
    ),
    # The rest of the family
    Mutation(
        "VACE's control path stays dense",
        "integrations/diffusers/family.py",
        "    return found + [AttendingBlock",
        "    return [AttendingBlock",
        "family",
    ),
    Mutation(
        "VACE's control path is not cut as the video is",
        "integrations/diffusers/family.py",
        "call.enter(_padded(x.flatten(2), call.plan.grid.num_tokens), 2)",
        "_padded(x.flatten(2), call.plan.grid.num_tokens)[:, :, : len(call.plan.local)]",
        "family",
    ),
    Mutation(
        "a face is attended by the tokens of another frame",
        "integrations/diffusers/face.py",
        "own_frame = self._call.plan.local //",
        "own_frame = torch.arange(len(self._call.plan.local)) //",
        "family",
    ),
    Mutation(
        "the first token of a rank has no pose",
        "integrations/diffusers/family.py",
        "        video[:, :, :1] += tokens[:, :, :1]\n",
        "",
        "family",
    ),
    Mutation(
        "video-to-video has one branch of guidance",
        "integrations/diffusers/branches.py",
        '"uncond" if now is self._timestep else "cond"',
        '"cond"',
        "family",
    ),
    Mutation(
        "video-to-video runs all steps",
        "generate/start.py",
        ', "strength": arguments.strength}',
        ', "strength": 1.0}',
        "family_command",
    ),
    Mutation(
        "the last frame is not given",
        "generate/start.py",
        '(("image", self.image), ("last_image", self.last_image))',
        '(("image", self.image),)',
        "family_command",
    ),
    Mutation(
        "VACE's reference images are frames of the video",
        "generate/video.py",
        "return latents[:, :, len(start.references) :]",
        "return latents",
        "family_command",
    ),
    Mutation(
        "VACE's mask is not given",
        "generate/start.py",
        '(("video", self.frames), ("mask", self.mask))',
        '(("video", self.frames),)',
        "family_command",
    ),
    Mutation(
        "more frames than a clip has",
        "generate/fits.py",
        "    if frames > has:",
        "    if False:",
        "family_command",
    ),
    # A rank that fails amid a forward, and what agreeing costs
    Mutation(
        "a failed rank leaves the others in the forward's collectives",
        "integrations/diffusers/forward_end.py",
        "        return True\n",
        "        return False\n",
        "forward_end",
    ),
    Mutation(
        "a failed rank does not gather with the others",
        "integrations/diffusers/forward_end.py",
        "if self._meets and not call.has_left:",
        "if False:",
        "forward_end",
    ),
    Mutation(
        "a failed rank goes through all layers again",
        "integrations/diffusers/forward_end.py",
        "range(call.layers_done, len(self._layers))",
        "range(len(self._layers))",
        "forward_end",
    ),
    Mutation(
        "a layer left half-done is gone through",
        "integrations/diffusers/forward_end.py",
        "(call.is_within and self._meets) or ",
        "",
        "forward_end",
    ),
    Mutation(
        "a forward under a step cache is gone through",
        "integrations/diffusers/forward_end.py",
        ' or getattr(model, "_cache_config", None) is not None',
        "",
        "forward_end",
    ),
    Mutation(
        "what all ranks are refused alike spoils the groups",
        "integrations/diffusers/forward_end.py",
        "if not isinstance(error, (TypeError, ValueError)):",
        "if True:",
        "forward_end",
    ),
    Mutation(
        "collectives of a GPU that are left half-done spoil nothing",
        "integrations/diffusers/forward_end.py",
        "                self._standing.leave(raised, can_meet=True)",
        "                pass",
        "forward_end",
    ),
    Mutation(
        "spoilt groups are used again",
        "integrations/diffusers/__init__.py",
        "        standing.check()\n",
        "",
        "forward_end",
    ),
    Mutation(
        "spoilt groups are used again by halves",
        "integrations/diffusers/cfg.py",
        "        self._standing.check()\n",
        "",
        "forward_end",
    ),
    Mutation(
        "halves meet over spoilt groups",
        "integrations/diffusers/cfg.py",
        "(is_lost_rank(error) or not self._standing.can_meet)",
        "is_lost_rank(error)",
        "forward_end",
    ),
    Mutation(
        "a rank that leaves says nothing",
        "parallel/failures.py",
        "            leave_word(self._left)",
        "            pass",
        "forward_end",
    ),
    Mutation(
        "who is told of a failure is taken for the one that failed",
        "parallel/failures.py",
        "            return error.failure",
        "            pass",
        "forward_end",
    ),
    Mutation(
        "texts are sent at each step",
        "integrations/diffusers/agree.py",
        "found = next((kept for",
        "found = next((kept for _ in range(0) for",
        "agreement_cost",
    ),
    Mutation(
        "texts that were written into are the old ones",
        "integrations/diffusers/agree.py",
        "return self.own() is x and (x._version, self.value._version) == (self.own_version, self.version)",
        "return self.own() is x",
        "agreement_cost",
    ),
    Mutation(
        "one rank's new tensor stays its own",
        "integrations/diffusers/agree.py",
        "if is_new and name in tensors}",
        "if found.get(name) is None and name in tensors}",
        "agreement_cost",
    ),
    Mutation(
        "the step of a scheduler waits for the device",
        "integrations/diffusers/position.py",
        "if rest == 0 and 0 <= place < len(self._values):",
        "if False:",
        "agreement_cost",
    ),
    # Guidance halves and what is placed on a model
    Mutation(
        "guidance: a failed half keeps it to itself",
        "integrations/diffusers/cfg.py",
        "                raised = self._end(error)\n",
        "                self._step, raised = None, error\n",
        "guidance",
    ),
    Mutation(
        "guidance: a step that failed stays open",
        "integrations/diffusers/cfg.py",
        "step, self._step = self._step, None",
        "step = self._step",
        "guidance",
    ),
    Mutation(
        "guidance: a step left between its branches is forgotten",
        "integrations/diffusers/cfg.py",
        'self._end(RuntimeError("left the step between its two branches"))',
        "pass",
        "guidance",
    ),
    Mutation(
        "guidance: the second half waits for a branch that does not come",
        "integrations/diffusers/cfg.py",
        "if step.guided and self._mesh.cfg_rank != half:",
        "if self._mesh.cfg_rank != half:",
        "guidance",
    ),
    Mutation(
        "guidance: ranks that differ in whether it is on go on",
        "integrations/diffusers/cfg.py",
        "if -least != most:",
        "if False:",
        "guidance",
    ),
    Mutation(
        "guidance: off at the first step",
        "integrations/diffusers/cfg.py",
        "if useless:",
        "if False:",
        "guidance",
    ),
    Mutation(
        "guidance: switched off within a step",
        "integrations/diffusers/cfg.py",
        "self._step.guided and not self._guidance.is_on()",
        "False",
        "guidance",
    ),
    Mutation(
        "guidance: a refusal on one half is a failure on the other",
        "parallel/failures.py",
        "isinstance(error, RefusedError), memory)",
        "False, memory)",
        "guidance",
    ),
    Mutation(
        "guidance: out of memory is told as something else",
        "parallel/failures.py",
        "OutOfMemoryElsewhereError(first) if first.out_of_memory else FailedElsewhereError(first)",
        "FailedElsewhereError(first)",
        "guidance",
    ),
    Mutation(
        "guidance: a forward that was put back drops the halves",
        "integrations/diffusers/cfg.py",
        "                prepare()\n",
        "",
        "guidance",
    ),
    Mutation(
        "guidance: a call within ours is another",
        "integrations/diffusers/cfg.py",
        "if self._computing:",
        "if False:",
        "guidance",
    ),
    Mutation(
        "removal takes what was placed since",
        "integrations/diffusers/shadows.py",
        "while self._is_ours(found):",
        'if name in ("forward", "cache_context", "enable_parallelism"):',
        "attach",
    ),
    Mutation(
        "a removed replacement goes on replacing",
        "integrations/diffusers/shadows.py",
        "self.removed = True",
        "pass",
        "attach",
    ),
    Mutation(
        "removal leaves what accelerate would put back",
        "integrations/diffusers/shadows.py",
        'found.method if name == "_old_forward" else found.before',
        "found.before",
        "guidance",
    ),
    Mutation(
        "removal takes a processor that was set since",
        "integrations/diffusers/processor.py",
        "if attn.processor is self:",
        "if True:",
        "attach",
    ),
    Mutation(
        "a removed processor stays sparse",
        "integrations/diffusers/processor.py",
        "        self._removed = True",
        "        pass",
        "attach",
    ),
    Mutation(
        "a failed attach stays",
        "integrations/diffusers/__init__.py",
        "    except BaseException:\n        handle.remove()\n",
        "    except BaseException:\n",
        "attach",
    ),
    Mutation(
        "a failed attach stays on the other ranks",
        "integrations/diffusers/__init__.py",
        "together(place, mesh.groups) if mesh.groups else place()",
        "place()",
        "attach",
    ),
    Mutation(
        "a model compiled as a whole is taken",
        "integrations/diffusers/__init__.py",
        'getattr(model, "_compiled_call_impl", None) is not None',
        "False",
        "attach",
    ),
)


def run(mutation: Mutation) -> str:
    """killed, SURVIVED, or stale."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("sp_sparse", "launch", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        (tree / "docs").symlink_to(ROOT / "docs")
        source = tree / (mutation.file if mutation.file.startswith("launch/") else f"sp_sparse/{mutation.file}")
        text = source.read_text() if source.exists() else ""
        if text.count(mutation.old) != 1:
            return "stale"
        source.write_text(text.replace(mutation.old, mutation.new))
        tests = [test_file(name) for name in mutation.tests.split()]
        return "SURVIVED" if passes(tree, tests) else "killed"


def test_file(name: str) -> str:
    """`serving/api` is tests/serving/test_api.py."""
    folder, _, file = name.rpartition("/")
    return str(Path("tests", folder, f"test_{file}.py"))


def passes(tree: Path, tests: list[str], limit_s: float = TIME_LIMIT_S) -> bool:
    """Whether all tests pass in a tree; a run past the time limit counts as a failure."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    where = "import importlib.util as u; print(u.find_spec('sp_sparse').origin)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tree, env=environment, capture_output=True, text=True)
    if found.returncode == 0 and not found.stdout.startswith(str(tree)):
        raise RuntimeError(f"tests would run against {found.stdout.strip()}, not the copy in {tree}")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--timeout=60",
            "--hypothesis-profile=no_shrink",
            *tests,
        ],
        cwd=tree,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that ranks that hang are ended with it
    )
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if status not in (-1, 0, 1):
        raise RuntimeError(f"pytest exited with {status} for {tests}: nothing was tested")
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="break the source one line at a time and see whether the tests notice")
    parser.add_argument("--only", default="", help="mutations whose description or file contains this text")
    parser.add_argument("--workers", type=int, default=2, help="mutations tested at a time (default: 2)")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.only in m.what or options.only in m.file]
    if not chosen:
        parser.error(f"no mutation's description or file contains {options.only!r}; leave --only out to run all")
    whole = sorted({test_file(name) for m in chosen for name in m.tests.split()})
    if not passes(ROOT, whole, WHOLE_LIMIT_S):
        print("the tests fail without any mutation")
        return 1
    results: list[str] = []
    with ThreadPoolExecutor(options.workers) as pool:
        for mutation, result in zip(chosen, pool.map(run, chosen), strict=True):
            print(f"{result:8}  {mutation.file:24}  {mutation.what}", flush=True)
            results.append(result)
    print(f"{results.count('killed')} of {len(results)} killed")
    return int(any(result != "killed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
