"""Every kind of adapter: shapes, padding, parameters."""

from __future__ import annotations

import pytest
import torch

from hybrid.adapter import Adapter

BATCH, TOKENS, LAYERS, WIDTH, DIM = 2, 5, 3, 12, 8


def adapter(**changes) -> Adapter:
    torch.manual_seed(0)
    numbers = {"num_layers": LAYERS, "backbone_dim": WIDTH, "dim": DIM, "num_heads": 2, "num_vectors": 4}
    return Adapter(**(numbers | changes)).eval()


@pytest.mark.parametrize("kind", ["linear", "mlp", "resampler"])
@pytest.mark.parametrize("layer_mix", ["concat", "weighted_sum"])
def test_memory_does_not_depend_on_padding(kind, layer_mix):
    module = adapter(kind=kind, layer_mix=layer_mix)
    states = torch.randn(BATCH, TOKENS, LAYERS, WIDTH)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    memory, exists = module(states, mask)
    padding = 50 * torch.randn(BATCH, 3, LAYERS, WIDTH)
    padded, padded_exists = module(
        torch.cat([states, padding], 1), torch.cat([mask, torch.zeros(BATCH, 3, dtype=torch.bool)], 1)
    )
    length = memory.shape[1]
    assert length == (4 if kind == "resampler" else TOKENS)
    torch.testing.assert_close(padded[:, :length], memory, rtol=1e-5, atol=1e-5)
    assert exists.all() and padded_exists.sum() == exists.sum()


def test_every_dimension_is_standardised_whatever_its_size():
    module = adapter()
    states = torch.randn(BATCH, TOKENS, LAYERS, WIDTH)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    huge = states * torch.logspace(-2, 3, WIDTH) + torch.linspace(-500, 500, WIDTH)
    memories = []
    for hidden_states in (states, huge):
        module.fit_statistics(hidden_states.flatten(0, 1))
        memories.append(module(hidden_states, mask)[0])
    torch.testing.assert_close(memories[0], memories[1], rtol=1e-2, atol=1e-2)
    assert "center" in module.state_dict()  # statistics travel with the head


def test_whitened_dimensions_are_uncorrelated_and_travel_with_the_head():
    torch.manual_seed(0)
    module, mixing = adapter(whiten=True), torch.randn(WIDTH, WIDTH)
    states = torch.randn(4000, LAYERS, WIDTH) @ mixing + 3
    module.fit_statistics(states)
    seen = []
    module.projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(states.unsqueeze(0), torch.ones(1, 4000, dtype=torch.bool))
    whitened = seen[0][0].unflatten(1, (LAYERS, WIDTH))
    for layer in range(LAYERS):
        covariance = whitened[:, layer].T.cov()
        assert (covariance - covariance.diag().diag()).abs().max() < 0.02
        assert covariance.diag().max() < 1.01 and covariance.diag().median() > 0.8  # less where little varied
    assert module.state_dict()["whitening"].shape == (LAYERS, WIDTH, WIDTH)
    assert "whitening" not in adapter().state_dict()


def test_what_never_varied_in_training_is_not_read():
    module, states = adapter(), torch.randn(8, TOKENS, LAYERS, WIDTH)
    states[..., 0] = 0.25
    module.fit_statistics(states.flatten(0, 1))
    other = states.clone()
    other[..., 0] = 3.0  # of a text that ends otherwise
    mask = torch.ones(8, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(module(other, mask)[0], module(states, mask)[0])


def test_weighted_sum_learns_its_mix():
    module = adapter(layer_mix="weighted_sum")
    memory, _ = module(torch.randn(BATCH, TOKENS, LAYERS, WIDTH), torch.ones(BATCH, TOKENS, dtype=torch.bool))
    memory[..., 0].sum().backward()
    assert module.mix_logits.grad.abs().sum() > 0
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in adapter().parameters())


def test_dropout_hides_memory_in_training_only_and_never_all_of_it():
    module = adapter(dropout=0.9)
    states, mask = torch.randn(8, TOKENS, LAYERS, WIDTH), torch.ones(8, TOKENS, dtype=torch.bool)
    assert module(states, mask)[1].all()
    mask[:, 2:] = False  # what is padding must not count as kept
    visible = module.train()(states, mask)[1]
    assert visible.any(1).all() and not visible[:, 2:].any()
    assert visible.sum() < mask.sum()
