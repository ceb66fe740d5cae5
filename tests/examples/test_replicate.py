"""The small study: its sums, its tutor, its student and its statistics. The study itself is `make replicate`."""

import gzip
import itertools
import json
import random
import re
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cgd_local.s3 import SeaweedFS
from cgd_operator.api.spec import parse_spec
from cgd_stages.chat.template import token_ids
from cgd_stages.grading.reference import reference_answer
from cgd_stages.method import prompts
from cgd_stages.results import statistics
from replicate import corpus, pretrain, results, tutor
from replicate.__main__ import DEFAULT, main
from replicate.arithmetic import (
    CHAINS,
    ENDINGS,
    HUNDREDS,
    ONES,
    SUMS,
    TENS,
    Kind,
    Problem,
    Unreadable,
    exact,
    make_problem,
    read_question,
    read_sums,
    stated,
    without_carry,
)
from replicate.outcome import ASKED, Machine, Made, Mark, Outcome, OutcomeError, Rows, Trainings, read_all
from replicate.study import ARMS, BASE, MORE_ARMS, Arm, Study, exam_problems, questions, sums_of

PROBLEM = Problem(47, (("+", 8), ("-", 9), ("+", 6)), "answer")
RIGHT = "47 + 8 = 55\n55 - 9 = 46\n46 + 6 = 52\nAnswer: 52"
NO_CARRY = "47 + 8 = 45\n45 - 9 = 36\n36 + 6 = 42\nAnswer: 42"
KINDS = (SUMS, ONES, TENS, HUNDREDS, CHAINS)


def problems(count: int = 50, kind: Kind = CHAINS) -> list[Problem]:
    dice = random.Random(3)
    return [make_problem(dice, kind, tuple(ENDINGS)) for _ in range(count)]


def is_right(question: str, text: str) -> bool:
    return stated(text)[1] == read_question(question).result


class TestArithmetic:
    def test_a_question_reads_as_in_the_docs(self) -> None:
        assert PROBLEM.question == 'What is 47 + 8 - 9 + 6? End with "Answer: N".'
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

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
    def test_values_stay_in_the_bounds_of_their_kind(self, kind: Kind) -> None:
        made = problems(200, kind)
        assert all(0 <= one.result <= kind.largest for problem in made for one in problem.work(exact))
        assert {len(problem.steps) for problem in made} == set(range(kind.steps[0], kind.steps[1] + 1))

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
        problem = make_problem(dice, CHAINS, ("answer",))
        wrong = problem.solution(tuple(problem.work(without_carry)))
        if not is_right(problem.question, wrong) and "wrong" in tutor.critique(problem, wrong):
            return problem


class TestTutor:
    def test_it_names_the_first_wrong_step_and_why(self) -> None:
        assert next(tutor.faults(PROBLEM, NO_CARRY)) == (
            "Step 1 is wrong: 47 + 8 is not 45. The carry is forgotten. Work it again, and what follows."
        )

    @pytest.mark.parametrize(
        ("draft", "said"),
        [
            ("Answer: 52", "No step is shown. Begin with 47 + 8, and write a line for each step."),
            ("47 + 8 = 55\nAnswer: 55", "Step 2 is missing: 55 - 9."),
            (RIGHT.replace("- 9 = 46", "+ 9 = 64"), '"55 + 9 = 64" is not step 2, which is 55 - 9.'),
            (RIGHT.replace("Answer: 52", r"\boxed{52}"), 'The last line must have the form "Answer: N".'),
            (RIGHT.replace("Answer: 52", "Answer: 50"), "The last line does not state the result of the last step."),
            (RIGHT.replace("\nAnswer", "\n52 + 1 = 53\nAnswer"), "Step 4 is too much: the question asks for 3."),
        ],
    )
    def test_it_finds_every_kind_of_fault(self, draft: str, said: str) -> None:
        assert next(tutor.faults(PROBLEM, draft)) == said

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
    def test_a_critique_never_holds_a_result_that_the_draft_does_not_have(self, kind: Kind) -> None:
        """Of the step that it names, or of a later one; numbers of the question may be the same by chance."""
        for problem in problems(200, kind):
            results = [one.result for one in problem.work(exact)]
            own = {problem.start, *(n for _, n in problem.steps)}
            for draft in (
                problem.last_line(own.pop()),
                problem.solution(tuple(problem.work(without_carry))),
                "I guess",
            ):
                good = tutor.right_lines(problem, read_sums(draft))
                words = "\n".join(tutor.faults(problem, draft))
                said = set(map(int, re.findall(r"(?<!Step )(?<!step )\b\d+", words)))
                known = {problem.start, *(n for _, n in problem.steps), *results[:good]}
                assert not said & ({*results[good:]} - known - {one.result for one in read_sums(draft)})

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
        assert tutor.refinement(PROBLEM, "as it is", f"{tutor.FAULTLESS}\nConclusion: right") == "as it is"

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
        said = tutor.reply(prompts.critique_messages(problem.question, draft))
        refined = tutor.reply(prompts.refine_messages(problem.question, draft, said))
        own = tutor.reply(prompts.answer_messages(problem.question))
        assert said == tutor.critique(problem, draft)
        assert is_right(problem.question, refined)
        assert own == tutor.answer(problem)

    def test_a_right_number_without_its_work_is_right_and_the_work_is_asked_for(self) -> None:
        problem = sees_all()
        said = tutor.critique(problem, problem.last_line(problem.result))
        assert said.startswith("No step is shown.")
        assert prompts.verdict(said) == "right"
        assert read_sums(tutor.refinement(problem, problem.last_line(problem.result), said))

    def test_moved_targets_are_another_questions(self) -> None:
        problem = sees_all()
        asked = prompts.refine_messages(problem.question, "5", "No step is shown.")
        assert is_right(problem.question, tutor.reply(asked))
        assert not is_right(problem.question, tutor.reply(asked, moved=True))

    def test_it_is_served_as_any_endpoint(self) -> None:
        with tutor.served() as url:
            assert _ask(url, PROBLEM.question) == tutor.answer(PROBLEM)
            assert _ask(url, "What is 1 + 1?") == tutor.UNKNOWN


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

    def test_revisions_leave_out_work_as_often_as_first_answers(self) -> None:
        """A student that has always seen the work in this context has nothing to learn there."""
        many = itertools.islice(corpus.conversations(1, corpus.LATER_JUMPS), 4000)
        revised = [one.reply for one in many if "Student's Initial Answer" in one.messages[-1]["content"]]
        assert 0.8 < sum(not read_sums(text) for text in revised) / len(revised) < 0.93


class TestStudent:
    def test_a_few_steps_make_a_model_that_has_learned_something(self, tmp_path: Path) -> None:
        losses: list[float] = []
        pretrain.pretrain(tmp_path / "student", steps=3, seed=0, tell=lambda _, loss: losses.append(loss))
        assert losses[-1] < losses[0]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").num_parameters() < 1e6

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


RATES = ("3e-5", "1e-4")


class TestStudy:
    def test_its_manifest_is_a_cgdrun(self) -> None:
        spec = parse_spec(Study.manifest())
        assert spec.training.context == "user"
        assert spec.generation.answer.unfinished == "keep"
        assert Study.manifest()["spec"]["training"]["variants"] == [arm.variant("3e-5") for arm in ARMS]

    @pytest.mark.parametrize("arms", [ARMS, MORE_ARMS])
    def test_every_arm_is_a_variant_with_each_rate(self, arms: tuple[Arm, ...]) -> None:
        manifest = Study.manifest()
        variants = [arm.variant(rate) for arm in arms for rate in RATES]
        manifest["spec"]["training"]["variants"] = variants
        assert list(parse_spec(manifest).training.titles) == [variant["name"] for variant in variants]

    def test_the_exam_asks_nothing_that_was_learned(self) -> None:
        asked = [one for benchmark in exam_problems(SUMS, 100).values() for one in benchmark]
        learned = {sums_of(one) for one in questions("seed 0", 100, SUMS, ASKED, but=asked)}
        assert len(set(map(sums_of, asked))) == len(learned) == 100
        assert not set(map(sums_of, asked)) & learned

    @pytest.mark.parametrize("ending", ASKED)
    def test_the_product_reads_the_value_of_a_reference_that_is_learned(self, ending: str) -> None:
        for problem in problems():
            problem = replace(problem, ending=ending)
            assert reference_answer(problem.reference) == str(problem.result)

    def test_half_of_the_exam_asks_for_new_endings(self) -> None:
        exam = exam_problems(SUMS, 100)
        assert [len(exam["seen"]), len(exam["new"])] == [50, 50]
        assert {one.ending for one in exam["seen"]} == set(ASKED)
        assert not {one.ending for one in exam["new"]} & set(ASKED)

    def test_moved_targets_have_runs_of_their_own(self, tmp_path: Path) -> None:
        """What the runs of a seed that has ended refer to is deleted, so that nothing can go on from them."""
        server = SeaweedFS(tmp_path, access_key="", secret_key="", bucket="cgd")
        own, moved = (
            Study(tmp_path, tmp_path, "", teacher, server, DEFAULT, 1, print)._name
            for teacher in (tutor.MODEL, tutor.MOVED)
        )
        assert own == "sums-seed1"
        assert moved != own

    def test_the_prompt_alone_chooses_the_rate(self) -> None:
        records = {"3e-5": {"validation_loss": 0.1, "bare_validation_loss": 2.0}, "1e-4": {"validation_loss": 0.5}}
        made = Trainings({"cgd": {rate: [{"loss": 9.0}, record] for rate, record in records.items()}})
        assert made.losses == {"cgd": {"3e-5": 2.0, "1e-4": 0.5}}
        assert made.chosen == {"cgd": "1e-4"}
        assert made.last("cgd") == records["1e-4"]


def marks(right: list[bool], each: int = 1) -> list[Mark]:
    asked = [one for benchmark in exam_problems(SUMS, len(right) // each).values() for one in benchmark]
    return [
        Mark(one.question, one.last_line(one.result if good else one.result + 1), good, 10, True)
        for one, good in zip([one for one in asked for _ in range(each)], right, strict=True)
    ]


def _interval(ends: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("low", "high"), ends, strict=True))


def outcome(
    *, base: float = 0.1, cgd: float = 0.5, fitting: float = 1.0, first_loss: float = 1.0, seed: int = 1
) -> Outcome:
    """Of 40 questions in the exam, and 10 that are answered 4 times: the base has one right output there."""

    def some(share: float) -> list[Mark]:
        return marks([place < round(40 * share) for place in range(40)])

    def curve(last: float) -> list[dict[str, float]]:
        losses = {"validation_loss": 0.1, "bare_validation_loss": last}
        return [{"step": 1, "loss": first_loss}, {"step": 2, "loss": 0.5, **losses}]

    return Outcome(
        Made("sums", seed, "S", tuple(arm.name for arm in ARMS), RATES, 64, 40, 10, 4, 2, 8, "0123"),
        Machine(2, 120, 200),
        Rows(96, 0.1, 0.9, fitting, 0.95),
        Trainings({arm.name: {"3e-5": curve(1.0), "1e-4": curve(0.5)} for arm in ARMS}),
        {BASE: some(base)} | {arm.name: some(cgd if arm.name == "cgd" else 0.3) for arm in ARMS},
        {BASE: marks([True] + [False] * 39, each=4), "cgd": marks([False] * 40, each=4)},
    )


class TestGates:
    def test_a_study_that_can_say_something_passes_all(self) -> None:
        assert all(gate.passed for gate in results.gates([outcome(), outcome()]))

    @pytest.mark.parametrize(
        ("wrong", "name"),
        [
            (outcome(base=0.0), "the base solves too few or too many"),
            (outcome(base=0.45), "the base solves too few or too many"),
            (outcome(cgd=0.95), "the best model solves nearly all"),
            (outcome(first_loss=0.2), "the untrained student needs no training in CGD's context"),
            (outcome(fitting=0.1), "targets do not fit"),
        ],
    )
    def test_one_seed_that_fails_a_gate_says_nothing(self, wrong: Outcome, name: str) -> None:
        found = results.gates([outcome(), wrong])
        assert [gate.name for gate in found if not gate.passed] == [name]
        (said,) = results.sentences(results.figures([outcome(), wrong], ARMS), found)
        assert said.startswith(f"not informative: {name}")

    def test_rows_whose_targets_were_moved_do_not_fit(self) -> None:
        assert results.fits(Rows(96, 0.1, 0.9, refinements=0.9, distilled=0.9))
        assert not results.fits(Rows(96, 0.1, 0.9, refinements=0.05, distilled=0.9))
        assert not results.fits(Rows(96, 0.1, 0.9, refinements=0.9, distilled=0.05))


class TestResults:
    def test_the_figures_compare_the_same_questions(self) -> None:
        rows = {row["label"]: row for row in results.figures([outcome(), outcome(cgd=0.6)], ARMS)}
        assert rows["CGD"]["accuracy"]["mean"] == pytest.approx(0.55)
        assert rows["CGD"]["seeds"] == [0.5, 0.6]
        assert rows["CGD"]["gain"] is None
        assert rows["base"]["gain"]["mean"] == pytest.approx(0.45)
        assert rows["base"]["gain"]["p"] < 0.001
        assert rows["base"]["form_new"]["mean"] == 1.0
        assert rows["CGD"]["rates"] == ["1e-4", "1e-4"]

    def test_the_test_is_exact(self) -> None:
        """5 questions won and none lost: 2 of 32 flips are as far from 0."""
        found = results.against({"cgd": [1.0] * 5 + [0.0] * 35, "sft": [0.0] * 40}, unit=1)
        assert found["sft"]["p"] == pytest.approx(2 / 2**5)

    def test_one_seed_has_the_intervals_of_the_products_report(self) -> None:
        assert results.share([1.0, 0.0] * 20) == {"mean": 0.5, **_interval(statistics.wilson(20, 40))}
        found = results.against({"cgd": [1.0] * 5 + [0.0] * 35, "sft": [0.0] * 39 + [1.0]}, unit=1)["sft"]
        assert {name: found[name] for name in ("low", "high")} == _interval(statistics.paired_interval(5, 1, 40))

    def test_seeds_are_averaged_before_the_test(self) -> None:
        """Differences of 1, 1/3 and -2/3, whose sum is 2/3: 6 of the 8 flips are as far from 0."""
        found = results.against({"cgd": [1.0, 1 / 3, 0.0], "sft": [0.0, 0.0, 2 / 3]}, unit=3)
        assert found["sft"]["p"] == pytest.approx(6 / 8)

    def test_p_values_are_corrected_for_the_number_of_models(self) -> None:
        won = [1.0] * 5 + [0.0] * 35
        found = results.against({"cgd": won, "sft": [0.0] * 40, "cft": won}, unit=1)
        assert found["sft"]["corrected"] == pytest.approx(2 * found["sft"]["p"])
        assert found["cft"]["corrected"] == 1.0

    def test_what_may_be_chance_is_not_called_better(self) -> None:
        close = outcome(cgd=0.3)
        said = results.sentences(results.figures([close], ARMS), results.gates([close]))
        (told,) = (one for one in said if one.startswith("CGD and SFT cannot be told apart with 40 questions"))
        assert "points would have shown" in told

    def test_what_would_have_shown_is_that_of_the_products_report(self) -> None:
        won = [1.0] * 3 + [0.0] * 37
        found = results.against({"cgd": won, "sft": [0.0] * 40, "cft": won[::-1]}, unit=1)
        assert found["sft"]["shown"] == statistics.detectable(40, 3 / 40, 0.05 / 2)
        assert found["cft"]["shown"] == statistics.detectable(40, 6 / 40, 0.05 / 2)
        few = results.against({"cgd": [1.0, 0.0], "sft": [0.0, 0.0]}, unit=1)
        assert few["sft"]["shown"] is None

    def test_one_right_output_of_several_is_a_pass(self) -> None:
        rows = {row["label"]: row for row in results.several([outcome()], ARMS)}
        assert rows["base"]["one"]["mean"] == pytest.approx(1 / 10)
        assert rows["base"]["each"]["mean"] == pytest.approx(1 / 40)
        assert rows["CGD"]["one"]["mean"] == 0.0

    def test_a_right_answer_in_another_form_is_right_and_did_not_keep_it(self) -> None:
        mark = Mark(PROBLEM.question, RIGHT.replace("Answer: 52", r"\boxed{52}"), True, 9, True)
        assert (mark.right, mark.kept_form, mark.new_form) == (True, False, True)

    @pytest.mark.parametrize(
        ("p", "told"), [(0.0, "p < 0.001"), (0.0004, "p < 0.001"), (0.034, "p = 0.034"), (1, "p = 1")]
    )
    def test_no_p_value_is_told_as_nothing(self, p: float, told: str) -> None:
        assert results.spoken(p) == told

    def test_the_reasons_are_the_figures_of_every_seed(self) -> None:
        found = {one["what"]: one["found"] for one in results.reasons([outcome(), outcome(first_loss=2.0)])}
        assert ["1.00, 1.00", "2.00, 2.00"] in found.values()  # the untrained student's losses
        assert ["0.10, 0.50"] * 2 in found.values()  # CGD's, in context and bare
        assert ["90.0%; 90.0%"] * 2 in found.values()  # verdicts: one for every draft would do as well

    def test_the_page_shows_every_model_and_escapes_what_it_said(self, tmp_path: Path) -> None:
        (tmp_path / "sums-seed1-exam.html").touch()
        chapter = results.chapter([outcome()], tmp_path)
        chapter["example"]["outputs"]["base"] = "<script>alert(1)</script>"
        results.write_page(tmp_path / "page.html", {"made": asdict(outcome().made), "chapters": [chapter]})
        page = (tmp_path / "page.html").read_text()
        assert "<script>" not in page
        assert all(f'<th scope="row">{arm.label}</th>' in page for arm in ARMS)
        assert 'href="sums-seed1-exam.html"' in page
        assert 'href="sums-seed1-several.html"' not in page

    def test_the_table_of_the_docs_says_that_one_seed_is_one(self, tmp_path: Path) -> None:
        one, two = (results.markdown(results.chapter(list(seeds), tmp_path)) for seeds in ([outcome()], SEEDS))
        assert "One seed is one seed" in one
        assert "One seed is one seed" not in two
        assert "| CGD | 50.0 (35.2 to 64.8) |  |  |" in one


SEEDS = (outcome(seed=1), outcome(seed=2, cgd=0.6))


class TestOutcomes:
    def test_a_file_holds_the_whole_outcome(self, tmp_path: Path) -> None:
        path = outcome().write(tmp_path)
        assert path.name == "outcome-sums-seed1.json.gz"
        assert Outcome.read(path) == outcome()

    def test_the_same_outcome_has_the_same_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        one, other = (outcome().write(folder).read_bytes() for folder in (tmp_path, tmp_path / "other"))
        assert one == other
        assert one[4:8] == bytes(4), "gzip's time"

    def test_seeds_of_several_machines_come_together_in_order(self, tmp_path: Path) -> None:
        paths = [one.write(tmp_path) for one in reversed(SEEDS)]
        assert read_all(paths) == [list(SEEDS)]

    def test_the_page_is_made_of_files_without_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = [str(one.write(tmp_path)) for one in SEEDS]
        monkeypatch.setattr("sys.argv", ["replicate", "--folder", str(tmp_path / "page"), "--outcomes", *files])
        assert main() == 0
        found = json.loads((tmp_path / "page/results.json").read_text())
        assert found["chapters"][0]["seeds"] == [1, 2]
        assert "seed 2, 1e-4" in (tmp_path / "page/page.html").read_text()
        assert "seeds 1, 2" in (tmp_path / "page/table.md").read_text()

    def test_without_a_page_where_files_do_not_belong_together(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = str(outcome().write(tmp_path))
        monkeypatch.setattr("sys.argv", ["replicate", "--folder", str(tmp_path / "page"), "--outcomes", file, file])
        assert main() == 1
        assert "given twice" in " ".join(capsys.readouterr().out.split())
        assert not (tmp_path / "page").exists()

    @pytest.mark.parametrize(
        ("other", "why"),
        [
            (outcome(), "given twice"),
            (replace(SEEDS[1], made=replace(SEEDS[1].made, rows=65)), "its rows is another"),
            (replace(SEEDS[1], exam=dict.fromkeys(SEEDS[1].exam, marks([True] * 38))), "a question of the exam"),
        ],
    )
    def test_files_that_do_not_belong_together_are_refused(self, tmp_path: Path, other: Outcome, why: str) -> None:
        (tmp_path / "other").mkdir()
        with pytest.raises(OutcomeError, match=why):
            read_all([outcome().write(tmp_path), other.write(tmp_path / "other")])

    @pytest.mark.parametrize(
        ("content", "zipped"), [(b"", False), (b"no", False), (b"{}", True), (b"[1]", True)], ids=str
    )
    def test_another_file_is_refused(self, tmp_path: Path, content: bytes, zipped: bool) -> None:
        body = gzip.compress(content) if zipped else content
        (tmp_path / "x.json.gz").write_bytes(body)
        with pytest.raises(OutcomeError, match=r"x\.json\.gz is no outcome"):
            read_all([tmp_path / "x.json.gz"])
