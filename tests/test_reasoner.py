"""The algorithm: gradient through the last cycle only, constant memory, shared weights, halting."""

from __future__ import annotations

import pytest
import torch

from hybrid.reasoner import ReasonerState, RecursiveReasoner, has_halted, state_movement

BATCH, TOKENS, SLOTS, DIM = 3, 5, 4, 16


def reasoner(**changes) -> RecursiveReasoner:
    torch.manual_seed(0)
    numbers = {"dim": DIM, "num_heads": 2, "intermediate_size": 24, "num_latent_passes": 2, "num_cycles": 3}
    return RecursiveReasoner(**(numbers | changes))


def inputs(module: RecursiveReasoner, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randn(BATCH, SLOTS, DIM, generator=generator)
    memory = torch.randn(BATCH, TOKENS, DIM, generator=generator)
    memory_mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    memory_mask[1, 3:] = False
    projected = module.project_memory(memory, memory_mask, torch.ones(BATCH, SLOTS, dtype=torch.bool))
    return slots, projected, module.initial_state(slots)


def gradients(module: RecursiveReasoner, y: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)  # y is normalised: its plain sum of squares is constant
    (y * weights).sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


def test_gradient_equals_that_of_the_last_cycle_alone():
    module = reasoner()
    slots, memory, state = inputs(module)
    _, y = module.refinement_step(slots, memory, state)
    truncated = gradients(module, y)

    slots, memory, state = inputs(module)
    with torch.no_grad():
        for _ in range(2):
            state = module.refine_once(slots, memory, state, 2)
    last = module.refine_once(slots, memory, ReasonerState(state.y.detach(), state.z.detach()), 2)
    for one, other in zip(truncated, gradients(module, last.y), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_full_backpropagation_is_an_option_and_differs():
    truncated, full = reasoner(), reasoner(num_gradient_cycles=3)
    results = []
    for module in (truncated, full):
        _, y = module.refinement_step(*inputs(module))
        results.append((y.detach(), gradients(module, y)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)  # the same function …
    assert any(not torch.allclose(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))  # … not gradient


def saved_bytes(module: RecursiveReasoner, num_cycles: int, num_steps: int = 1) -> int:
    """Bytes that autograd keeps for the last of `num_steps` refinement steps' backward pass."""
    total = 0

    def count(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    slots, memory, state = inputs(module)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        for _ in range(num_steps):
            total = 0
            state, y = module.refinement_step(slots, memory, state, num_cycles=num_cycles)
    assert y.requires_grad
    return total


def test_memory_for_backward_does_not_grow_with_cycles_or_steps():
    module = reasoner()
    once = saved_bytes(module, num_cycles=1)
    assert once > 0
    assert saved_bytes(module, num_cycles=3) == once
    assert saved_bytes(module, num_cycles=12) == once
    assert saved_bytes(module, num_cycles=3, num_steps=4) == once
    assert saved_bytes(reasoner(num_gradient_cycles=12, num_cycles=12), num_cycles=12) > 5 * once


def test_state_for_the_next_step_is_detached():
    module = reasoner()
    state, y = module.refinement_step(*inputs(module))
    assert not state.y.requires_grad and not state.z.requires_grad and y.requires_grad


def test_levels_share_weights_by_default_and_can_be_untied():
    tied, untied = reasoner(), reasoner(tie_levels=False)
    count = [sum(p.numel() for p in module.parameters()) for module in (tied, untied)]
    assert count[1] == 2 * count[0]
    _, y = untied.refinement_step(*inputs(untied))
    assert all(gradient.abs().sum() > 0 for gradient in gradients(untied, y))


def test_memory_is_projected_once_per_refinement_step(monkeypatch):
    module, calls = reasoner(), []
    attention = type(module.networks[0].layers[0].attention)
    original = attention.project_memory
    monkeypatch.setattr(attention, "project_memory", lambda *args: calls.append(1) or original(*args))
    module.refinement_step(*inputs(module))
    assert len(calls) == 2  # one per layer, though the step runs 3 · (2 + 1) passes


def test_padding_of_memory_changes_nothing():
    module = reasoner()
    slots, _, state = inputs(module)
    memory = torch.randn(BATCH, TOKENS, DIM)
    slot_mask = torch.ones(BATCH, SLOTS, dtype=torch.bool)
    exists = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    _, y = module.refinement_step(slots, module.project_memory(memory, exists, slot_mask), state)
    padded = torch.cat([memory, 100 * torch.randn(BATCH, 3, DIM)], dim=1)
    exists = torch.cat([exists, torch.zeros(BATCH, 3, dtype=torch.bool)], dim=1)
    _, same = module.refinement_step(slots, module.project_memory(padded, exists, slot_mask), state)
    torch.testing.assert_close(y, same, rtol=1e-5, atol=1e-5)


def test_rotary_positions_tell_the_order_of_the_memory_and_only_distances_count():
    slots, memory = torch.randn(1, 2, DIM), torch.randn(1, TOKENS, DIM)
    exists, slot_mask = torch.ones(1, TOKENS, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)

    def refined(module, memory, mask, start):
        positions = torch.full((1, 2), start)
        projected = module.project_memory(memory, mask, slot_mask, positions)
        return module.refinement_step(slots, projected, module.initial_state(slots))[1]

    plain, rotary = reasoner(), reasoner(rotary=True)
    swapped = memory.flip(1)
    torch.testing.assert_close(
        refined(plain, memory, exists, 5), refined(plain, swapped, exists, 5), rtol=1e-4, atol=1e-5
    )
    base = refined(rotary, memory, exists, 5)
    assert not torch.allclose(base, refined(rotary, swapped, exists, 5), atol=1e-2)
    later = torch.cat([torch.zeros(1, 3, DIM), memory], dim=1)  # three absent tokens before it: all moves by three
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.bool), exists], dim=1)
    torch.testing.assert_close(base, refined(rotary, later, mask, 8), rtol=1e-4, atol=1e-5)


def test_halting():
    y = torch.ones(2, 3, 4)
    moved = y.clone()
    moved[1] += 0.5
    mask = torch.ones(2, 3, dtype=torch.bool)
    logits = torch.tensor([1.0, -1.0])
    assert has_halted("learned", logits, y, moved, mask, 0.1).tolist() == [True, False]
    assert has_halted("convergence", logits, y, moved, mask, 0.1).tolist() == [True, False]
    assert has_halted("never", logits, y, moved, mask, 0.1).tolist() == [False, False]
    with pytest.raises(ValueError, match="halting='sometimes'"):
        has_halted("sometimes", logits, y, moved, mask, 0.1)


def test_state_movement_is_relative_to_the_length():
    y, mask = torch.full((1, 2, 8), 2.0), torch.ones(1, 2, dtype=torch.bool)
    assert state_movement(y, torch.full_like(y, 1.5), mask).item() == pytest.approx(0.25)


def test_convergence_ignores_slots_that_do_not_exist():
    y, moved = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    moved[0, 2] += 100
    mask = torch.tensor([[True, True, False]])
    assert has_halted("convergence", torch.zeros(1), y, moved, mask, 0.1).item()


def test_initial_noise_is_only_on_z():
    module = reasoner()
    slots = torch.zeros(BATCH, SLOTS, DIM)
    quiet, noisy = module.initial_state(slots), module.initial_state(slots, noise=1.0)
    assert torch.equal(quiet.y, noisy.y) and not torch.equal(quiet.z, noisy.z)
