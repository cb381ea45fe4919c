"""What a user would use instead of a head: the frozen model's own answer, probes of its states, other networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from hybrid.backbone import Backbone, length_batches, one_text
from hybrid.batches import EmbeddedExamples
from hybrid.config import RunConfig
from hybrid.data import Example
from hybrid.decoder import Field
from hybrid.evaluation import by_depth
from hybrid.model import HybridModel
from hybrid.refinement import TOKEN_BUDGET

# -- zero-shot -----------------------------------------------------------------------------------------------------


def zero_shot(
    backbone: Backbone, examples: Sequence[Example], progress: bool = True, *, end: str = ""
) -> dict[str, Any]:
    """Answer with the frozen model alone: the option whose text is most likely after the prompt.

    The prompt is `context question`, then `Answer:` (or the field's name) on a new line. Log-likelihoods are summed
    over an option's tokens (`acc` of lm-evaluation-harness); `accuracy_normalized` divides them by its bytes. Without
    an `end`, an option that begins with another one (`son-in-law`) is never more likely than that.

    Args:
        backbone: The frozen model.
        examples: What is asked.
        progress: Show a progress bar.
        end: What follows an option, if the model was trained to end an answer so.

    Raises:
        ValueError: The backbone is no causal language model.
    """
    check_zero_shot(backbone)
    right, normalized, times = [], [], []
    for example in tqdm(examples, unit="question", desc="zero-shot", disable=not progress, leave=False):
        start = time.perf_counter()
        summed, per_byte = [], []
        for field, answer in example.answered:
            scores = option_log_likelihoods(backbone, answer_prompt(example, field), field.options, end)
            num_bytes = torch.tensor([len(option.encode()) for option in field.options])
            summed.append(field.options[int(scores.argmax())] == answer)
            per_byte.append(field.options[int((scores / num_bytes).argmax())] == answer)
        times.append(1000 * (time.perf_counter() - start))
        right.append(all(summed))
        normalized.append(all(per_byte))
    return {
        "name": "frozen LLM, zero-shot",
        "accuracy_by_depth": by_depth(torch.tensor(right), examples),
        "accuracy_normalized": sum(normalized) / len(normalized),
        "milliseconds_per_question": statistics.median(times),
    }


def check_zero_shot(backbone: Backbone) -> None:
    """Refuse a backbone that cannot answer by itself, before anything is computed."""
    if backbone.model.get_output_embeddings() is None:
        raise ValueError(f"{backbone.name} has no language-model head: zero-shot answers need a causal model")


def answer_prompt(example: Example, field: Field) -> str:
    """What the language model is asked: context and question, then `Answer:` or the field's name on a new line.

    With the field `answer`, this is also the prompt of a head that writes text.
    """
    text = one_text(example.context, example.question)
    return f"{text}\n{'Answer' if field.name == 'answer' else field.name}:"


@torch.inference_mode()
def option_log_likelihoods(backbone: Backbone, prompt: str, options: Sequence[str], end: str = "") -> Tensor:
    """Log-likelihood, in nats, of each option's text, and of `end`, after a prompt; the prompt is computed once.

    Returns:
        Tensor of shape (options,).
    """
    tokenizer, model = backbone.tokenizer, backbone.model
    token_ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=backbone.device)
    encoded = tokenizer([f" {option}{end}" for option in options], add_special_tokens=False)["input_ids"]
    cache = DynamicCache(config=model.config)
    first = model(input_ids=token_ids, cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()
    longest = max(map(len, encoded))
    padded = torch.zeros(len(options), longest, dtype=torch.long, device=backbone.device)
    for row, ids in enumerate(encoded):
        padded[row, : len(ids)] = torch.tensor(ids)
    scores = first.log_softmax(-1)[padded[:, 0]]
    if longest > 1:
        cache.batch_repeat_interleave(len(options))
        logits = model(input_ids=padded[:, :-1], cache=cache, use_cache=True).logits.float()
        following = logits.log_softmax(-1).gather(2, padded[:, 1:, None]).squeeze(2)
        lengths = torch.tensor([len(ids) for ids in encoded], device=padded.device)
        exists = torch.arange(1, longest, device=padded.device) < lengths[:, None]
        scores = scores + (following * exists).sum(1)
    return scores.cpu()


# -- heads without recursion, or without a language model ----------------------------------------------------------


def one_pass(config: RunConfig) -> RunConfig:
    """The same head with equal parameters and no recursion: the network is applied once."""
    return _without_recursion(config, num_layers=config.reasoner.num_layers)


def deep(config: RunConfig) -> RunConfig:
    """A head without recursion at equal compute: as many layers as `max_steps` apply, each with its own weights."""
    reasoner = config.reasoner
    passes = reasoner.max_steps * reasoner.num_cycles * (reasoner.num_latent_passes + 1)
    return _without_recursion(config, num_layers=reasoner.num_layers * passes)


def without_backbone(config: RunConfig) -> RunConfig:
    """The same reasoner on token embeddings alone, each token a slot with rotary positions, as in TRM.

    The embeddings are the language model's own, looked up; none of its blocks runs.
    """
    backbone = replace(config.backbone, layers=[0], template="plain", memory="tokens")
    return replace(config, backbone=backbone, reasoner=replace(config.reasoner, refine_memory=True, rotary=True))


def _without_recursion(config: RunConfig, num_layers: int) -> RunConfig:
    reasoner = replace(config.reasoner, num_layers=num_layers, num_latent_passes=0, num_cycles=1, max_steps=1)
    reasoner.num_gradient_cycles = 1
    return replace(config, reasoner=reasoner, training=replace(config.training, recursion_schedule=[]))


# -- probes --------------------------------------------------------------------------------------------------------


def linear_probe(
    model: HybridModel,
    train: EmbeddedExamples,
    test: EmbeddedExamples,
    *,
    max_train: int = 10_000,
    weight_decays: Sequence[float] = (1e-4, 1e-3, 1e-2),
    seed: int = 0,
) -> dict[str, Any]:
    """Multinomial logistic regression on pooled hidden states (mean and last token of the head's own layers).

    Several fields are several rows, told apart by the vector of the field's name; `max_train` counts these. The weight
    decay is chosen on a fifth of the training rows.

    Returns:
        Accuracy by depth on `test`, training accuracy, seconds and number of parameters.
    """
    fit = partial(fit_logistic, weight_decays=weight_decays)
    return {"name": "linear probe, pooled states", **_probe(fit, model, train, test, max_train, seed)}


def mlp_probe(
    model: HybridModel, train: EmbeddedExamples, test: EmbeddedExamples, *, max_train: int = 50_000, seed: int = 0
) -> dict[str, Any]:
    """As `linear_probe`, with one hidden layer, stopped early on a fifth of the training rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"name": "MLP probe, pooled states", **_probe(fit_mlp, model, train, test, max_train, seed)}


def _probe(
    fit: Callable[[Tensor, Tensor, int], tuple[nn.Module, float]],
    model: HybridModel,
    train: EmbeddedExamples,
    test: EmbeddedExamples,
    max_train: int,
    seed: int,
) -> dict[str, Any]:
    start = time.perf_counter()
    order, named = _drawn(train, max_train, seed), max(train.num_fields, test.num_fields) > 1
    features, _ = _pooled(model, train, order, named)
    options = sorted({option for row in order for field in train.examples[row].fields for option in field.options})
    labels = _labels(train, order, options)
    probe, accuracy = fit(features, labels, len(options))
    test_rows = list(range(len(test)))
    test_features, owners = _pooled(model, test, test_rows, named)
    with torch.no_grad():
        logits = probe(test_features)
    logits = logits.masked_fill(~_offered(test, test_rows, options), float("-inf"))
    hits = logits.argmax(1) == _labels(test, test_rows, options)
    right = torch.ones(len(test)).scatter_reduce(0, owners, hits.float(), "amin").bool()
    return {
        "accuracy_by_depth": by_depth(right, test.examples),
        "train_accuracy": accuracy,
        "train_rows": len(order),
        "num_parameters": sum(p.numel() for p in probe.parameters()),
        "train_seconds": time.perf_counter() - start,
    }


def _drawn(train: EmbeddedExamples, max_train: int, seed: int) -> list[int]:
    """Training questions in any order, as many as have at most `max_train` answers."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    num_answers = torch.tensor([len(train.examples[row].answered) for row in order.tolist()]).cumsum(0)
    return order[num_answers <= max(max_train, int(num_answers[0]))].tolist()


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, weight_decays: Sequence[float], held_out: float = 0.2
) -> tuple[nn.Module, float]:
    """Fit a logistic regression by L-BFGS on standardised features; keep the weight decay best on held-out rows.

    Returns:
        The probe (standardisation included), refitted on all rows, and its accuracy on them.
    """
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    scaled, cut = (features - mean) / std, int(len(features) * (1 - held_out))
    scores = []
    for decay in weight_decays:
        linear = _fit(scaled[:cut], labels[:cut], num_classes, decay)
        scores.append(float((linear(scaled[cut:]).argmax(1) == labels[cut:]).float().mean()))
    linear = _fit(scaled, labels, num_classes, weight_decays[scores.index(max(scores))])
    with torch.no_grad():  # fold the standardisation into the weights
        linear.bias.sub_((linear.weight / std) @ mean)
        linear.weight.div_(std)
    accuracy = float((linear(features).argmax(1) == labels).float().mean())
    return linear.requires_grad_(False), accuracy


def fit_mlp(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    hidden_size: int = 1024,
    max_epochs: int = 40,
    patience: int = 4,
    held_out: float = 0.2,
) -> tuple[nn.Module, float]:
    """Fit a network with one hidden layer (AdamW, dropout), and keep the epoch best on held-out rows.

    Returns:
        The network (standardisation included), and its accuracy on the rows it was fitted on.
    """
    cut = int(len(features) * (1 - held_out))
    norm = nn.BatchNorm1d(features.shape[1], affine=False, momentum=None)  # one pass over all rows: plain means
    norm(features[:cut])
    network = nn.Sequential(
        norm,
        nn.Linear(features.shape[1], hidden_size),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(hidden_size, num_classes),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    best, best_state, num_bad = -1.0, network.state_dict(), 0
    for _ in range(max_epochs):
        network.train()
        norm.eval()
        for rows in torch.randperm(cut).split(256):
            optimizer.zero_grad()
            F.cross_entropy(network(features[rows]), labels[rows]).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            accuracy = float((network(features[cut:]).argmax(1) == labels[cut:]).float().mean())
        num_bad = 0 if accuracy > best else num_bad + 1
        if accuracy > best:
            best, best_state = accuracy, {name: value.clone() for name, value in network.state_dict().items()}
        if num_bad == patience:
            break
    network.load_state_dict(best_state)
    with torch.no_grad():
        fitted = float((network(features[:cut]).argmax(1) == labels[:cut]).float().mean())
    return network.requires_grad_(False), fitted


def _fit(features: Tensor, labels: Tensor, num_classes: int, weight_decay: float) -> nn.Linear:
    linear = nn.Linear(features.shape[1], num_classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(features), labels) + weight_decay * linear.weight.pow(2).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear


def _pooled(model: HybridModel, examples: EmbeddedExamples, rows: Sequence[int], named: bool) -> tuple[Tensor, Tensor]:
    """Pooled states of each (row, field with an answer) pair, and the position in `rows` that it belongs to.

    With `named`, the vector of the field's name follows them.
    """
    pooled: dict[int, Tensor] = {}
    for batch in length_batches([examples.lengths[row] for row in rows], TOKEN_BUDGET):
        hidden_states, mask, _, _ = examples.batch(model, [rows[position] for position in batch])
        states, exists = hidden_states.float().flatten(2).cpu(), mask.cpu()
        mean = (states * exists.unsqueeze(-1)).sum(1) / exists.sum(1, keepdim=True)
        last = states[torch.arange(len(batch)), exists.sum(1) - 1]
        pooled.update(zip(batch, torch.cat([mean, last], dim=1), strict=True))
    owners = [position for position, row in enumerate(rows) for _ in examples.examples[row].answered]
    features = torch.stack([pooled[position] for position in owners])
    if named:
        names = [field.name for row in rows for field, _ in examples.examples[row].answered]
        number = {name: index for index, name in enumerate(sorted(set(names)))}
        vectors = model.backbone.text_vectors(list(number)).cpu()
        features = torch.cat([features, vectors[[number[name] for name in names]]], dim=1)
    return features, torch.tensor(owners)


def _labels(examples: EmbeddedExamples, rows: Sequence[int], options: Sequence[str]) -> Tensor:
    number = {option: index for index, option in enumerate(options)}
    return torch.tensor([number.get(answer, -1) for row in rows for _, answer in examples.examples[row].answered])


def _offered(examples: EmbeddedExamples, rows: Sequence[int], options: Sequence[str]) -> Tensor:
    offered = [frozenset(field.options) for row in rows for field, _ in examples.examples[row].answered]
    masks = {own: torch.tensor([option in own for option in options]) for own in set(offered)}
    return torch.stack([masks[own] for own in offered])


# -- which layer to use --------------------------------------------------------------------------------------------


def probe_layers(
    backbone: Backbone,
    train: Sequence[Example],
    test: Sequence[Example],
    *,
    token_budget: int = 2048,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Linear-probe accuracy of every backbone layer, for questions with one answer.

    Returns:
        One row per layer (0 is the embedding): accuracy by depth on `test`, and training accuracy.

    Raises:
        ValueError: A question has several fields.
    """
    if any(len(example.fields) > 1 for example in [*train, *test]):
        raise ValueError("layers are probed on questions with one answer: these have several fields")
    options = sorted({option for example in train for option in example.fields[0].options})
    train_states = _pooled_layers(backbone, train, token_budget, progress)
    test_states = _pooled_layers(backbone, test, token_budget, progress)
    labels, expected = (
        torch.tensor([options.index(right) if right in options else -1 for e in examples for _, right in e.answered])
        for examples in (train, test)
    )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))  # a file may be sorted by depth
    train_states, labels = train_states[order], labels[order]
    rows = []
    for layer in tqdm(range(backbone.num_layers + 1), unit="layer", desc="probe", disable=not progress, leave=False):
        probe, accuracy = fit_logistic(train_states[:, layer], labels, len(options), (1e-3, 1e-2))
        right = probe(test_states[:, layer]).argmax(1) == expected
        rows.append({"layer": layer, "train_accuracy": accuracy, "accuracy_by_depth": by_depth(right, test)})
    return rows


def _pooled_layers(backbone: Backbone, examples: Sequence[Example], token_budget: int, progress: bool) -> Tensor:
    """Mean and last vector of memory at every layer, (examples, layers + 1, 2 · backbone_dim)."""
    view = backbone.with_settings(range(backbone.num_layers + 1), backbone.template, backbone.memory)
    prompts = view.prompts([(example.context, example.question) for example in examples])
    lengths = [len(prompt.token_ids) for prompt in prompts]
    pooled = torch.empty(len(examples), backbone.num_layers + 1, 2 * backbone.dim)
    with tqdm(total=sum(lengths), unit="tok", unit_scale=True, desc="embed", disable=not progress, leave=False) as bar:
        for rows in length_batches(lengths, token_budget):
            chosen = [prompts[row] for row in rows]
            for row, prompt, state in zip(rows, chosen, view.hidden_states(chosen), strict=True):
                if view.memory == "tokens":  # their embeddings are not stored
                    state = torch.cat([view.embed_tokens(torch.tensor(prompt.memory_ids)).unsqueeze(1), state], dim=1)
                pooled[row] = torch.cat([state.float().mean(0), state[-1].float()], dim=1).cpu()
            bar.update(sum(lengths[row] for row in rows))
    return pooled
