"""Answers: early exit, batch composition, rollouts, several fields."""

from __future__ import annotations

import pytest
import torch
from conftest import CHOICES, chain_examples, tiny_model

from hybrid import refinement
from hybrid.decoder import Field
from hybrid.inference import answer_batch
from hybrid.model import HybridModel
from hybrid.refinement import noisy_copies, refine, refine_rollouts

QUESTIONS = [f"{example.context} {example.question}" for example in chain_examples(7)]


@pytest.fixture(params=["memory read only", "memory refined"])
def undecided(backbone, request):
    """A head whose rows halt at different steps: its q is random, and centred on what the rows say at first."""
    refined = request.param == "memory refined"
    model = tiny_model(backbone, refine_memory=refined, rotary=refined)
    torch.manual_seed(1)
    with torch.no_grad():
        model.decoder.halt_head.weight.normal_()
        first = refine(model, *batch_of(model, QUESTIONS), max_steps=1, halting="never")
        model.decoder.halt_head.bias -= first.halt_logits.sort().values[2:4].mean()  # between two rows, not on one
    return model


def batch_of(model, questions):
    hidden_states, mask = model.embed([(None, question) for question in questions])
    return hidden_states, mask, model.field_batch([[Field("answer", CHOICES)]] * len(questions))


def test_early_exit_equals_each_row_alone(undecided):
    together = refine(undecided, *batch_of(undecided, QUESTIONS), max_steps=8)
    assert len(set(together.steps.tolist())) > 1, "rows must halt at different steps for this test to tell anything"
    for row, question in enumerate(QUESTIONS):
        alone = refine(undecided, *batch_of(undecided, [question]), max_steps=8)
        assert alone.steps[0] == together.steps[row]
        torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=1e-4, atol=1e-4)


def test_halted_rows_leave_the_batch(undecided, monkeypatch):
    sizes = []
    step = undecided.reasoner.refinement_step
    monkeypatch.setattr(undecided.reasoner, "refinement_step", lambda x, m, s: sizes.append(len(x)) or step(x, m, s))
    result = refine(undecided, *batch_of(undecided, QUESTIONS), max_steps=8)
    expected = [int((result.steps >= step).sum()) for step in range(1, int(result.steps.max()) + 1)]
    assert sizes == expected and sizes[-1] < sizes[0]


def test_steps_of_the_curve_are_those_of_shorter_runs(model):
    curve = refine(model, *batch_of(model, QUESTIONS), max_steps=4, halting="never", by_step=True)
    short = refine(model, *batch_of(model, QUESTIONS), max_steps=2, halting="never")
    torch.testing.assert_close(curve.scores_by_step[1], short.scores)
    torch.testing.assert_close(curve.scores_by_step[3], curve.scores)
    assert (curve.steps == 4).all() and (short.steps == 2).all()


def test_convergence_halting_stops_a_state_that_stands_still(model):
    model.config.reasoner.convergence_tolerance = 1e9
    assert (refine(model, *batch_of(model, QUESTIONS), max_steps=5, halting="convergence").steps == 1).all()
    model.config.reasoner.convergence_tolerance = 1e-9
    assert (refine(model, *batch_of(model, QUESTIONS), max_steps=3, halting="convergence").steps == 3).all()


@pytest.mark.parametrize("rollouts", [1, 4])
def test_batch_composition_and_padding_change_no_answer(undecided, rollouts):
    asked = {"choices": CHOICES, "halting": "never", "rollouts": rollouts}
    together = answer_batch(undecided, QUESTIONS, **asked)
    for question, expected in zip(QUESTIONS, together, strict=True):
        alone = undecided.answer(question, **asked)
        assert alone.value == expected.value and alone.steps == expected.steps
        assert alone.probability == pytest.approx(expected.probability, abs=1e-5)


def test_other_rows_with_more_fields_change_no_noise(undecided):
    hidden_states, mask = undecided.embed([(None, question) for question in QUESTIONS[:2]])
    one, two = [Field("answer", CHOICES)], [Field("A", CHOICES), Field("B", CHOICES)]
    both = undecided.field_batch([one, two])
    noisy = noisy_copies(undecided, hidden_states, mask, both, 3, halting="never")
    alone = noisy_copies(
        undecided, hidden_states[:1, : mask[0].sum()], mask[:1, : mask[0].sum()], undecided.field_batch([one]), 3,
        halting="never",
    )  # fmt: skip
    for run, expected in zip(noisy, alone, strict=True):
        torch.testing.assert_close(run.scores[0, 0], expected.scores[0, 0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(noisy[1].scores[0, 0], noisy[2].scores[0, 0])  # each copy has noise of its own


def test_a_head_in_training_answers_without_dropout_and_trains_on(backbone):
    model = tiny_model(backbone, dropout=0.5)
    expected = model.eval().answer(QUESTIONS[0], choices=CHOICES)
    model.train()
    assert model.answer(QUESTIONS[0], choices=CHOICES).probability == pytest.approx(expected.probability)
    assert model.training


def test_space_around_texts_changes_no_answer(model):
    expected = model.answer("Where is A ?", context="A is left of B .", max_steps=2)
    spaced = model.answer(" Where is A ?\n", context="A is left of B .\n\n", max_steps=2)
    assert spaced.probability == expected.probability


def test_contexts_are_as_many_as_questions(model):
    with pytest.raises(ValueError, match="contexts: expected a list with one for each of 2 questions, got 1 of them"):
        answer_batch(model, QUESTIONS[:2], contexts=["A is left of B ."])
    with pytest.raises(ValueError, match="got the text 'AB'"):
        answer_batch(model, QUESTIONS[:2], contexts="AB")


def test_order_of_choices_changes_no_answer(model):
    forward, backward = model.answer(QUESTIONS[0], choices=CHOICES), model.answer(QUESTIONS[0], choices=CHOICES[::-1])
    assert forward.value == backward.value and forward.probability == pytest.approx(backward.probability, abs=1e-5)


def test_answer_tells_its_course(model):
    answer = model.answer(QUESTIONS[0], max_steps=2, halting="never")
    assert answer.steps == len(answer.trace) == 2
    last = answer.trace[-1]["answer"]
    assert sum(last.values()) == pytest.approx(1.0, abs=1e-5)
    assert last[answer.value] == pytest.approx(answer.probability) == pytest.approx(max(last.values()))


def test_several_fields_with_different_numbers_of_options(model):
    fields = [Field("A", ["knight", "knave"]), Field("B", ["left", "right", "above"])]
    answer = model.answer("A says B .", fields=fields)
    assert set(answer.value) == {"A", "B"}
    assert set(answer.trace[-1]["A"]) == {"knight", "knave"} and len(answer.trace[-1]["B"]) == 3
    expected = answer.trace[-1]["A"][answer.value["A"]] * answer.trace[-1]["B"][answer.value["B"]]
    assert answer.probability == pytest.approx(expected)


def test_one_rollout_is_refine_and_more_are_reproducible(model):
    plain = refine(model, *batch_of(model, QUESTIONS))
    torch.testing.assert_close(refine_rollouts(model, *batch_of(model, QUESTIONS), rollouts=1).scores, plain.scores)
    two = [refine_rollouts(model, *batch_of(model, QUESTIONS), rollouts=4, seed=5).scores for _ in range(2)]
    torch.testing.assert_close(two[0], two[1], rtol=0, atol=0)


def test_rollouts_keep_the_copy_that_q_believes_in(undecided):
    inputs = batch_of(undecided, QUESTIONS)
    believed = [refine_rollouts(undecided, *inputs, rollouts=k, halting="never").halt_logits for k in (1, 6)]
    assert (believed[1] >= believed[0]).all() and (believed[1] > believed[0]).any()


def test_rollouts_encode_their_question_once(undecided, monkeypatch):
    inputs, calls, encode = batch_of(undecided, QUESTIONS), [], undecided.encode
    monkeypatch.setattr(undecided, "encode", lambda *args: calls.append(1) or encode(*args))
    copies = noisy_copies(undecided, *inputs, 3, halting="never")
    assert len(calls) == 1
    for seed, copy in zip((None, 0, 1), copies, strict=True):
        alone = refine(undecided, *inputs, noise_seed=seed, halting="never")
        assert torch.equal(copy.scores, alone.scores) and torch.equal(copy.answer_latent, alone.answer_latent)


def test_vote_keeps_a_most_frequent_answer(model, monkeypatch):
    inputs = batch_of(model, QUESTIONS[:1])
    runs = iter([0, 2, 2])

    def fake(*args, **kwargs):
        scores = torch.full((1, 1, 4), -1.0)
        scores[0, 0, next(runs)] = 1.0
        return refinement.Refined(scores, torch.tensor([5.0]), torch.tensor([1]), torch.zeros(1, 1, 4))

    monkeypatch.setattr(refinement, "refine", fake)
    assert refine_rollouts(model, *inputs, rollouts=3, pick="vote").scores.argmax(-1).item() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rollouts": 0}, "rollouts=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"rollouts": 2, "pick": "best"}, "pick='best'"),
        ({"choices": ["a"]}, "at least two"),
        ({"choices": "yes,no"}, "expected a list of texts"),
        ({"fields": [Field("x", "yn")], "max_steps": -1}, "max_steps=-1"),
        ({"choices": ["a", "b"], "fields": [Field("x", ["a", "b"])]}, "both choices and fields"),
        ({"fields": []}, "names must be there"),
    ],
)
def test_bad_questions(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.answer(QUESTIONS[0], **arguments)


def test_head_without_default_choices_asks_for_them(model):
    model.config.choices = None
    with pytest.raises(ValueError, match="give choices, fields or a schema"):
        model.answer(QUESTIONS[0])


def test_head_that_is_asked_by_name_says_so(model, tmp_path):
    model.config.choices, model.config.options = None, ["knight", "knave"]
    model.save_pretrained(tmp_path)
    again = HybridModel.from_pretrained(tmp_path, model.backbone)
    assert set(again.answer(QUESTIONS[0], fields=["A", "B"]).value) == {"A", "B"}
    with pytest.raises(ValueError, match="asked for fields by their names, whose options it has"):
        again.answer(QUESTIONS[0])
    with pytest.warns(match="this head always was asked for fields by their names: expect guesses"):
        assert again.answer(QUESTIONS[0], choices=["left", "right"]).value in ("left", "right")
    assert """answer("...", context="...", fields=["..."]).value""" in (tmp_path / "README.md").read_text()


def test_warnings_name_the_line_that_asked(model):
    model.config.choices, model.config.fields = None, {"A": ["knight", "knave"]}
    asked = {"fields": {"B": ["knight", "knave"]}}
    for ask in (lambda: model.answer(QUESTIONS[0], **asked), lambda: answer_batch(model, QUESTIONS[:1], **asked)):
        with pytest.warns(UserWarning, match="unknown to this head") as told:
            ask()
        assert [warning.filename for warning in told] == [__file__]


def test_head_with_default_fields_answers_them(model, tmp_path):
    model.config.choices, model.config.fields = None, {"A": ["knight", "knave"], "B": ["yes", "no"]}
    model.save_pretrained(tmp_path)
    again = HybridModel.from_pretrained(tmp_path, model.backbone)
    answer = again.answer(QUESTIONS[0])
    assert list(answer.value) == ["A", "B"] and answer.value["B"] in ("yes", "no")
    with pytest.warns(match=r"fields \['answer'\] are unknown to this head, which always was asked \['A', 'B'\]"):
        assert again.answer(QUESTIONS[0], choices=["left", "right"]).value in ("left", "right")
    with pytest.warns(match="1 of the 2 fields that this head always was asked together"):
        assert again.answer(QUESTIONS[0], fields={"A": ["knight", "knave"]}).value in ("knight", "knave")
    with pytest.warns(match="1 of the 2 fields"):
        assert again.answer(QUESTIONS[0], fields=["A"]).value in ("knight", "knave")
    with pytest.raises(ValueError, match=r"fields=\['C'\]: this head has no options of its own for them"):
        again.answer(QUESTIONS[0], fields=["A", "C"])
    for wrong, shown in (("A", "fields='A'"), ([{"A": "knave"}, {"B": "knave"}], "fields with {'A': 'knave'}")):
        with pytest.raises(ValueError, match=f"{shown}: expected a mapping of names"):
            again.answer(QUESTIONS[0], fields=wrong)
    with pytest.raises(ValueError, match="expected a list of texts; answer takes one"):
        answer_batch(again, QUESTIONS[0])
    with pytest.raises(ValueError, match="question 1 is empty: ask something"):
        answer_batch(again, [QUESTIONS[0], " "], contexts=[None, "A story."])
    assert 'print(model.answer("...").value)' in (tmp_path / "README.md").read_text()
