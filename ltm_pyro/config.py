"""All settings of a training run. The docstrings of the fields are the text of `--help`.

A preset is a complete set of them. What is given on the command line takes precedence over the preset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
import tyro

from ltm_pyro import cli
from ltm_pyro.data import CORPORA, PACKING
from ltm_pyro.errors import InputError, require_whole
from ltm_pyro.inference import COMMON_SCHEME, DEFAULT_SCHEME, PRIOR, SCHEMES, PosteriorScheme
from ltm_pyro.inference.objectives import OBJECTIVES, Objective
from ltm_pyro.inference.svi import OptimizerConfig
from ltm_pyro.models import DecoderConfig

NO_INFERENCE = "none"
"""The name that stands for the model without z, where a scheme's name may stand."""
INFERENCES: Mapping[str, object] = {
    **SCHEMES,
    NO_INFERENCE: SimpleNamespace(summary="The same decoder without z: the autoregressive model to compare with"),
}
"""What `--inference` can be in training, for the help."""
NOT_OPTIONS = ("num_steps", "num_kept")
"""The settings of schemes that no option and no file sets: T, which is `fast_steps`, and the draws that are kept."""
ENCODED_SLOTS = 64
"""Fast weights of a layer, where an encoder proposes them."""

if TYPE_CHECKING:
    InferenceName = str
    ObjectiveName = str
    PackingName = str
else:
    InferenceName = Literal[tuple(INFERENCES)]
    ObjectiveName = Literal[tuple(OBJECTIVES)]
    PackingName = Literal[tuple(PACKING)]
Scheme = TypeVar("Scheme", bound=PosteriorScheme)
Config = TypeVar("Config")
SchemeSettings = dict[str, dict[str, Any]]
"""Settings of schemes that a command gives, by the names of schemes and of settings."""
PresetName = Literal["tiny", "small", "medium", "large"]
PrecisionName = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a Latent Thought Model: infer z of each text, then step on the weights."""

    inference: Annotated[
        InferenceName,
        cli.choices("How z is inferred. Default: map with --infer-from past, and otherwise vi.", INFERENCES, "NAME"),
    ] = DEFAULT_SCHEME
    preset: PresetName = "tiny"
    """The sizes and training settings to start from. Other options change them one by one.
    tiny trains on a laptop; small, medium and large are the paper's."""
    config: str | None = None
    """A file of settings to start from: the config.yaml of a run, or a part of one. Options take precedence."""
    data: Annotated[
        str, cli.choices("The corpus: a folder that python -m ltm_pyro.prepare has written, or one of these.", CORPORA)
    ] = "python-docs"
    text_column: str | None = None
    """Column that holds the text, in files and data sets with columns. Default: text, or a benchmark set's own."""
    tokenizer: str = "bytes"
    """The tokenizer: bytes, or an encoding of tiktoken, such as gpt2."""
    packing: PackingName = "document"
    """How documents are put into sequences.
    document: a sequence holds one document, or a piece of one.
    stream: documents follow each other without padding, and those in one sequence share its z."""
    infer_from: Annotated[
        ObjectiveName,
        cli.choices(
            "What z is inferred from in training. Default: in preset tiny past, for a scheme that can absorb blocks of "
            "a text one by one (map, vi, amortized); otherwise whole.",
            OBJECTIVES,
        ),
    ] = "past"
    steps: int = 200
    """The number of slow steps, each of which updates the weights once."""
    fast_steps: int = 4
    """The number of steps of inference in each slow step (T).
    They are taken for each sequence, or with --infer-from past for each block of one."""
    batch_size: int = 4
    """The number of sequences in a slow step, over all processes."""
    micro_batch_size: int | None = None
    """The largest number of sequences for which a process infers z at the same time. Default: 8 on a CPU, 64 on a GPU.
    A smaller number needs less memory; the gradients of the parts are added up."""
    precision: PrecisionName = "auto"
    """The number format of the decoder's matrix products.
    auto: bfloat16 on a GPU that has it, and otherwise float32. Some processors are faster in bfloat16, others slower.
    Weights, z, KL, sums and the optimiser are in float32 with each of them."""
    compile: bool = False
    """Compile the decoder with torch.compile, which takes minutes at the start and needs a C++ compiler."""
    sharded: bool = False
    """Split weights, gradients and the optimiser's moments between the processes that torchrun starts.
    Between steps each process holds only its part of them. The results are the same but for rounding.
    It takes at least two processes. --no-sharded turns it off on --resume."""
    seed: int = 0
    """The seed of the weights, the noise and the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to train on. auto: cuda if there is a CUDA device, and otherwise cpu."""
    out: str | None = None
    """The folder of the run. By default it is runs/DATA-PRESET-INFERENCE, with a number if that folder exists."""
    resume: bool = False
    """Continue the run in --out.
    --steps can be changed then, which moves the end of the learning rate's schedule.
    So can --device, --compile, --micro-batch-size and --sharded.
    So can how often and how much to log, validate, save and keep. The rest cannot."""
    log_every: int = 10
    """The number of slow steps between two lines of metrics."""
    tensorboard: bool = False
    """Also write all metrics for TensorBoard, into the folder tensorboard of the run.
    Needs the package: pip install tensorboard"""
    validate_every: int = 100
    """The number of slow steps between two validations."""
    validation_sequences: int = 8
    """The number of held-out sequences in a validation. The closing report takes up to four times as many others."""
    validation_samples: int = 16
    """The number of draws of z for the held-out bound. The fit of z has never seen them."""
    checkpoint_every: int = 100
    """The number of slow steps between two checkpoints."""
    num_checkpoints: int = 2
    """The number of most recent checkpoints to keep. If the newest is damaged, --resume goes back to the one before it.
    The checkpoint with the best validation so far is kept in addition."""
    model: DecoderConfig = field(default_factory=DecoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schemes: Mapping[str, PosteriorScheme] = field(
        default_factory=lambda: {name: scheme() for name, scheme in SCHEMES.items()},
        hash=False,  # a mapping has none
    )
    """The settings of every scheme, by its name. Its number of steps is --fast-steps."""
    objectives: Mapping[str, Objective] = field(
        default_factory=lambda: {name: objective() for name, objective in OBJECTIVES.items()},
        hash=False,
    )
    """The settings of every objective, by its name."""

    @property
    def objective(self) -> Objective:
        """The objective that `infer_from` names."""
        return self.objectives[self.infer_from]


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
        "infer_from": "whole",
        "steps": 60_000,
        "fast_steps": fast_steps,
        "batch_size": 512,
        "validate_every": 1000,
        "validation_sequences": 16,
        "validation_samples": 64,
        "checkpoint_every": 1000,
    }


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"optimizer": OptimizerConfig(algorithm="muon", learning_rate=1.6e-2, warmup_steps=20, beta_1=0.8)},
    "small": _paper(num_layers=3, num_slots=8, fast_steps=16),
    "medium": _paper(num_layers=6, num_slots=4, fast_steps=16),
    "large": _paper(num_layers=12, num_slots=8, fast_steps=64),
}


def preset(
    name: str,
    inference: str | None = None,
    infer_from: str | None = None,
    thoughts: str | None = None,
    hidden: int | None = None,
) -> TrainConfig:
    """The settings of a preset, with what is given, and with what that needs.

    - An objective that infers z block by block (`past`): thoughts that are fast weights, one for each hidden unit, and
      one fast step if the scheme can absorb a block.
    - `none`: a model without z.
    - A scheme with an encoder: an encoder of what z is inferred from, and no fast steps.

    Names that are unknown make no difference, except for that of the preset.

    Args:
        inference: the name of a scheme, or `none`; None for `map` where z is inferred block by block, and else for
            `vi`.
        infer_from: the name of an objective; None for the preset's own, unless a scheme is given that cannot absorb
            blocks: then for `whole`.
        thoughts: how layers read their thoughts, where that is given.
        hidden: the number of hidden units of a layer, where that is given.

    Raises:
        InputError: if there is no preset of that name.
    """
    if name not in _PRESETS:
        raise InputError(f"unknown preset {name!r}: choose from {', '.join(_PRESETS)}")
    config = TrainConfig(**{"preset": name, **_PRESETS[name]})
    absorbs = inference is None or (inference in SCHEMES and SCHEMES[inference].can_absorb)
    if infer_from not in OBJECTIVES:
        infer_from = config.infer_from if absorbs else "whole"
    reads_blocks = OBJECTIVES[infer_from]().block_size is not None
    if inference is None or inference not in INFERENCES:
        inference = DEFAULT_SCHEME if reads_blocks else COMMON_SCHEME
    model, fast_steps = config.model, config.fast_steps
    if inference == NO_INFERENCE:
        model, fast_steps = dataclasses.replace(model, num_slots=0), 0
    elif reads_blocks:
        fast_steps = 1 if absorbs else fast_steps
        if thoughts != "attended":
            num_slots = model.hidden if hidden is None else hidden
            model = dataclasses.replace(
                model, hidden=num_slots, thoughts="fast-weights", num_slots=num_slots, prior="scaled"
            )
    if _needs_encoder(inference):
        encoder = {"encoder_layers": 1, "encoder_reads": "block"} if reads_blocks else {"encoder_layers": 2}
        if reads_blocks and thoughts != "attended":
            # The encoder works on each slot: with one for each hidden unit it would cost more than the decoder.
            encoder["num_slots"] = min(ENCODED_SLOTS, model.num_slots)
        model, fast_steps = dataclasses.replace(model, **encoder), 0
    return dataclasses.replace(config, inference=inference, infer_from=infer_from, fast_steps=fast_steps, model=model)


def _needs_encoder(inference: str) -> bool:
    return inference in SCHEMES and SCHEMES[inference].needs_encoder


def options_of_scheme(scheme: type[Any], is_optional: bool = False) -> type[Any]:
    """The class of a scheme's settings as options of a command, in which those that are no options are hidden.

    Args:
        is_optional: every setting is None if it is not given, for a command that takes the others from a run.
    """
    fields: list[tuple[str, Any, Any]] = []
    hints = get_type_hints(scheme)
    for setting in dataclasses.fields(scheme):
        if setting.name in NOT_OPTIONS:
            fields.append((setting.name, tyro.conf.Suppress[int], field(default=setting.default)))
        elif is_optional:
            fields.append((setting.name, hints[setting.name] | None, field(default=None)))
    bases = (scheme,)
    options = dataclasses.make_dataclass(scheme.__name__, fields, bases=bases, frozen=True)
    if is_optional:
        options.__post_init__ = lambda self: None  # type: ignore[attr-defined]  # None is in no range
    return options


def parse_naming_schemes(
    default: Config, args: Sequence[str], command: str, common: Sequence[str] | None = None
) -> tuple[Config, SchemeSettings]:
    """The settings of a command, and what it says of the schemes that its `--inference` names.

    Args:
        common: the settings that `--help` explains, besides those of the schemes; `--help-all` explains all.
            None: `--help` does.

    Raises:
        InputError: if the arguments cannot be understood.
    """
    used = [name for name in _values_of("--inference", args) if name in SCHEMES]
    refuse_unused_settings(args, used)
    sections = {name: options_of_scheme(SCHEMES[name], is_optional=True) for name in used}
    fields = [(name, section, field(default=section())) for name, section in sections.items()]
    options = dataclasses.make_dataclass(type(default).__name__, fields, bases=(type(default),), frozen=True)
    options.__doc__ = type(default).__doc__
    shown = None if common is None else [*common, *sections]
    given = vars(cli.parse(options(**vars(default)), args, command, shown))
    settings = {
        name: {key: value for key, value in vars(given[name]).items() if value is not None and key not in NOT_OPTIONS}
        for name in sections
    }
    return type(default)(**{name: given[name] for name in vars(default)}), settings


def with_settings(config: TrainConfig, settings: SchemeSettings) -> TrainConfig:
    """The settings of a run, changed by what a command says of schemes.

    Raises:
        InputError: if a setting is out of range.
    """
    schemes = dict(config.schemes)
    for name, given in settings.items():
        try:
            schemes[name] = dataclasses.replace(schemes[name], **given)
        except ValueError as error:
            raise InputError(cli.with_flags(str(error), f"{name}.", given)) from None
    return dataclasses.replace(config, schemes=schemes)


def refuse_unused_settings(args: Sequence[str], schemes: Collection[str], objective: str | None = None) -> None:
    """Check that no option is a setting of a scheme or an objective that is not used: it would do nothing.

    Args:
        schemes: the names of the schemes that are used.
        objective: the name of the objective that is used; None for a command that has none.

    Raises:
        InputError: if there is one.
    """
    for arg in args:
        option = arg.partition("=")[0]
        scheme, dot, _ = option.removeprefix("--").partition(".")
        if option.startswith("--") and dot and scheme in SCHEMES and scheme not in schemes:
            raise InputError(
                f"{option} is a setting of {scheme}, which is not used: add --inference {scheme}, or leave it out"
            )
        for name, other in OBJECTIVES.items() if objective is not None else ():
            if name != objective and option in {f"--{one.name.replace('_', '-')}" for one in dataclasses.fields(other)}:
                raise InputError(
                    f"{option} is a setting of --infer-from {name}, but the run has {objective}: leave it out"
                )


def _values_of(option: str, args: Sequence[str]) -> list[str]:
    """The values of an option that takes one or more."""
    values: list[str] = []
    is_its = False
    for arg in args:
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            is_its = name == option and not equals
            values += [value] if name == option and equals else []
        elif is_its:
            values.append(arg)
    return values


def scheme_of(config: TrainConfig, inference: str | None = None, fast_steps: int | None = None) -> PosteriorScheme:
    """The posterior scheme that the config names, or another one with the config's settings for it.

    Args:
        inference: the name of another scheme.
        fast_steps: another number of steps than the config's.

    Raises:
        InputError: if there is no such scheme, it needs an encoder and the config's model has none, or the number of
            steps is not a whole number of at least 0.
    """
    inference = config.inference if inference is None else inference
    if inference == NO_INFERENCE:
        return PRIOR
    if inference not in tuple(config.schemes):  # which can be asked of what is no name, too
        raise InputError(f"unknown scheme {inference!r}: choose from {', '.join((*config.schemes, NO_INFERENCE))}")
    if fast_steps is not None:
        require_whole("fast_steps", fast_steps, 0)
    scheme = config.schemes[inference]
    if scheme.needs_encoder and not config.model.encoder_layers:
        raise InputError(
            f"--inference {inference}: {config.out or 'the model'} has no encoder: "
            f"it was trained with --inference {config.inference}"
        )
    return dataclasses.replace(scheme, num_steps=config.fast_steps if fast_steps is None else fast_steps)


def settings_of(config: TrainConfig, scheme: type[Scheme]) -> Scheme:
    """The run's settings of a scheme that is given by its class. Its number of steps has no meaning yet."""
    return next(settings for settings in config.schemes.values() if type(settings) is scheme)


def validate(config: TrainConfig) -> None:
    """Check that every setting is in its range, and that they fit each other.

    Raises:
        InputError: if they do not.
    """
    at_least_1 = (
        "steps",
        "batch_size",
        "micro_batch_size",
        "log_every",
        "validate_every",
        "validation_sequences",
        "validation_samples",
        "checkpoint_every",
        "num_checkpoints",
    )
    cli.require_at_least(config, **dict.fromkeys(at_least_1, 1), fast_steps=0)
    cli.require_seed(config.seed)
    if (config.inference == NO_INFERENCE) != (config.model.num_slots == 0):
        raise InputError(
            f"--inference {config.inference} with --model.num-slots {config.model.num_slots}: 'none' is for the model "
            "without z, which has 0 slots, and every other scheme needs at least 1"
        )
    if config.inference == NO_INFERENCE and config.model.prior != DecoderConfig.prior:
        raise InputError(f"--model.prior {config.model.prior}: a model without z has no prior; leave it out")
    if config.inference == NO_INFERENCE and config.model.thoughts != DecoderConfig.thoughts:
        raise InputError(f"--model.thoughts {config.model.thoughts}: a model without z has no thoughts; leave it out")
    if _needs_encoder(config.inference) != (config.model.encoder_layers > 0):
        with_encoder = ", ".join(name for name in SCHEMES if SCHEMES[name].needs_encoder)
        raise InputError(
            f"--inference {config.inference} with --model.encoder-layers {config.model.encoder_layers}: a scheme with "
            f"an encoder ({with_encoder}) needs at least 1 layer of it, and every other scheme has 0, since it does "
            "not train an encoder"
        )
    if config.inference == NO_INFERENCE and config.objective.block_size is not None:
        raise InputError(f"--infer-from {config.infer_from}: a model without z infers nothing; leave it out")
    needed = "text" if config.objective.block_size is None else "block"
    if _needs_encoder(config.inference) and config.model.encoder_reads != needed:
        raise InputError(
            f"--infer-from {config.infer_from} with --model.encoder-reads {config.model.encoder_reads}: z is inferred "
            f"there from a {needed}, so that the encoder must read a {needed}"
        )
    if config.model.encoder_reads == "block" and config.model.encoder_layers > 1:
        raise InputError(
            f"--model.encoder-layers {config.model.encoder_layers}: an encoder that reads blocks has one layer"
        )
    if not _needs_encoder(config.inference) and config.model.encoder_reads != DecoderConfig.encoder_reads:
        raise InputError(f"--model.encoder-reads {config.model.encoder_reads}: there is no encoder; leave it out")
    if config.inference == NO_INFERENCE and config.fast_steps:
        raise InputError(f"--inference none has nothing to infer: --fast-steps must be 0, not {config.fast_steps}")


def micro_batch_size(config: TrainConfig, device: torch.device, num_processes: int = 1) -> int:
    """The largest divisor of a process's part of the batch that is no larger than the setting."""
    at_most = config.micro_batch_size
    if at_most is None:  # a GPU is idle with few sequences, and with many a processor's caches are too small
        at_most = 8 if device.type == "cpu" else 64
    part = config.batch_size // num_processes
    return max(size for size in range(1, min(part, at_most) + 1) if part % size == 0)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The settings as plain values, for `config.yaml`: those of each scheme and objective stand under its name.

    Fields that are not options of the command are left out.
    """
    values = dataclasses.asdict(config)
    del values["config"]  # what it named has been read
    for name, settings in {**values.pop("objectives"), **values.pop("schemes")}.items():
        section = {key: value for key, value in settings.items() if key not in NOT_OPTIONS}
        if section:
            values[name] = section
    return values


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The inverse of :func:`to_dict`.

    Schemes, objectives, and settings of them that are missing have their defaults, so that a new one needs no migration
    of files: the default of a new setting must be what its scheme or objective did before. The scheme that the run was
    trained with must be there.

    Raises:
        InputError: if a setting is unknown, missing, of the wrong kind or out of range.
    """
    defaults = to_dict(TrainConfig())
    values = dict(values)
    for name in (*SCHEMES, *OBJECTIVES):
        if isinstance(values.get(name), dict):
            values[name] = defaults.get(name, {}) | values[name]
        elif name in defaults and name not in values and name != values.get("inference"):
            values[name] = defaults[name]
    expected, given = flat(defaults).keys(), flat(values).keys()
    if expected != given:
        wrong = {"missing": expected - given, "unknown": given - expected}
        shown = ", ".join(f"{what} [{', '.join(sorted(names))}]" for what, names in wrong.items() if names)
        raise InputError(f"the settings of the run cannot be read: {shown}")
    try:
        sections = {
            name: _section(settings, values.pop(name, {}))
            for name, settings in {
                "model": DecoderConfig,
                "optimizer": OptimizerConfig,
                **SCHEMES,
                **OBJECTIVES,
            }.items()
        }
        _check_types(TrainConfig, values)
        schemes = {name: sections.pop(name) for name in SCHEMES}
        objectives = {name: sections.pop(name) for name in OBJECTIVES}
        config = TrainConfig(**values, **sections, schemes=schemes, objectives=objectives)
        validate(config)
    except ValueError as error:
        raise InputError(f"the settings of the run cannot be read: {error}") from None
    return config


def _section(settings: type[Any], values: dict[str, Any]) -> Any:
    _check_types(settings, values)
    return settings(**values)


def _check_types(settings: type, values: dict[str, Any]) -> None:
    hints = get_type_hints(settings)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{name} is not a setting")
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
    old_values, new_values = flat(to_dict(old)), flat(to_dict(new))
    return {name: (old_values[name], new_values[name]) for name in new_values if old_values[name] != new_values[name]}


def option_of(name: str) -> str:
    """The option of `python -m ltm_pyro.train` for a setting with a dotted name: those of objectives have no prefix."""
    section, _, setting = name.partition(".")
    return f"--{(setting if section in OBJECTIVES else name).replace('_', '-')}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values in sections, under dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        has_parts = isinstance(value, dict) and value
        result |= flat(value, f"{prefix}{name}.") if has_parts else {f"{prefix}{name}": value}
    return result
