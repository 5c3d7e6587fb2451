"""Settings: the presets are the documented ones, and what cannot be used is refused."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltm_pyro.config import differences, from_dict, micro_batch_size, preset, scheme_of, to_dict, validate
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation.inferred import inference_of
from ltm_pyro.inference import SCHEMES
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.amortized import Amortized
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.models import LatentThoughtModel

PRESETS = ("tiny", "small", "medium", "large")


@pytest.mark.parametrize(
    ("name", "vocab_size", "num_weights"),
    # The 256 bytes or the 50,256 pieces of text of GPT-2, end-of-text and begin-of-text.
    [
        ("tiny", 258, 627_848),
        ("small", 50_258, 38_369_280),
        ("medium", 50_258, 51_005_952),
        ("large", 50_258, 76_279_296),
    ],
)
def test_a_preset_has_as_many_weights_as_documented(name, vocab_size, num_weights):
    with torch.device("meta"):
        model = LatentThoughtModel(preset(name).model, vocab_size, vocab_size - 2)
    assert sum(weight.numel() for weight in model.parameters()) == num_weights


@pytest.mark.parametrize(("name", "fast_steps"), [("small", 16), ("medium", 16), ("large", 64)])
def test_the_larger_presets_train_as_the_paper_does(name, fast_steps):
    config = preset(name)
    assert (config.batch_size, config.steps, config.fast_steps) == (512, 60_000, fast_steps)
    assert (config.tokenizer, config.packing) == ("gpt2", "stream")
    assert (config.model.window, config.model.length) == (256, 1024)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.final_learning_rate, optimizer.warmup_steps) == (4e-4, 4e-5, 1000)
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert optimizer.max_gradient_norm == 1.0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_used_pickled_and_written_as_plain_values(name):
    config = preset(name)
    validate(config)
    assert config.preset == name
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(pickle.loads(pickle.dumps(config))) == hash(config)
    assert from_dict(to_dict(config)) == config


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"'huge'.*tiny, small, medium, large"):
        preset("huge")


@pytest.mark.parametrize("inference", SCHEMES)
def test_fast_steps_are_the_steps_of_the_scheme_that_is_named(inference):
    config = dataclasses.replace(preset("tiny", inference), inference=inference, fast_steps=37)
    scheme = scheme_of(config)
    assert scheme.num_steps == 37
    assert isinstance(scheme, SCHEMES[inference])
    assert "num_steps" not in to_dict(config)[inference]


@given(st.integers(1, 600), st.integers(1, 600))
def test_the_micro_batch_is_the_largest_divisor_of_the_batch_that_is_allowed(batch_size, at_most):
    config = dataclasses.replace(preset("tiny"), batch_size=batch_size, micro_batch_size=at_most)
    size = micro_batch_size(config, torch.device("cpu"))
    assert batch_size % size == 0
    assert size <= at_most
    assert all(batch_size % larger for larger in range(size + 1, min(at_most, batch_size) + 1))


@pytest.mark.parametrize(("device", "expected"), [("cpu", 8), ("cuda", 64)])
def test_a_gpu_takes_more_sequences_at_a_time_by_default(device, expected):
    assert micro_batch_size(preset("small"), torch.device(device)) == expected
    assert micro_batch_size(preset("small"), torch.device(device), num_processes=32) == min(16, expected)


def test_settings_that_differ_are_named_with_dots_and_both_values():
    old = preset("tiny")
    new = dataclasses.replace(
        old,
        steps=7,
        out="elsewhere",
        model=dataclasses.replace(old.model, width=64),
        schemes={**old.schemes, "vi": VI(learning_rate=0.25)},
    )
    assert differences(old, old) == {}
    assert differences(old, new) == {
        "steps": (old.steps, 7),
        "out": (None, "elsewhere"),
        "model.width": (128, 64),
        "vi.learning_rate": (0.5, 0.25),
    }


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "--steps must be at least 1, not 0"),
        ("batch_size", -1, "--batch-size must be at least 1, not -1"),
        ("micro_batch_size", 0, "--micro-batch-size must be at least 1, not 0"),
        ("log_every", 0, "--log-every must be at least 1, not 0"),
        ("validate_every", 0, "--validate-every must be at least 1, not 0"),
        ("validation_sequences", 0, "--validation-sequences must be at least 1, not 0"),
        ("validation_samples", 0, "--validation-samples must be at least 1, not 0"),
        ("checkpoint_every", 0, "--checkpoint-every must be at least 1, not 0"),
        ("fast_steps", -1, "--fast-steps must be at least 0, not -1"),
        ("seed", -1, "--seed must be at least 0 and below 2^32, not -1"),
        ("seed", 2**32, "--seed must be at least 0 and below 2^32, not 4294967296"),
    ],
)
def test_a_number_out_of_range_is_refused(name, value, expected):
    config = dataclasses.replace(preset("tiny"), **{name: value})
    with pytest.raises(InputError) as error:
        validate(config)
    assert str(error.value) == expected
    with pytest.raises(InputError):
        from_dict(to_dict(config))


def test_zero_fast_steps_and_the_largest_seed_are_allowed():
    validate(dataclasses.replace(preset("tiny"), fast_steps=0, seed=2**32 - 1))


def changed(**values: Any) -> dict[str, Any]:
    """The plain values of tiny with these in the place of, or in addition to, their own."""
    return to_dict(preset("tiny")) | values


def model_with(**values: Any) -> dict[str, Any]:
    return changed(model=to_dict(preset("tiny"))["model"] | values)


@pytest.mark.parametrize(
    ("values", "mentioned"),
    [
        ({name: value for name, value in changed().items() if name != "seed"}, "seed"),
        (changed(epochs=3), "epochs"),
        (changed(epochs={}), "epochs"),
        (model_with(depth=3), "depth"),
        (model_with(depth={}), "depth"),
        (changed(model={}), "model"),
        (changed(model=None), "model"),
        (changed(model=[3]), "model"),
        (changed(steps="many"), "steps"),
        (changed(steps={}), "steps"),
        (changed(steps=True), "steps"),
        (changed(batch_size=None), "batch_size"),
        (changed(data=7), "data"),
        (changed(resume=1), "resume"),
        (changed(out=7), "out"),
        (changed(inference="nuts"), "inference"),
        (changed(packing=["stream"]), "packing"),
        (model_with(width=16.0), "width"),
        (model_with(num_heads=0), "num_heads"),
        ({**changed(), 1: 2}, "1"),
        ({**changed(model={k: v for k, v in changed()["model"].items() if k != "width"}), "model.width": 16}, "width"),
        ({**changed(), True: 2}, "True"),
    ],
)
def test_plain_values_that_are_no_settings_are_refused_by_name(values, mentioned):
    with pytest.raises(InputError, match=mentioned):
        from_dict(values)


def test_a_whole_number_will_do_where_a_fraction_is_allowed():
    values = changed(optimizer=to_dict(preset("tiny"))["optimizer"] | {"weight_decay": 0})
    assert from_dict(values).optimizer.weight_decay == 0


@pytest.mark.parametrize("name", ["tiny", "small", "medium", "large"])
def test_every_preset_has_its_baseline_without_z(name):
    with_z, without = preset(name, "vi", "whole"), preset(name, "none")
    assert differences(with_z, without).keys() == {"inference", "fast_steps", "model.num_slots"}
    validate(without)
    assert scheme_of(without).num_steps == 0


@pytest.mark.parametrize("name", PRESETS)
def test_with_the_past_thoughts_are_fast_weights_and_a_scheme_that_absorbs_takes_one_step(name):
    config = preset(name, "map", "past")
    assert (config.model.thoughts, config.model.prior) == ("fast-weights", "scaled")
    assert config.model.num_slots == config.model.hidden
    assert config.fast_steps == 1
    assert preset(name, "langevin", "past").fast_steps == preset(name, "langevin", "whole").fast_steps > 1
    validate(config)


@pytest.mark.parametrize("name", PRESETS)
def test_without_a_scheme_whole_texts_are_inferred_by_vi_and_blocks_by_map(name):
    assert preset(name).inference == ("map" if name == "tiny" else "vi")
    assert preset(name, infer_from="past").inference == "map"
    for objective in ("whole", "prefix"):
        assert preset(name, infer_from=objective).inference == "vi"


def test_fast_weights_are_as_many_as_the_hidden_units_that_are_asked_for_and_are_left_where_thoughts_are_attended():
    model = preset("tiny", hidden=99).model
    assert (model.hidden, model.num_slots) == (99, 99)
    attended = preset("tiny", thoughts="attended")
    assert (attended.model, attended.infer_from) == (preset("tiny", "map", "whole").model, "past")


def test_tiny_reads_the_past_by_default_where_one_pass_over_a_text_is_enough():
    objectives = {name: preset("tiny", name).infer_from for name in [*SCHEMES, "none"]}
    assert objectives == {
        name: "past" if name in SCHEMES and SCHEMES[name].can_absorb else "whole" for name in objectives
    }
    assert preset("tiny", "map", "whole").model.thoughts == "attended"
    assert {preset(name, scheme).infer_from for name in PRESETS[1:] for scheme in SCHEMES} == {"whole"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_encoder_which_nothing_refines(name):
    without, amortized = preset(name, "vi", "whole"), preset(name, "amortized", "whole")
    assert differences(without, amortized).keys() == {"inference", "fast_steps", "model.encoder_layers"}
    assert (amortized.fast_steps, amortized.model.encoder_layers) == (0, 2)
    validate(amortized)
    assert from_dict(to_dict(amortized)) == amortized
    assert isinstance(scheme_of(amortized), Amortized)
    assert scheme_of(amortized, "vi", 16) == scheme_of(without, "vi", 16)


def test_an_encoder_reads_what_z_is_inferred_from():
    amortized = preset("tiny", "amortized")
    assert (amortized.infer_from, amortized.fast_steps, amortized.model.encoder_reads) == ("past", 0, "block")
    validate(amortized)
    assert from_dict(to_dict(amortized)) == amortized
    for infer_from, reads in (("past", "text"), ("whole", "block"), ("prefix", "block")):
        model = dataclasses.replace(amortized.model, encoder_reads=reads)
        with pytest.raises(InputError, match=f"--infer-from {infer_from} with --model.encoder-reads {reads}"):
            validate(dataclasses.replace(amortized, infer_from=infer_from, model=model))
    with pytest.raises(InputError, match="encoder-layers 2: an encoder that reads blocks has one layer"):
        validate(dataclasses.replace(amortized, model=dataclasses.replace(amortized.model, encoder_layers=2)))
    model = dataclasses.replace(amortized.model, encoder_layers=0, encoder_reads="text")
    without = dataclasses.replace(amortized, inference="vi", model=model)
    validate(without)
    with pytest.raises(InputError, match="no encoder"):
        validate(dataclasses.replace(without, model=dataclasses.replace(model, encoder_reads="block")))


def test_a_model_without_z_refuses_a_prior():
    without_z = preset("tiny", "none")
    config = dataclasses.replace(without_z, model=dataclasses.replace(without_z.model, prior="affine"))
    with pytest.raises(InputError, match="a model without z has no prior"):
        validate(config)


@pytest.mark.parametrize(("inference", "layers"), [("amortized", 0), ("vi", 1), ("none", 2)])
def test_an_encoder_is_trained_by_the_scheme_that_has_one_and_by_no_other(inference, layers):
    config = preset("tiny", inference)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder_layers=layers))
    with pytest.raises(InputError, match=f"--inference {inference} with --model.encoder-layers {layers}"):
        validate(config)


def test_a_run_without_an_encoder_has_no_amortised_inference():
    config = dataclasses.replace(preset("tiny"), inference="map", out="runs/some")
    for of in (scheme_of, inference_of):
        with pytest.raises(InputError, match="runs/some has no encoder: it was trained with --inference map"):
            of(config, "amortized")


def test_a_run_older_than_a_scheme_can_be_read_but_not_without_its_own():
    values = to_dict(preset("tiny"))
    del values["langevin"], values["mala"]["vi_steps"]
    assert from_dict(values) == preset("tiny")
    # With an encoder or without, what is asked for must be there.
    with pytest.raises(InputError, match="encoder"):
        from_dict(values | {"inference": "amortized"})
    del values["map"]
    with pytest.raises(InputError, match="map"):
        from_dict(values)


def test_the_gaussian_around_points_is_fitted_by_vi_to_all_positions():
    config = preset("tiny")
    config = dataclasses.replace(
        config,
        schemes={**config.schemes, "vi": VI(stride=4, learning_rate=0.05), "adamvi": AdamVI(noise="reused")},
        model=dataclasses.replace(config.model, encoder_layers=1),
    )
    for name in SCHEMES:
        gaussian = inference_of(config, name).gaussian
        assert gaussian.num_steps > 0
        assert (gaussian.stride, gaussian.learning_rate) == (1, 0.05)
    assert "reused noise" in inference_of(config, "adamvi").name
