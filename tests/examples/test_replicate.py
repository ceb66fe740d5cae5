"""The small study: its sums, its tutor, its student and its statistics. The study itself is `make replicate`."""

import itertools
import json
import math
import random
import statistics
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cgd_operator.api.spec import parse_spec
from cgd_stages.chat.template import token_ids
from cgd_stages.method import prompts
from replicate import corpus, exam, pretrain, results, tutor
from replicate.arithmetic import (
    ENDINGS,
    Problem,
    Unreadable,
    exact,
    make_problem,
    read_question,
    read_sums,
    stated,
    without_carry,
)
from replicate.study import ABLATIONS, ASKED, OBJECTIVES, Study, exam_problems, is_right, models, questions, sums_of

PROBLEM = Problem(47, (("+", 8), ("-", 9), ("+", 6)), "answer")
RIGHT = "47 + 8 = 55\n55 - 9 = 46\n46 + 6 = 52\nAnswer: 52"
NO_CARRY = "47 + 8 = 45\n45 - 9 = 36\n36 + 6 = 42\nAnswer: 42"


def problems(count: int = 50) -> list[Problem]:
    dice = random.Random(3)
    return [make_problem(dice, tuple(ENDINGS)) for _ in range(count)]


class TestArithmetic:
    def test_a_question_reads_as_in_the_docs(self) -> None:
        assert PROBLEM.question == 'Work out 47 + 8 - 9 + 6. End with "Answer: N".'
        assert PROBLEM.solution(tuple(PROBLEM.work(exact))) == RIGHT
        assert PROBLEM.result == 52

    def test_the_reference_is_one_right_line(self) -> None:
        assert PROBLEM.reference == "47 + 8 = 55 - 9 = 46 + 6 = 52\nAnswer: 52"

    @pytest.mark.parametrize("problem", problems(20), ids=lambda one: one.question)
    def test_a_question_is_read_back(self, problem: Problem) -> None:
        assert read_question(problem.question) == problem

    @pytest.mark.parametrize("words", [False, True])
    def test_worked_lines_are_read_back(self, words: bool) -> None:
        for problem in problems():
            sums = tuple(problem.work(without_carry))
            assert read_sums(problem.solution(sums, words=words)) == sums

    def test_values_stay_small(self) -> None:
        assert all(0 <= one.result <= 99 for problem in problems(200) for one in problem.work(exact))

    @pytest.mark.parametrize(
        ("a", "sign", "b", "wrong"), [(47, "+", 8, 45), (42, "-", 8, 44), (43, "+", 5, 48), (48, "-", 5, 43)]
    )
    def test_who_forgets_the_carry_works_each_column_for_itself(self, a: int, sign: str, b: int, wrong: int) -> None:
        assert without_carry(a, b, "+" if sign == "+" else "-") == wrong

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_the_last_line_states_form_and_number(self, ending: str) -> None:
        assert stated("1 + 1 = 2\n" + ENDINGS[ending].format(n=-7)) == (ending, -7)

    @pytest.mark.parametrize("text", ["", "Answer: 5\nor so", "Answer: five", "Answer: 5.", "the result is 5"])
    def test_nothing_is_guessed_from_another_line(self, text: str) -> None:
        assert stated(text) == (None, None)

    @pytest.mark.parametrize("text", ["", "Hi", PROBLEM.question + " Please.", PROBLEM.question.replace("Answer", "A")])
    def test_another_question_is_no_question_of_the_study(self, text: str) -> None:
        with pytest.raises(Unreadable):
            read_question(text)


def sees_all(seed: int = 0) -> Problem:
    """A problem whose mistakes the tutor does not overlook, and whose own solution is right."""
    dice = random.Random(seed)
    while True:
        problem = make_problem(dice, ("answer",))
        wrong = problem.solution(tuple(problem.work(without_carry)))
        if not is_right(problem.question, wrong) and "wrong" in tutor.critique(problem, wrong):
            return problem


class TestTutor:
    def test_it_names_the_first_wrong_line_and_why(self) -> None:
        assert next(tutor.faults(PROBLEM, NO_CARRY)) == (
            "Line 1 is wrong. 47 + 8 is 55, not 45. You forgot the carry. What follows must be worked again."
        )

    @pytest.mark.parametrize(
        ("draft", "said"),
        [
            ("Answer: 52", "The work is missing. Begin with 47 + 8 = 55, and go on step by step."),
            ("47 + 8 = 55\nAnswer: 55", "A step is missing after line 1: 55 - 9 = 46."),
            (RIGHT.replace("- 9 = 46", "+ 9 = 64"), "Line 2 is wrong. The step is 55 - 9 = 46."),
            (RIGHT.replace("Answer: 52", "[52]"), 'The last line must be "Answer: 52".'),
            (RIGHT.replace("Answer: 52", "Answer: 50"), "The last line does not say the result of the last step."),
            (RIGHT.replace("\nAnswer", "\n52 + 1 = 53\nAnswer"), "Line 4 is too much: the question asks for 3 steps."),
        ],
    )
    def test_it_finds_every_kind_of_fault(self, draft: str, said: str) -> None:
        assert next(tutor.faults(PROBLEM, draft)).startswith(said)

    def test_a_right_draft_has_no_fault(self) -> None:
        assert list(tutor.faults(PROBLEM, RIGHT)) == []

    def test_its_verdict_is_on_the_last_line(self) -> None:
        problem = sees_all()
        wrong = problem.solution(tuple(problem.work(without_carry)))
        assert prompts.verdict(tutor.critique(problem, wrong)) == "wrong"
        assert prompts.verdict(tutor.critique(problem, problem.solution(tuple(problem.work(exact))))) == "right"

    @pytest.mark.parametrize("words", [False, True])
    def test_a_refinement_is_right_and_keeps_the_students_writing(self, words: bool) -> None:
        problem = sees_all()
        draft = problem.solution(tuple(problem.work(without_carry)), words=words)
        refined = tutor.refinement(problem, draft, tutor.critique(problem, draft))
        assert is_right(problem.question, refined)
        assert (" plus " in refined or " minus " in refined) is words

    def test_what_the_critique_finds_right_stays(self) -> None:
        assert tutor.refinement(PROBLEM, "as it is", "Fine.\nConclusion: right") == "as it is"

    def test_it_overlooks_about_a_tenth(self) -> None:
        many = problems(1000)
        wrong = [
            tutor.answer(problem)
            for problem in many
            if tuple(problem.work(exact)) != tuple(problem.work(without_carry))
        ]
        asked = [problem for problem in many if tuple(problem.work(exact)) != tuple(problem.work(without_carry))]
        slips = sum(not is_right(one.question, text) for one, text in zip(asked, wrong, strict=True)) / len(asked)
        assert 0.06 < slips < 0.14

    def test_it_is_told_what_to_do_by_the_methods_own_prompts(self) -> None:
        problem = sees_all()
        draft = problem.solution(tuple(problem.work(without_carry)))
        said = tutor.reply([dict(one) for one in prompts.critique_messages(problem.question, draft)])
        refined = tutor.reply([dict(one) for one in prompts.refine_messages(problem.question, draft, said)])
        own = tutor.reply([dict(one) for one in prompts.answer_messages(problem.question)])
        assert said == tutor.critique(problem, draft)
        assert is_right(problem.question, refined)
        assert own == tutor.answer(problem)

    def test_it_is_served_as_any_endpoint(self) -> None:
        with tutor.served() as url:
            assert _ask(url, PROBLEM.question) == tutor.answer(PROBLEM)
            with pytest.raises(urllib.error.HTTPError, match="400") as refused:
                _ask(url, "Hi")
            refused.value.close()


def _ask(url: str, text: str) -> str:
    body = json.dumps({"model": tutor.MODEL, "messages": [{"role": "user", "content": text}]}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", data=body)) as response:
        return str(json.loads(response.read())["choices"][0]["message"]["content"])


class TestCorpus:
    def test_it_is_the_same_for_a_seed(self) -> None:
        one, again = (list(itertools.islice(corpus.conversations(5), 40)) for _ in range(2))
        other = list(itertools.islice(corpus.conversations(6), 40))
        assert one == again != other

    def test_people_in_haste_forget_carries_and_leave_out_work(self) -> None:
        dice, problem = random.Random(0), Problem(47, (("+", 8), ("-", 9), ("+", 6)), "answer")
        told = [corpus.solution(dice, problem) for _ in range(400)]
        right = sum(is_right(problem.question, text) for text in told) / len(told)
        bare = sum(not read_sums(text) for text in told) / len(told)
        assert 0.86 < right < 0.96
        assert 0.02 < bare < 0.08
        told = [corpus.solution(dice, problem, corpus.LATER_JUMPS) for _ in range(400)]
        assert 0.8 < sum(not read_sums(text) for text in told) / len(told) < 0.9


class TestStudent:
    def test_a_few_steps_make_a_model_that_takes_the_exam(self, tmp_path: Path) -> None:
        losses: list[float] = []
        pretrain.pretrain(tmp_path / "student", steps=3, seed=0, tell=lambda _, loss: losses.append(loss))
        ((output, tokens, ended),) = exam.taken(tmp_path / "student", [PROBLEM.question])
        assert losses[-1] < losses[0]
        assert isinstance(output, str)
        assert tokens == exam.MOST_TOKENS or ended

    def test_every_digit_is_a_token(self, tmp_path: Path) -> None:
        pretrain.make_tokenizer().save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer.decode(token_ids(tokenizer, RIGHT)) == RIGHT
        assert len(token_ids(tokenizer, "1234567")) == 7

    def test_an_update_of_muon_is_nearly_orthogonal(self) -> None:
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        values = torch.linalg.svdvals(pretrain.orthogonal(torch.randn(48, 32)))
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


class TestStudy:
    def test_its_manifest_is_a_cgdrun(self) -> None:
        assert parse_spec(Study.manifest()).training.objectives == OBJECTIVES

    def test_every_objective_and_ablation_is_trained_of_a_seed(self) -> None:
        labels = [model.label for model in models(0)]
        assert labels == [*OBJECTIVES, *(f"CGD {kind}" for kind in ABLATIONS)]

    def test_the_exam_asks_nothing_that_was_learned(self) -> None:
        asked = {sums_of(one) for one in exam_problems(100)}
        learned = {sums_of(one) for one in questions("seed 0", 100, ASKED, but=frozenset(asked))}
        assert len(asked) == len(learned) == 100
        assert not asked & learned

    def test_half_of_the_exam_asks_for_new_endings(self) -> None:
        assert sum(one.ending not in ASKED for one in exam_problems(100)) == 50


def marks(right: list[bool], tokens: int = 10) -> list[results.Mark]:
    asked = exam_problems(len(right))
    texts = [one.last_line(one.result if good else one.result + 1) for one, good in zip(asked, right, strict=True)]
    return [results.Mark(one.question, text, tokens, True) for one, text in zip(asked, texts, strict=True)]


class TestResults:
    def test_a_share_has_the_interval_of_the_textbook(self) -> None:
        found = results.share([1.0] * 30 + [0.0] * 70)
        half = 1.96 * math.sqrt(0.3 * 0.7 / 99)
        assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=1e-4)

    def test_intervals_cover_the_truth_as_often_as_they_say(self) -> None:
        dice = random.Random(1)
        shares = [results.share([float(dice.random() < 0.4) for _ in range(300)]) for _ in range(400)]
        covered = statistics.fmean(one.low <= 0.4 <= one.high for one in shares)
        assert 0.92 < covered < 0.98

    def test_p_values_are_uniform_where_nothing_differs(self) -> None:
        dice = random.Random(2)
        found = [results.paired_p([dice.choice((-1.0, 0.0, 1.0)) for _ in range(200)]) for _ in range(400)]
        assert 0.02 < statistics.fmean(p < 0.05 for p in found) < 0.09

    @pytest.mark.parametrize(("values", "p"), [([0.0] * 10, 1.0), ([1.0] * 10, 0.0)])
    def test_without_spread_a_difference_is_sure(self, values: list[float], p: float) -> None:
        assert results.paired_p(values) == p

    @pytest.mark.parametrize(
        ("p", "told"), [(0.0, "p < 0.001"), (0.0004, "p < 0.001"), (0.034, "p = 0.034"), (1, "p = 1")]
    )
    def test_no_p_value_is_told_as_nothing(self, p: float, told: str) -> None:
        assert results.spoken(p) == told

    def test_the_figures_compare_the_same_questions(self) -> None:
        better, worse = marks([True] * 30 + [False] * 10), marks([True] * 10 + [False] * 30)
        rows = {row["label"]: row for row in results.figures({"base": [worse], "CGD": [better, better]})}
        assert rows["CGD"]["accuracy"]["mean"] == 0.75
        assert rows["CGD"]["seeds"] == [0.75, 0.75]
        assert rows["CGD"]["gain"] is None
        assert rows["base"]["gain"]["mean"] == 0.5
        assert rows["base"]["gain"]["p"] < 0.001
        assert rows["base"]["form_new"]["mean"] == 1.0

    def test_what_may_be_chance_is_not_called_better(self) -> None:
        half = marks([True, False] * 20)
        other = marks([False, True] * 19 + [True, True])
        rows = results.figures({"base": [half], "SFT": [other], "CGD": [half]})
        (_, said) = results.sentences(rows)
        assert said.startswith("CGD and SFT may be alike")

    def test_a_right_answer_in_another_form_is_right_and_did_not_keep_it(self) -> None:
        mark = results.Mark(PROBLEM.question, RIGHT.replace("Answer: 52", "[52]"), 9, True)
        assert (mark.right, mark.kept_form, mark.new_form) == (True, False, False)

    def test_the_page_shows_every_model_and_escapes_what_it_said(self, tmp_path: Path) -> None:
        exams = {label: [marks([True, False] * 10)] for label in ("base", "SFT", "CGD", "CGD none")}
        rows = results.figures(exams)
        made = {"rows": 4, "seeds": 1, "questions": 20, "cores": 2, "minutes": 3.0, "parameters": 7e5}
        found = {
            "made": {**made, "learning_rate": "1e-4", "epochs": 2},
            "said": results.sentences(rows),
            "rows": rows,
            "ablations": ["CGD none"],
            "quality": [{"rows": 4, "right_drafts": 0.5, "right_verdicts": 1.0, "right_refinements": 0.9}],
            "example": {"question": "1 < 2", "outputs": {"base": "<script>alert(1)</script>"}},
        }
        results.write_page(tmp_path / "page.html", found)
        page = (tmp_path / "page.html").read_text()
        assert "<script>" not in page
        assert "<td>1</td>" in page
        assert all(f'<th scope="row">{label}</th>' in page for label in exams)
        assert page.count('<th scope="row">CGD</th>') == 2

    def test_marks_are_read_as_the_exam_writes_them(self, tmp_path: Path) -> None:
        path = tmp_path / "exam.jsonl"
        path.write_text(json.dumps({"question": "q", "output": "o", "tokens": 3, "ended": False}) + "\n")
        assert results.read_marks(path) == [results.Mark("q", "o", 3, False)]
