"""Examples with their hidden states: what training and evaluation read batches from."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybrid.backbone import Backbone, length_batches, one_text
from hybrid.config import FeatureConfig
from hybrid.data import Example
from hybrid.decoder import FieldBatch
from hybrid.features import FeatureCache, fill_cache, text_key
from hybrid.losses import IGNORED
from hybrid.model import HybridModel

UNKNOWN = "unknown"  # option of a field that may be asked before its answer can be known


class EmbeddedExamples:
    """Examples whose hidden states lie in the feature cache, handed out as padded batches.

    Building one embeds what the cache lacks.

    Args:
        examples: Canonical examples.
        backbone: The frozen model.
        cache: The store that belongs to the backbone's fingerprint.
        token_budget: Tokens in one batch of the backbone.
        progress: Show a progress bar while embedding.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        backbone: Backbone,
        cache: FeatureCache,
        token_budget: int = 2048,
        progress: bool = True,
    ):
        self.examples, self._cache = list(examples), cache
        texts = [(example.context, example.question) for example in self.examples]
        parts = [backbone.parts(*text) for text in texts]
        self._keys = [[text_key(*part) for part in of_text] for of_text in parts]
        fill_cache(cache, backbone, [part for of_text in parts for part in of_text], token_budget, progress)
        of_parts = iter(cache.lengths([key for keys in self._keys for key in keys]))
        self.lengths = [sum(itertools.islice(of_parts, len(keys))) for keys in self._keys]
        self._starts: dict[int, list[int]] = {}
        self._labels = [torch.tensor(label_numbers(example)) for example in self.examples]
        self.num_fields = max(len(example.fields) for example in self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def batches(self, token_budget: int) -> list[list[int]]:
        """Row numbers in batches of similar length."""
        return length_batches(self.lengths, token_budget)

    def batch(
        self, model: HybridModel, rows: Sequence[int], num_fields: int | None = None
    ) -> tuple[Tensor, Tensor, FieldBatch, Tensor]:
        """Hidden states, memory mask, fields and labels of some rows, on the model's device.

        Args:
            model: The head that will read them.
            rows: Row numbers.
            num_fields: Pad the fields to this number.
        """
        token_ids, stored, mask = self._cache.read_padded([self._keys[row] for row in rows])
        starts = [self._field_starts(model, row) for row in rows] if model.config.places is not None else None
        fields = model.field_batch([self.examples[row].fields for row in rows], num_fields, starts)
        labels = torch.full(fields.name_index.shape, IGNORED)
        for position, row in enumerate(rows):
            labels[position, : len(self._labels[row])] = self._labels[row]
        device = model.device
        return model.all_layers(token_ids, stored), mask.to(device), fields, labels.to(device)

    def due_labels(self, rows: Sequence[int], steps: Sequence[int], labels: Tensor) -> Tensor:
        """Labels of what the refinement step that each row takes is asked for (`Example.due`).

        A field that is not due yet is `unknown` if it has that option, and else not asked for.
        """
        if not any(self.examples[row].due for row in rows):
            return labels
        asked = torch.full(labels.shape, IGNORED)
        for position, (row, step) in enumerate(zip(rows, steps, strict=True)):
            example = self.examples[row]
            asked[position, : len(example.fields)] = self._labels[row]
            for number, (field, due) in enumerate(zip(example.fields, example.due or (), strict=False)):
                if due > step and example.answers[number] is not None:
                    has_unknown = UNKNOWN in field.options
                    asked[position, number] = field.options.index(UNKNOWN) if has_unknown else IGNORED
        return asked.to(labels.device)

    def _field_starts(self, model: HybridModel, row: int) -> list[int]:
        if row not in self._starts:
            example = self.examples[row]
            self._starts[row] = model.field_starts(example.fields, one_text(example.context, example.question))
        return self._starts[row]


def label_numbers(example: Example) -> list[int]:
    """Number of the right option in each field, `IGNORED` for a field without an answer."""
    pairs = zip(example.fields, example.answers, strict=True)
    return [IGNORED if answer is None else field.options.index(answer) for field, answer in pairs]


def known_options(examples: Sequence[Example], at_most: int = 1000) -> list[str]:
    """Texts worth a learned residual: options, and names where there are several fields, unless there are too many.

    The static vector of a text does not know the order of its tokens: `r1c2` and `r2c1` have the same.
    """
    asked = {example.fields for example in examples}
    options = {option for fields in asked for field in fields for option in field.options}
    names = {field.name for fields in asked if len(fields) > 1 for field in fields}
    known = sorted(options | names if len(options | names) <= at_most else options)
    return known if len(known) <= at_most else []


def common_fields(examples: Sequence[Example]) -> dict[str, list[str]] | None:
    """Names and options of the fields, when every example asks the same ones."""
    asked = {tuple((field.name, tuple(field.options)) for field in example.fields) for example in examples}
    return {name: list(options) for name, options in asked.pop()} if len(asked) == 1 else None


def common_options(examples: Sequence[Example]) -> list[str] | None:
    """The options of every field, when all have the same ones."""
    options = {field.options for fields in {example.fields for example in examples} for field in fields}
    return list(options.pop()) if len(options) == 1 else None


def common_places(examples: Sequence[Example]) -> dict[str, int] | None:
    """Where fields stand, for the names that always stand at the same character; `None` if none stands.

    A place counted from the start is one of every example, as the cells of grids are; one from the end, of any text.
    """
    found = Counter((field.name, field.at) for example in examples for field in example.fields)
    if all(at is None for _, at in found):
        return None
    num_places = Counter(name for name, _ in found)
    return {
        name: at
        for (name, at), times in sorted(found.items(), key=str)
        if at is not None and num_places[name] == 1 and (at < 0 or times == len(examples))
    }


def embed_examples(
    config: FeatureConfig, backbone: Backbone, examples: Mapping[str, Sequence[Example]], progress: bool = True
) -> dict[str, EmbeddedExamples]:
    """Embed examples of several roles with one backbone; they share its store in the feature cache.

    Args:
        config: The `features` section of a run.
        backbone: The frozen model, with the layers and template to use.
        examples: Examples by role.
        progress: Show progress bars.
    """
    fingerprint, num_layers = backbone.fingerprint(), backbone.num_stored_layers
    cache = FeatureCache.open(config.folder, fingerprint, num_layers, backbone.dim, config.storage)
    smallest_first = sorted(examples, key=lambda role: len(examples[role]))  # what is wrong in it is found early
    embedded = {
        role: EmbeddedExamples(examples[role], backbone, cache, config.token_budget, progress)
        for role in smallest_first
    }
    return {role: embedded[role] for role in examples}
