"""Fields and their scores."""

from __future__ import annotations

import pytest
import torch

from hybrid.decoder import Field
from hybrid.losses import IGNORED, all_fields_right, answer_loss, halting_loss, refinement_loss


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", ["a", "b"], "needs a name"),
        ("x", ["a"], "at least two"),
        ("x", "knight, knave", "give a list of texts"),
        ("x", ["a", " "], "not empty"),
        ("x", ["a", "b", "a"], r"appear twice: \['a'\]"),
    ],
)
def test_field_refuses_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        Field(name, options)


def test_string_is_a_sequence_of_one_character_options():
    assert Field("r1c1", "1234").options == ("1", "2", "3", "4")


def scores_of(model, fields):
    batch = model.field_batch([fields])
    torch.manual_seed(3)
    y = torch.randn(1, batch.name_index.shape[1] + 3, model.config.reasoner.dim)
    return model.decoder(y, batch)[0]


def test_permuting_options_permutes_scores(model):
    options = ["left", "right", "above", "never seen"]
    scores = scores_of(model, [Field("answer", options)])
    order = [2, 0, 3, 1]
    permuted = scores_of(model, [Field("answer", [options[index] for index in order])])
    torch.testing.assert_close(permuted, scores[:, :, order])


def test_unseen_options_are_scored_and_known_ones_have_a_residual(model):
    fields = [Field("answer", ["left", "knight"])]
    before = scores_of(model, fields)
    with torch.no_grad():
        model.decoder.known_residual += 1.0
    after = scores_of(model, fields)
    assert not torch.isclose(before[0, 0, 0], after[0, 0, 0])
    torch.testing.assert_close(before[0, 0, 1], after[0, 0, 1])


def test_rows_with_different_fields_share_a_batch(model):
    one, two = [Field("A", ["left", "right"])], [Field("B", ["left", "right", "above"]), Field("C", ["left", "right"])]
    batch = model.field_batch([one, two])
    assert batch.field_mask.tolist() == [[True, False], [True, True]]
    slots, mask = model.decoder.slots(batch)
    assert slots.shape[1] == 2 + 3 and mask[0].tolist() == [True, False, True, True, True]
    scores, _ = model.decoder(torch.randn(2, 5, model.config.reasoner.dim), batch)
    assert torch.isinf(scores[0, 0, 2]) and torch.isinf(scores[0, 1]).all() and torch.isfinite(scores[1, 0]).all()


def test_losses_ignore_fields_that_do_not_exist():
    scores = torch.tensor([[[2.0, 0.0], [float("-inf")] * 2], [[0.0, 1.0], [3.0, 0.0]]], requires_grad=True)
    labels = torch.tensor([[0, IGNORED], [1, 1]])
    expected_first = torch.nn.functional.cross_entropy(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    losses = answer_loss(scores, labels)
    torch.testing.assert_close(losses[0], expected_first)
    losses.sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert all_fields_right(scores.detach(), labels).tolist() == [True, False]


def test_refinement_loss_is_answer_plus_weighted_halting():
    scores, labels = torch.randn(4, 2, 3), torch.randint(0, 3, (4, 2))
    halt_logits = torch.randn(4)
    parts = refinement_loss(scores, halt_logits, labels, halt_loss_weight=0.5)
    right = all_fields_right(scores, labels)
    expected = answer_loss(scores, labels).mean() + 0.5 * halting_loss(halt_logits, right).mean()
    torch.testing.assert_close(parts["loss"], expected)


def test_what_is_not_due_costs_nothing_and_the_q_head_goes_by_the_end():
    scores, labels = torch.randn(4, 2, 3), torch.randint(0, 3, (4, 2))
    scores.scatter_(2, labels[..., None], 9.0)  # all right in the end
    due, halt_logits = labels.clone(), torch.randn(4)
    due[0], due[1, 1] = IGNORED, (labels[1, 1] + 1) % 3
    parts = refinement_loss(scores, halt_logits, labels, due_labels=due)
    torch.testing.assert_close(parts["answer_loss"], answer_loss(scores, due).mean())
    torch.testing.assert_close(parts["halt_loss"], halting_loss(halt_logits, torch.ones(4, dtype=torch.bool)).mean())
    assert float(parts["accuracy"]) == 0.75
