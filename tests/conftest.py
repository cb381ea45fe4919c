"""Tiny random backbones built from a configuration, a small task, and checked tensor shapes. No network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

TENSOR_MODULES = [f"hybrid.{name}" for name in ("layers", "adapter", "reasoner", "decoder", "losses")]
install_import_hook(TENSOR_MODULES, "beartype.beartype")

import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
)

from hybrid.backbone import Backbone
from hybrid.batches import embed_examples
from hybrid.config import (
    AdapterConfig,
    BackboneConfig,
    DataConfig,
    FeatureConfig,
    ReasonerConfig,
    RunConfig,
    TextConfig,
    TrainingConfig,
)
from hybrid.data import Example
from hybrid.decoder import Field
from hybrid.model import HybridModel

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives

WORDS = "A B C D is left right of above below . ? Where to relative knight knave says and the a".split()
CHOICES = ("left", "right", "above", "below")


def word_tokenizer(*, bert: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation()]
    )
    if bert:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def sentencepiece_tokenizer(folder: Path) -> LlamaTokenizer:
    text = folder / "corpus.txt"
    text.write_text("\n".join(" ".join(random.Random(n).choices(WORDS, k=12)) for n in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        minloglevel=2,
        model_type="bpe",
        hard_vocab_limit=False,
    )
    return LlamaTokenizer.from_pretrained(folder)


def tiny_llama_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    return LlamaConfig(**(sizes | changes))


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_llama_config(**changes))


def chatty_llama() -> LlamaForCausalLM:
    """A random model whose greedy text is no single token repeated."""
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    return model


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """A causal backbone with a word tokenizer."""
    return Backbone(tiny_llama(), word_tokenizer(), name="tiny-llama", layers=[0, 1, 2], template="echo")


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    """The same backbone, saved as any user would have it."""
    folder = tmp_path_factory.mktemp("backbone")
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["llama", "sentencepiece", "bert", "t5"])
def any_backbone(request, tmp_path_factory) -> Backbone:
    """A decoder, a decoder with a sentencepiece tokenizer, an encoder, and an encoder-decoder's encoder."""
    torch.manual_seed(0)
    if request.param == "llama":
        model, tokenizer = tiny_llama(), word_tokenizer()
    elif request.param == "sentencepiece":
        tokenizer = sentencepiece_tokenizer(tmp_path_factory.mktemp("sentencepiece"))
        model = tiny_llama(vocab_size=len(tokenizer))
    elif request.param == "bert":
        config = BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=128,
        )  # fmt: skip
        model, tokenizer = AutoModel.from_config(config), word_tokenizer(bert=True)
    else:
        config = T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=3, num_heads=4, d_kv=8)
        model, tokenizer = AutoModel.from_config(config), word_tokenizer()
    return Backbone(model, tokenizer, name=request.param, layers=[0, 1, 3])


def chain_examples(number: int, seed: int = 0, depths: tuple[int, ...] = (1, 2)) -> list[Example]:
    """Chains `A is left of B . B is left of C .` whose direction is the answer: learnable in seconds."""
    generator = random.Random(seed)
    examples = []
    for row in range(number):
        depth, direction = depths[row % len(depths)], generator.choice(CHOICES)
        names = generator.sample("ABCD", depth + 1)
        context = " ".join(f"{a} is {direction} of {b} ." for a, b in zip(names, names[1:], strict=False))
        question = f"Where is {names[0]} relative to {names[-1]} ?"
        examples.append(
            Example(context, question, (Field("answer", CHOICES),), (direction,), depth, f"chain-{seed}-{row}")
        )
    return examples


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return chain_examples(64)


def tiny_reasoner(**changes) -> ReasonerConfig:
    sizes = {"dim": 32, "num_heads": 4, "intermediate_size": 48, "num_tape_slots": 3, "num_latent_passes": 2}
    return ReasonerConfig(**(sizes | {"num_cycles": 2, "max_steps": 3} | changes))


def tiny_model(backbone: Backbone, **changes) -> HybridModel:
    """An untrained head in float32."""
    torch.manual_seed(0)
    return HybridModel.from_backbone(
        backbone,
        backbone_config=BackboneConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(),
        reasoner=tiny_reasoner(**changes),
        known_options=CHOICES,
        choices=CHOICES,
    ).eval()


def open_gate(model: HybridModel) -> HybridModel:
    """A head whose soft tokens are seen."""
    assert model.text_decoder is not None
    model.text_decoder.gate.bias.data.fill_(5.0)
    return model


@pytest.fixture
def model(backbone) -> HybridModel:
    """An untrained head in float32."""
    return tiny_model(backbone)


@pytest.fixture
def embedded(backbone, examples, tmp_path):
    """The small task, embedded."""
    return embed_examples(FeatureConfig(folder=str(tmp_path)), backbone, {"train": examples}, progress=False)["train"]


def tiny_run(folder: Path, text: TextConfig | None = None, **training) -> RunConfig:
    """A run of a few updates in float32."""
    numbers = {
        "output_folder": str(folder / "run"), "num_updates": 12, "batch_size": 8, "learning_rate": 1e-3,
        "warmup_updates": 2, "eval_every": 6, "save_every": 4, "log_every": 2, "precision": "fp32",
    }  # fmt: skip
    return RunConfig(
        backbone=BackboneConfig(name_or_path="tiny-llama"),
        reasoner=tiny_reasoner(),
        text=text or TextConfig(),
        data=DataConfig(path=str(folder / "data.jsonl"), choices=list(CHOICES)),
        features=FeatureConfig(folder=str(folder / "features")),
        training=TrainingConfig(**(numbers | training)),
    )
