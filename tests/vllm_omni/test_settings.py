"""vllm-omni's flags, read for SP_SPARSE: what is taken, what is refused, and what it says then."""

from __future__ import annotations

from typing import Any

import pytest

from sp_sparse.integrations.vllm_omni.settings import Settings


def test_defaults() -> None:
    settings = Settings.read(None, None)
    assert (settings.config.backend, settings.config.schedule, settings.config.topk) == ("auto", "constant", 0.2)
    assert settings.density(7, None, None) == 0.2


def test_names_are_those_of_the_flags() -> None:
    additional = {
        "sp_sparse": {"backend": "reference", "block_size": "128x64", "keep_first_frame": True, "num_steps": 40}
    }
    settings = Settings.read({"sparsity": 0.7, "start_step": 10, "end_step": 2, "skip_layers": [0, 39]}, additional)
    assert settings.config.topk == 0.3
    assert settings.config.block_size == (128, 64)
    assert settings.config.keep_first_frame
    assert settings.depends_on_layer
    dense = {(0, 12): 1.0, (39, 12): 1.0, (5, 9): 1.0, (5, 10): 0.3, (5, 37): 0.3, (5, 38): 1.0}
    assert {place: settings.density(*place, None) for place in dense} == dense
    assert settings.density(5, 37, 38) == 1.0, "the number of steps that the pipeline tells goes before"


def test_schedules() -> None:
    settings = Settings.read({"sparsity": 0.7}, {"sp_sparse": {"schedule": "conservative", "num_steps": 40}})
    assert [settings.density(1, step, None) for step in (9, 10)] == [1.0, 0.3]
    assert settings.density(0, 10, None) == 1.0
    with pytest.raises(ValueError, match=r"step 40 is outside \[0, 40\)"):
        settings.density(1, 40, None)


@pytest.mark.parametrize(
    ("block_sparse", "options", "message"),
    [
        (
            {},
            {"blocksize": 64},
            'unknown options blocksize in "sp_sparse" in --additional-config; known are backend, blo',
        ),
        (
            {"sparsty": 0.5},
            {},
            "unknown options sparsty in block_sparse; known are .*, sparsity, start_step, token_order",
        ),
        ({}, {"sparsity": 0.5}, 'unknown options sparsity in "sp_sparse" in --additional-config'),
        ({}, {"topk": 0.3}, r'topk is not read from "sp_sparse" in --additional-config; use block_sparse.sparsity'),
        ({"topk": 0.3}, {}, r"topk is not read from block_sparse; use block_sparse.sparsity"),
        ({"dense_layers": 3}, {}, "use block_sparse.skip_layers"),
        ({"schedule_table_2": [[0.5]]}, {}, "second expert.*leave it out"),
        ({}, {"dense_steps": 3}, "use block_sparse.start_step"),
        ({}, {"dense_layers": 3}, "use block_sparse.skip_layers"),
        ({}, {"topk_2": 0.3}, "second expert.*leave it out"),
        ({}, {"schedule_2": "constant"}, "second expert.*leave it out"),
        ({}, {"schedule": "conservative"}, "schedule 'conservative' needs the number of denoising steps.*num_steps"),
        ({"end_step": 2}, {}, "block_sparse.end_step=2 needs the number of denoising steps.*num_steps"),
        ({}, {"num_steps": True}, "num_steps=True; give the denoising steps of a request, a whole number"),
        ({}, {"num_steps": 0}, "num_steps=0; give the denoising steps of a request"),
        ({"num_steps": 40.5}, {}, "num_steps=40.5; give the denoising steps of a request, a whole number"),
        ({"backend": "none"}, {}, 'backend is "none"'),
        ({"remainder": "half"}, {}, "remainder='half' is not known"),
        ({"sparsity": 0.7, "selector": "window", "window": 1}, {}, "sparsity=0.7 is topk: topk=0.3 changes nothing"),
        ({"remainder": "mean"}, {"remainder": "linear"}, "remainder is 'mean' in block_sparse, and 'linear' in "),
        ({"backend": "triton"}, {"backend": "fa4"}, '"sp_sparse" in --additional-config; leave one of them out'),
        ({"precision": "fp8"}, {}, "precision='fp8': SP_SPARSE computes in the model's dtype"),
        ({"sparsity": 1.0}, {}, "sparsity=1.0 would leave out every block"),
        ({}, {"backend": "none"}, 'backend is "none"'),
        ({}, {"block_size": 4}, r"block_size \(4, 4\)"),
    ],
)
def test_refused(block_sparse: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.read(block_sparse, {"sp_sparse": options})


def test_options_may_stand_in_either_place() -> None:
    here = Settings.read({"sparsity": 0.7, "remainder": "linear", "block_size": "128x64"}, None)
    assert here == Settings.read({"sparsity": 0.7}, {"sp_sparse": {"remainder": "linear", "block_size": "128x64"}})
    assert here == Settings.read({"sparsity": 0.7, "remainder": "linear"}, {"sp_sparse": {"block_size": "128x64"}})
    twice = {"remainder": "linear", "block_size": "128x64"}
    assert here == Settings.read({"sparsity": 0.7, **twice}, {"sp_sparse": twice}), (
        "what is the same is no contradiction"
    )
    config = Settings.read({"preset": "fast", "num_steps": "40"}, {"sp_sparse": {"remainder": "drop"}}).config
    assert (config.topk, config.remainder) == (0.1, "drop"), "an option goes before a preset, wherever either stands"


def test_a_preset_brings_what_is_not_given() -> None:
    preset = {"sp_sparse": {"preset": "fast", "num_steps": 40}}
    config = Settings.read(None, preset).config
    assert (config.backend, config.topk, config.schedule, config.remainder) == ("auto", 0.1, "conservative", "linear")
    assert Settings.read({"sparsity": 0.8}, preset).config.topk == 0.2
    preset["sp_sparse"]["remainder"] = "drop"
    assert Settings.read(None, preset).config.remainder == "drop"


def test_refused_values() -> None:
    with pytest.raises(ValueError, match=r'"sp_sparse" in --additional-config is \'x\'; give an object'):
        Settings.read(None, {"sp_sparse": "x"})
    assert Settings.read(None, {"another": {"unknown": 1}}) == Settings.read(None, None), "others' keys are theirs"


def test_a_step_that_matters_must_be_known() -> None:
    with pytest.raises(ValueError, match="start_step=3 needs the denoising step"):
        Settings.read({"start_step": 3}, None).density(1, None, None)
    with pytest.raises(ValueError, match="end_step=3 needs the denoising step"):
        Settings.read({"end_step": 3}, {"sp_sparse": {"num_steps": 9}}).density(1, None, None)
