"""All settings of a training run. The docstrings of the fields are the text of `--help`.

A preset is a complete set of them; what is given on the command line stands above the preset.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ltm_pyro.data import PACKING
from ltm_pyro.errors import InputError
from ltm_pyro.inference import PRIOR, SCHEMES
from ltm_pyro.inference.svi import OptimizerConfig
from ltm_pyro.models import DecoderConfig

NO_INFERENCE = "none"
AMORTIZED = "amortized"
InferenceName = Literal[(*SCHEMES, NO_INFERENCE)]  # type: ignore[valid-type]
PackingName = Literal[tuple(PACKING)]  # type: ignore[valid-type]
PresetName = Literal["tiny", "small", "medium", "large"]


@dataclass(frozen=True)
class _RunSettings:
    inference: InferenceName = "vi"
    """How z is inferred: vi (a Gaussian), lowrank (a Gaussian with correlations), map (a point),
    langevin, underdamped, mala, hmc (draws, by Markov chains),
    amortized (a Gaussian that an encoder proposes, which --fast-steps refine),
    adamvi (the Gaussian of vi, fitted by Adam as in the paper's implementation).
    none: the same decoder without z, the autoregressive model to compare with."""
    preset: PresetName = "tiny"
    """Sizes and training settings to start from; other options change them one by one.
    tiny trains on a laptop; small, medium and large are the paper's."""
    data: str = "python-docs"
    """python-docs (the documentation that Python itself carries),
    a .txt, .jsonl or .parquet file or a folder of them,
    a Hugging Face data set as NAME or NAME:CONFIG,
    or a folder that python -m ltm_pyro.prepare has written."""
    text_column: str = "text"
    """Column of the corpus that holds the text (.jsonl, .parquet, Hugging Face)."""
    tokenizer: str = "bytes"
    """bytes, or an encoding of tiktoken, such as gpt2."""
    packing: PackingName = "document"
    """document: a sequence holds one document, or a piece of one.
    stream: documents follow each other without padding; those in one sequence share its z."""
    infer_from: Literal["whole", "prefix"] = "whole"
    """What z is inferred from in training: the whole sequence (the paper's objective),
    or a prefix of random length; the loss is that of the whole sequence in both cases."""
    steps: int = 450
    """Slow steps: updates of the weights."""
    fast_steps: int = 4
    """Steps of inference for each sequence in each slow step (T)."""
    batch_size: int = 8
    """Sequences of a slow step, of all processes together."""
    micro_batch_size: int = 8
    """Sequences that a process infers together, at most. Less needs less memory; gradients accumulate."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the decoder's matrix products are computed in. bfloat16 is about twice as fast where the processor has it;
    weights, z, KL, sums and the optimiser stay in float32."""
    compile: bool = False
    """Compile the decoder with torch.compile, which takes a minute at the start and needs a C++ compiler."""
    seed: int = 0
    """Seed of weights, noise and order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    out: str | None = None
    """Folder of the run. Default: runs/DATA-PRESET-INFERENCE, numbered if that exists."""
    resume: bool = False
    """Go on with the run in --out. Only --steps (which moves the end of the learning rate's schedule), --device,
    how often to log, validate and save, and how many checkpoints to keep may then be given."""
    log_every: int = 10
    """Slow steps from one line of metrics to the next."""
    tensorboard: bool = False
    """Also write all metrics for TensorBoard, into the folder tensorboard of the run.
    Needs the package: pip install tensorboard"""
    validate_every: int = 150
    """Slow steps from one validation to the next."""
    validation_sequences: int = 16
    """Held-out sequences of a validation; the closing report takes four times as many."""
    validation_samples: int = 64
    """Draws of z for the held-out bound, which the fit of z never saw."""
    checkpoint_every: int = 150
    """Slow steps from one checkpoint to the next."""
    num_checkpoints: int = 2
    """Checkpoints that are kept: the last ones. Where the newest is damaged, --resume goes back to the one before.
    That of the best validation so far is kept besides."""
    model: DecoderConfig = field(default_factory=DecoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


_NO_OPTIONS = ("num_steps", "num_kept")


def _settings_of(scheme: type) -> type:
    """The scheme without what is no option: T, which --fast-steps sets, and the draws kept to be looked at."""
    hidden = [
        (setting.name, tyro.conf.Suppress[int], field(default=setting.default))
        for setting in dataclasses.fields(scheme)
        if setting.name in _NO_OPTIONS
    ]
    name = f"{scheme.__name__}Settings"
    return dataclasses.make_dataclass(name, hidden, bases=(scheme,), frozen=True, namespace={"__module__": __name__})


_SCHEME_SETTINGS = {name: _settings_of(scheme) for name, scheme in SCHEMES.items()}
# By their names, so that settings can be pickled.
globals().update({settings.__name__: settings for settings in _SCHEME_SETTINGS.values()})

TrainConfig = dataclasses.make_dataclass(
    "TrainConfig",
    [(name, settings, field(default_factory=settings)) for name, settings in _SCHEME_SETTINGS.items()],
    bases=(_RunSettings,),
    frozen=True,
    namespace={"__module__": __name__},
)
TrainConfig.__doc__ = "Train a Latent Thought Model: infer z of each text (fast), then step on the weights (slow)."


def _paper(num_layers: int, num_slots: int, fast_steps: int) -> dict[str, Any]:
    """Kong et al. 2025, section 4 and appendix; docs/presets.md lists where we depart from it."""
    return {
        "model": DecoderConfig(
            num_layers=num_layers, width=512, num_heads=8, hidden=1376, num_slots=num_slots, window=256, length=1024
        ),
        "optimizer": OptimizerConfig(
            learning_rate=4e-4, final_learning_rate=4e-5, warmup_steps=1000, beta_1=0.9, beta_2=0.95, weight_decay=0.1
        ),
        "tokenizer": "gpt2",
        "packing": "stream",
        "steps": 60_000,
        "fast_steps": fast_steps,
        "batch_size": 512,
        "micro_batch_size": 8,
        "validate_every": 1000,
        "checkpoint_every": 1000,
    }


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": _paper(num_layers=3, num_slots=8, fast_steps=16),
    "medium": _paper(num_layers=6, num_slots=4, fast_steps=16),
    "large": _paper(num_layers=12, num_slots=8, fast_steps=64),
}


def preset(name: str, inference: str = "vi") -> TrainConfig:
    """The settings of a preset; with inference `none`, without z; with `amortized`, with an encoder, unrefined.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in _PRESETS:
        raise InputError(f"unknown preset {name!r}: choose from {', '.join(_PRESETS)}")
    config = TrainConfig(preset=name, **_PRESETS[name])
    if inference == NO_INFERENCE:
        model = dataclasses.replace(config.model, num_slots=0)
    elif inference == AMORTIZED:
        model = dataclasses.replace(config.model, encoder_layers=2)
    else:
        return config
    return dataclasses.replace(config, inference=inference, fast_steps=0, model=model)


def scheme_of(config: TrainConfig, inference: str | None = None, fast_steps: int | None = None) -> Any:
    """The posterior scheme that the config names, or another one with the config's settings for it.

    Args:
        inference: another scheme.
        fast_steps: another number of steps than the config's.

    Raises:
        InputError: if it is `amortized`, and the config's model has no encoder.
    """
    inference = inference or config.inference
    if inference == NO_INFERENCE:
        return PRIOR
    if inference == AMORTIZED and not config.model.encoder_layers:
        raise InputError(
            f"--inference {AMORTIZED}: {config.out or 'the model'} has no encoder: "
            f"it was trained with --inference {config.inference}"
        )
    return dataclasses.replace(
        getattr(config, inference), num_steps=config.fast_steps if fast_steps is None else fast_steps
    )


def validate(config: TrainConfig) -> None:
    """Raise InputError where a setting is out of range."""
    for name in (
        "steps",
        "batch_size",
        "micro_batch_size",
        "log_every",
        "validate_every",
        "validation_sequences",
        "validation_samples",
        "checkpoint_every",
        "num_checkpoints",
    ):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    for name in ("fast_steps", "seed"):
        if getattr(config, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(config, name)}")
    if (config.inference == NO_INFERENCE) != (config.model.num_slots == 0):
        raise InputError(
            f"--inference {config.inference} with --model.num-slots {config.model.num_slots}: 'none' is for the model "
            "without z, which has 0 slots, and every other scheme needs at least 1"
        )
    if (config.inference == AMORTIZED) != (config.model.encoder_layers > 0):
        raise InputError(
            f"--inference {config.inference} with --model.encoder-layers {config.model.encoder_layers}: '{AMORTIZED}' "
            "needs an encoder of at least 1 layer, and no other scheme trains one, so it must have 0"
        )
    if config.inference == NO_INFERENCE and config.fast_steps:
        raise InputError(f"--inference none has nothing to infer: --fast-steps must be 0, not {config.fast_steps}")
    # What NumPy's and torch's generators both take.
    if config.seed >= 2**32:
        raise InputError(f"--seed must be below 2^32, not {config.seed}")


def micro_batch_size(config: TrainConfig, num_processes: int = 1) -> int:
    """The largest divisor of a process's part of the batch that is allowed."""
    part = config.batch_size // num_processes
    return max(size for size in range(1, min(part, config.micro_batch_size) + 1) if part % size == 0)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The settings as plain values, for `config.yaml`; what is no option of the command is left out."""
    values = dataclasses.asdict(config)
    for name in SCHEMES:
        values[name] = {key: value for key, value in values[name].items() if key not in _NO_OPTIONS}
    return values


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of :func:`to_dict`.

    A run may be older than some scheme, or some setting of one: those have their defaults, which for a new setting
    must be what schemes did before there was one. One that is older than the encoder has none.

    Raises:
        InputError: if a setting is unknown, missing, of the wrong kind or out of range.
    """
    nested = {"model": DecoderConfig, "optimizer": OptimizerConfig, **_SCHEME_SETTINGS}
    defaults = to_dict(preset("tiny"))
    values = {"precision": "float32", "compile": False, "tensorboard": False, "num_checkpoints": 2} | values
    newer = {name: defaults[name] for name in SCHEMES} | {"model": {"encoder_layers": 0, "prior": "standard"}}
    for name, settings in newer.items():
        missing = {} if name not in (values.get("inference"), "model") else None  # those it cannot be without
        if isinstance(values.get(name, missing), dict):
            values = {**values, name: settings | values.get(name, {})}
    expected, given = _flat(defaults).keys(), _flat(values).keys()
    if expected != given:
        missing, unknown = ", ".join(sorted(expected - given)), ", ".join(sorted(given - expected))
        raise InputError(f"the settings of the run cannot be read: missing [{missing}], unknown [{unknown}]")
    try:
        _check_types(TrainConfig, {name: value for name, value in values.items() if name not in nested})
        for name, settings in nested.items():
            _check_types(settings, values[name])
        config = TrainConfig(**{**values, **{name: nested[name](**values[name]) for name in nested}})
        validate(config)
    except ValueError as error:
        raise InputError(f"the settings of the run cannot be read: {error}") from None
    return config


def _check_types(settings: type, values: dict[str, Any]) -> None:
    hints = get_type_hints(settings)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{name} is no setting")
        hint = hints[name]
        if get_origin(hint) is Literal:
            fits = value in get_args(hint)
        elif hint is float:
            fits = type(value) in (int, float)
        else:
            fits = type(value) in (get_args(hint) or (hint,))
        if not fits:
            raise ValueError(f"{name} is {value!r}")


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, under dotted names: (old value, new value)."""
    old_values, new_values = _flat(to_dict(old)), _flat(to_dict(new))
    return {name: (old_values[name], new_values[name]) for name in new_values if old_values[name] != new_values[name]}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        has_parts = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{name}.") if has_parts else {f"{prefix}{name}": value}
    return flat
