"""generate: rows are asked for once, kept or rejected, and never lost or doubled, however often it is interrupted."""

from collections import Counter
from typing import Any

import pytest
from support.stage_builders import (
    GREEDY,
    RUN,
    RuleEngine,
    context,
    echo,
    generate_with,
    generate_work,
    prepared,
    said,
    stop_after,
    stored_rejections,
    stored_rows,
)

from cgd_stages.contract import Rows, Sampling
from cgd_stages.engines.base import Completion, Refused, Reply, Request
from cgd_stages.engines.replies import row_sampling
from cgd_stages.errors import Interrupted, RowsLost, TransientError, UserError
from cgd_stages.generate import __main__ as generate
from cgd_stages.generate.shard_writer import ShardWriter
from cgd_stages.prepare.sources import row_id
from cgd_stages.runtime.pace import Pace
from cgd_stages.store import part_writer
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import DONE, Folder
from cgd_stages.store.rows import row_schema
from cgd_stages.store.run import RunStore
from cgd_stages.store.shards import owned_rows, owns

TEXTS = [f"How many apples are {n} apples?" for n in range(40)]


@pytest.fixture
def prompts(bucket):
    return prepared(bucket, TEXTS)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """A part for every 4 rows, so that there are many."""
    monkeypatch.setattr(part_writer, "FLUSH_ROWS", 4)


@pytest.fixture
def answering(storage, tiny_model, tmp_path, prompts):
    """The context of one attempt at the answers."""

    def make(*roles, shard=0, **changes):
        work = generate_work(tiny_model, *(roles or ("answer",)), **changes)
        return context(storage, work, tmp_path, shard=shard)

    return make


def asked(engine: RuleEngine) -> Counter[str]:
    return Counter(request.name for request in engine.asked)


def names() -> set[str]:
    return {f"{row_id(text)}-0-answer" for text in TEXTS}


def test_every_prompt_has_its_answer_exactly_once(bucket, answering):
    facts = generate_with(RuleEngine(), answering())["answer"]
    rows = stored_rows(bucket, "answer")
    assert {row["prompt"]: row["answer"] for row in rows} == {text: f"re: {text}" for text in TEXTS}
    assert len(rows) == 40
    assert (facts.rows.total, facts.rows.done, facts.rows.rejected) == (40, 40, 0)
    assert facts.prompt_tokens == 40 * 10
    assert facts.generated_tokens == sum(row["answer_tokens"] for row in rows)


def test_a_done_stage_asks_for_nothing(answering):
    first = generate_with(RuleEngine(), answering())
    engine = RuleEngine()
    assert generate_with(engine, answering()) == first
    assert not engine.asked


@pytest.mark.parametrize("steps", [0, 1, 5, 9])
def test_after_sigterm_the_next_attempt_asks_only_for_the_rest(bucket, answering, steps):
    first, attempt = RuleEngine(), answering()
    stop_after(first, steps, attempt.stop)
    with pytest.raises(Interrupted):
        generate_with(first, attempt)
    stored = attempt.facts["answer"].rows.done
    assert stored == 3 * (steps + 1)
    second = RuleEngine()
    generate_with(second, answering())
    assert len(second.asked) == 40 - stored
    assert set(asked(second)) <= names()
    assert len({row["id"] for row in stored_rows(bucket, "answer")}) == 40


def test_a_crash_loses_only_what_was_not_stored_yet(bucket, answering):
    engine, attempt = RuleEngine(), answering()
    steps = iter(range(5))

    def die() -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt  # as good as kill -9: nothing of ours catches it

    engine.before_step = die
    with pytest.raises(KeyboardInterrupt):
        generate_with(engine, attempt)
    second = RuleEngine()
    generate_with(second, answering())
    assert len(stored_rows(bucket, "answer")) == 40
    assert len(second.asked) < 40


def test_an_engine_that_dies_leaves_what_is_finished(bucket, answering):
    def die_at_last(request: Request) -> Reply:
        if TEXTS[0] in request.messages[-1]["content"]:
            raise TransientError("the engine died")
        return echo(request)

    attempt = answering()
    with pytest.raises(TransientError):
        generate_with(RuleEngine(die_at_last), attempt)
    stored = attempt.facts["answer"].rows.done
    second = RuleEngine()
    generate_with(second, answering())
    assert len(second.asked) == 40 - stored
    assert len(stored_rows(bucket, "answer")) == 40


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_share_the_rows_and_the_last_one_promises_the_stage(bucket, answering, shards):
    counts = []
    for shard in range(shards):
        facts = generate_with(RuleEngine(), answering(shards=shards, shard=shard))["answer"]
        counts.append(facts.rows.done)
        assert facts.rows.total == sum(owns(row_id(text), shard, shards) for text in TEXTS)
        folder = Folder(bucket, RUN.namespace, "answer", facts.digest)
        assert (folder.done() is not None) == (shard == shards - 1)
    assert sum(counts) == 40
    assert len(stored_rows(bucket, "answer")) == 40
    assert RunStore(bucket, RUN).input("answer").require().rows.done == 40


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_another_number_of_shards_asks_only_for_the_rest(bucket, answering, before, after):
    for shard in range(before):
        attempt, engine = answering(shards=before, shard=shard), RuleEngine()
        stop_after(engine, 2, attempt.stop)
        with pytest.raises(Interrupted):
            generate_with(engine, attempt)
    engines = [RuleEngine() for _ in range(after)]
    for shard, engine in enumerate(engines):
        generate_with(engine, answering(shards=after, shard=shard))
    assert sum(len(engine.asked) for engine in engines) == 40 - before * 9
    rows = stored_rows(bucket, "answer")
    assert len(rows) == len({row["id"] for row in rows}) == 40


def test_another_number_of_shards_keeps_the_rows_when_none_is_left_to_ask_for(bucket, answering):
    """They are the other number's, so they are written anew, without an engine."""
    for shard in range(2):
        facts = generate_with(RuleEngine(), answering(shards=2, shard=shard))["answer"]
    folder = Folder(bucket, RUN.namespace, "answer", facts.digest)
    bucket.delete(folder.key(DONE))
    engine = RuleEngine()
    generate_with(engine, answering())
    assert not engine.asked
    assert len(stored_rows(bucket, "answer")) == folder.require().rows.done == 40


def test_two_pods_of_one_shard_leave_no_row_twice(bucket, answering):
    """A pod that was thought dead stores the same rows as its successor, in parts of other sizes."""
    first = answering()
    engine = RuleEngine(batch=5)
    stop_after(engine, 3, first.stop)
    with pytest.raises(Interrupted):
        generate_with(engine, first)
    folder = Folder(bucket, RUN.namespace, "answer", first.facts["answer"].digest)
    ghost = ShardWriter(folder, 0, 1)
    again = [row for part in ghost.parts for row in owned_rows(folder, [part], 0, 1)]
    folder.put_rows("parts/00000-of-00001-", again[2:7], row_schema("answer"))
    generate_with(RuleEngine(), answering())
    rows = stored_rows(bucket, "answer")
    assert len(rows) == len({row["id"] for row in rows}) == 40


def test_a_part_that_is_not_whole_is_generated_again(bucket, answering):
    attempt, engine = answering(), RuleEngine()
    stop_after(engine, 4, attempt.stop)
    with pytest.raises(Interrupted):
        generate_with(engine, attempt)
    prefix = f"{RUN.namespace}/answer/{attempt.facts['answer'].digest}/parts/"
    found = next(iter(bucket.list(prefix)))
    bucket.put(found.key, (bucket.get(found.key) or b"")[:-10])
    generate_with(RuleEngine(), answering())
    assert len(stored_rows(bucket, "answer")) == 40


def some_bad(request: Request) -> Reply:
    """Five rows go wrong, each in its own way."""
    text = request.messages[-1]["content"]
    match text:
        case "How many apples are 0 apples?":
            return said(request, "and then and then", "length")
        case "How many apples are 1 apples?":
            return said(request, " \n")
        case "How many apples are 2 apples?":
            return Refused(request.name, "too_long", "the prompt has 9 tokens, the context 8", 9)
        case "How many apples are 3 apples?":
            return said(request, "<think> still thinking")
        case "How many apples are 4 apples?":
            return said(request, "Let me see. " * 50)
    return echo(request)


def test_bad_rows_are_rejected_one_by_one_with_their_reason(bucket, answering):
    facts = generate_with(RuleEngine(some_bad), answering(max_rejected=0.2))["answer"]
    assert (facts.rows.done, facts.rows.rejected) == (35, 5)
    assert len(stored_rows(bucket, "answer")) == 35
    rejected = {row["id"]: row for row in stored_rejections(bucket, "answer")}
    reasons = [rejected[row_id(TEXTS[n])]["reason"] for n in range(5)]
    assert reasons == ["truncated", "empty", "too_long", "unfinished_thought", "repetition"]
    assert "has no end: ...'still thinking'" in rejected[row_id(TEXTS[3])]["detail"]
    assert facts.metrics["rejected_empty"] == 1


def test_drafts_that_were_cut_or_that_loop_stay_and_are_counted(bucket, answering):
    facts = generate_with(RuleEngine(some_bad), answering(max_rejected=0.2, unfinished="keep"))["answer"]
    assert (facts.rows.done, facts.rows.rejected) == (37, 3)
    drafts = {row["id"]: row for row in stored_rows(bucket, "answer")}
    cut, loop = drafts[row_id(TEXTS[0])], drafts[row_id(TEXTS[4])]
    assert (cut["answer"], cut["answer_finish_reason"]) == ("and then and then", "length")
    assert (loop["answer"].strip(), loop["answer_finish_reason"]) == (("Let me see. " * 50).strip(), "repetition")
    reasons = {row["reason"] for row in stored_rejections(bucket, "answer")}
    assert reasons == {"empty", "too_long", "unfinished_thought"}
    assert (facts.metrics["unfinished_length"], facts.metrics["unfinished_repetition"]) == (1, 1)


def test_a_draft_that_was_cut_within_its_thought_has_no_text_to_keep(bucket, answering):
    def thinks(request: Request) -> Completion:
        return said(request, "<think> so many apples", "length")

    with pytest.raises(UserError, match="truncated 3"):
        generate_with(RuleEngine(thinks, batch=1, room=2), answering(max_rejected=0.05, unfinished="keep"))


def test_critiques_and_refinements_that_were_cut_are_rejected_all_the_same(bucket, answering):
    generate_with(RuleEngine(), answering())

    def cut(request: Request) -> Completion:
        return said(request, "and then", "length" if "0 apples?" in request.messages[-1]["content"] else "stop")

    facts = generate_with(RuleEngine(cut), answering("critique", max_rejected=0.2, unfinished="keep"))["critique"]
    assert facts.rows.rejected == facts.metrics["rejected_truncated"] > 0
    assert "unfinished" not in RunStore(bucket, RUN).input("critique").require().inputs


def test_that_unfinished_drafts_are_kept_is_part_of_the_answers_digest_and_rejecting_them_is_as_ever(answering):
    digests = [
        generate_with(RuleEngine(), answering(**given))["answer"].digest
        for given in ({}, {"unfinished": "reject"}, {"unfinished": "keep"})
    ]
    assert digests[0] == digests[1] != digests[2]


def test_rejected_rows_are_not_asked_again(answering):
    attempt, engine = answering(max_rejected=0.2), RuleEngine(some_bad, batch=40, room=40)
    stop_after(engine, 0, attempt.stop)
    with pytest.raises(Interrupted):
        generate_with(engine, attempt)
    second = RuleEngine(some_bad)
    generate_with(second, answering(max_rejected=0.2))
    assert not second.asked


def test_too_many_rejections_fail_with_reasons_and_examples_and_store_the_rest(bucket, answering):
    attempt = answering(max_rejected=0.05)
    with pytest.raises(UserError) as caught:
        generate_with(RuleEngine(some_bad), attempt)
    message = caught.value.message
    assert "of 40 rows rejected, more than the 5.0% that spec.generation.maxRejected allows" in message
    assert message.count(": ") >= 3
    assert "Examples: " in message
    assert "spec.generation.maxRejected" in caught.value.hint
    folder = Folder(bucket, RUN.namespace, "answer", attempt.facts["answer"].digest)
    assert folder.done() is None
    assert len(ShardWriter(folder, 0, 1).parts) > 1


def test_a_rerun_after_too_many_rejections_fails_the_same_way_without_an_engine(answering):
    messages = []
    for _ in range(2):
        engine = RuleEngine(some_bad, batch=40, room=40)
        with pytest.raises(UserError) as caught:
            generate_with(engine, answering(max_rejected=0.05))
        messages.append(caught.value.message)
    assert messages[0] == messages[1]
    assert not engine.asked


def test_a_hopeless_stage_stops_early_and_is_not_started_again(answering):
    def silent(request: Request) -> Reply:
        return said(request, "")

    for asked_at_most in (10, 0):
        engine = RuleEngine(silent, batch=1, room=2)
        with pytest.raises(UserError, match="3 of 40 rows rejected"):
            generate_with(engine, answering(max_rejected=0.05))
        assert len(engine.asked) <= asked_at_most


def test_the_limit_counts_the_whole_stage_when_the_last_shard_ends(answering):
    """Two bad rows are within the limit of three; two in each shard are too many."""
    owned = [[text for text in TEXTS if owns(row_id(text), shard, 2)] for shard in range(2)]
    bad = {*owned[0][:2], *owned[1][:2]}

    def two_bad_a_shard(request: Request) -> Reply:
        return said(request, "") if request.messages[-1]["content"] in bad else echo(request)

    generate_with(RuleEngine(two_bad_a_shard), answering(shards=2, shard=0, max_rejected=0.075))
    with pytest.raises(UserError, match="4 of 40 rows rejected"):
        generate_with(RuleEngine(two_bad_a_shard), answering(shards=2, shard=1, max_rejected=0.075))


def test_thinking_is_cut_off_and_a_verdict_is_read(bucket, answering):
    generate_with(RuleEngine(), answering())

    def judge(request: Request) -> Completion:
        right = "0 apples" in request.messages[-1]["content"]
        return said(request, f"<think>hm</think>\nGood.\nConclusion: {'right' if right else 'maybe'}")

    facts = generate_with(RuleEngine(judge), answering("critique"))["critique"]
    rows = stored_rows(bucket, "critique")
    assert {row["critique"] for row in rows} == {"Good.\nConclusion: right", "Good.\nConclusion: maybe"}
    assert {row["verdict"] for row in rows} == {"right", None}
    assert {row["critique_thinking"] for row in rows} == {"hm"}
    assert {row["answer_thinking"] for row in rows} == {None}
    assert facts.metrics["verdict_missing"] == sum(row["verdict"] is None for row in rows)
    assert facts.rows.rejected == 0


def test_the_teachers_own_answers_are_rows_of_their_own_beside_the_students(bucket, answering):
    generate_with(RuleEngine(), answering())
    student = stored_rows(bucket, "answer")
    facts = generate_with(RuleEngine(lambda request: said(request, "<think>hm</think>\nMine.")), answering("distill"))
    rows = stored_rows(bucket, "distill")
    assert list(rows[0]) == row_schema("distill").names
    assert {(row["distilled"], row["distilled_thinking"], row["distilled_tokens"]) for row in rows} == {
        ("Mine.", "hm", 2)
    }
    assert facts["distill"].rows == Rows(total=40, done=40)
    assert facts["distill"].generated_tokens == 80
    assert stored_rows(bucket, "answer") == student


def test_a_fused_teacher_writes_two_stages_with_one_engine(bucket, answering):
    generate_with(RuleEngine(), answering())
    teacher = RuleEngine()
    facts = generate_with(teacher, answering("critique", "refine"))
    assert list(facts) == ["critique", "refine"]
    assert len(teacher.asked) == 80
    rows = stored_rows(bucket, "refine")
    assert all({"prompt", "answer", "critique", "refinement"} <= set(row) for row in rows)
    assert len(rows) == 40


def roles_asked(engine: RuleEngine) -> list[str]:
    return [request.name.rsplit("-", 1)[-1] for request in engine.asked]


def test_a_refinement_is_asked_for_right_after_its_critique(answering):
    generate_with(RuleEngine(), answering())
    teacher = RuleEngine(batch=1, room=1)
    generate_with(teacher, answering("critique", "refine"))
    assert roles_asked(teacher) == ["critique", "refine"] * 40
    keys = [request.name.rsplit("-", 1)[0] for request in teacher.asked]
    assert keys[::2] == keys[1::2]


def test_a_fused_teacher_whose_refinements_are_hopeless_stops_early(answering):
    generate_with(RuleEngine(), answering())

    def mute(request: Request) -> Reply:
        return said(request, "") if request.name.endswith("refine") else echo(request)

    for asked_at_most in (16, 0):
        engine = RuleEngine(mute, batch=1, room=2)
        with pytest.raises(UserError, match="refine: 3 of 40 rows rejected"):
            generate_with(engine, answering("critique", "refine", max_rejected=0.05))
        assert len(engine.asked) <= asked_at_most


def test_a_rejected_critique_has_no_refinement_and_both_stages_add_up(bucket, answering):
    generate_with(RuleEngine(), answering())

    def some_silent(request: Request) -> Reply:
        silent = request.name.endswith("critique") and "1 apples" in request.messages[-1]["content"]
        return said(request, "") if silent else echo(request)

    facts = generate_with(RuleEngine(some_silent), answering("critique", "refine", max_rejected=0.2))
    assert (facts["critique"].rows.total, facts["critique"].rows.done, facts["critique"].rows.rejected) == (40, 36, 4)
    assert (facts["refine"].rows.total, facts["refine"].rows.done) == (36, 36)
    assert len(stored_rows(bucket, "refine")) == 36


@pytest.mark.parametrize("steps", [0, 1, 4, 8, 15, 25])
def test_an_interrupted_fused_teacher_asks_for_nothing_twice(bucket, answering, steps):
    generate_with(RuleEngine(), answering())
    first, attempt = RuleEngine(), answering("critique", "refine")
    stop_after(first, steps, attempt.stop)
    with pytest.raises(Interrupted):
        generate_with(first, attempt)
    stored = sum(attempt.facts[role].rows.done for role in ("critique", "refine"))
    second = RuleEngine()
    generate_with(second, answering("critique", "refine"))
    assert len(second.asked) == 80 - stored
    for stage in ("critique", "refine"):
        rows = stored_rows(bucket, stage)
        assert len(rows) == len({row["id"] for row in rows}) == 40


def test_after_an_interruption_the_last_role_is_caught_up_first(answering):
    generate_with(RuleEngine(), answering())
    attempt = answering("critique", "refine")
    first = RuleEngine(batch=6, room=6)
    stop_after(first, 0, attempt.stop)
    with pytest.raises(Interrupted):
        generate_with(first, attempt)
    second = RuleEngine(batch=1, room=1)
    generate_with(second, answering("critique", "refine"))
    assert roles_asked(second)[:7] == ["refine"] * 6 + ["critique"]


def test_a_stored_refinement_has_its_critique_stored(bucket, answering, monkeypatch):
    """However the writes are cut off: critiques go first."""
    generate_with(RuleEngine(), answering())
    puts: list[str] = []
    put_rows = Folder.put_rows
    monkeypatch.setattr(Folder, "put_rows", lambda self, *given: (puts.append(self.stage), put_rows(self, *given))[1])
    generate_with(RuleEngine(batch=1), answering("critique", "refine"))
    flushes = "".join(stage[0] for stage in puts)
    assert flushes.startswith("cr")
    assert "rr" not in flushes


def test_fused_and_separate_stages_write_the_same_rows(storage, bucket, tiny_model, tmp_path, answering):
    generate_with(RuleEngine(), answering())
    fused = generate_with(RuleEngine(), answering("critique", "refine"))
    together = stored_rows(bucket, "refine")
    for key in list(bucket.list("")):
        if "/critique/" in key.key or "/refine/" in key.key:
            bucket.delete(key.key)
    apart = generate_with(RuleEngine(), answering("critique")) | generate_with(RuleEngine(), answering("refine"))
    assert stored_rows(bucket, "refine") == together
    assert {role: facts.digest for role, facts in apart.items()} == {role: f.digest for role, f in fused.items()}


def told_etas(given: Any, engine: RuleEngine, monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What is told of the remaining time after every step of an engine whose steps take a second each."""
    seconds, etas = [0.0], list[float | None]()
    monkeypatch.setattr(generate, "REPORT_SECONDS", 0)
    monkeypatch.setattr(generate, "Pace", lambda: Pace(lambda: seconds[0]))
    engine.before_step = lambda: seconds.append(seconds.pop() + 1.0)
    monkeypatch.setattr(given.progress, "report", lambda _stage, rows, *, eta, **told: etas.append(eta))
    generate_with(engine, given)
    return etas


def test_nothing_is_said_of_the_remaining_time_before_twice_as_many_rows_have_ended_as_are_under_way(
    answering, monkeypatch
):
    """40 rows; 3 end in a second, and 5 more are under way."""
    etas = told_etas(answering(), RuleEngine(batch=3, room=8), monkeypatch)
    assert etas[:4] == [None, None, None, pytest.approx(28 * 4 / 12)]
    assert etas[-1] == 0


def test_the_remaining_time_of_a_fused_teacher_is_that_of_both_roles(answering, monkeypatch):
    generate_with(RuleEngine(), answering())
    etas = told_etas(answering("critique", "refine"), RuleEngine(batch=4, room=8), monkeypatch)
    seconds = len(etas) // 2
    assert seconds == 20
    said = [(second, eta) for second, eta in enumerate(etas[::2], 1) if eta is not None]
    assert said[0][0] == 2
    assert all(eta == pytest.approx(seconds - second) for second, eta in said)


def test_fused_shards_need_not_wait_for_each_other(bucket, answering):
    generate_with(RuleEngine(), answering())
    for shard in range(2):
        generate_with(RuleEngine(), answering("critique", "refine", shards=2, shard=shard))
    assert len(stored_rows(bucket, "critique")) == len(stored_rows(bucket, "refine")) == 40


def test_separate_stages_and_a_fused_teacher_share_one_folder(answering):
    generate_with(RuleEngine(), answering())
    fused = generate_with(RuleEngine(), answering("critique", "refine"))
    engine = RuleEngine()
    assert generate_with(engine, answering("refine"))["refine"].digest == fused["refine"].digest
    assert not engine.asked


def test_an_edited_prompt_or_another_sampling_gets_a_folder_of_its_own(answering, monkeypatch):
    def digest(**changes):
        return generate_with(RuleEngine(), answering(**changes))["answer"].digest

    first = digest()
    assert digest(sampling=(Sampling(max_tokens=7),)) != first
    assert digest(shards=1) == first
    monkeypatch.setattr(generate.prompts, "plain", lambda messages: "another frame")
    assert digest() != first


def test_the_seed_of_a_row_depends_on_the_run_the_stage_and_the_key_only():
    row = {"id": "ab", "sample": 0}
    seed = row_sampling(GREEDY, "answer", row).seed
    assert seed == row_sampling(GREEDY, "answer", row | {"prompt": "x"}).seed
    others = [
        row_sampling(GREEDY, "critique", row).seed,
        row_sampling(GREEDY, "answer", row | {"sample": 1}).seed,
        row_sampling(GREEDY.model_copy(update={"seed": 1}), "answer", row).seed,
    ]
    assert seed not in others
    assert 0 <= seed < 2**31


def test_rows_that_vanish_are_an_error(answering, monkeypatch):
    monkeypatch.setattr(generate, "kept_or_rejected", lambda *_: (None, None))
    with pytest.raises(RowsLost, match="read 40, kept 0, rejected 0"):
        generate_with(RuleEngine(), answering())


def test_a_program_that_dies_after_its_first_write_every_time_gets_to_the_end(bucket, answering, monkeypatch):
    put = Bucket.put
    written: list[str] = []

    def put_and_die(self: Bucket, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        put(self, key, data, if_absent=if_absent)
        written.append(key.rsplit("/", 1)[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Bucket, "put", put_and_die)
    for _ in range(30):
        try:
            generate_with(RuleEngine(), answering())
        except KeyboardInterrupt:
            continue
        break
    assert written[-3:] == ["00000-of-00001.json", "DONE.json", "answer.json"]
    assert len(stored_rows(bucket, "answer")) == 40


def test_a_stage_needs_the_one_before(storage, tiny_model, tmp_path):
    with pytest.raises(TransientError, match="has no output of prepare"):
        generate_with(RuleEngine(), context(storage, generate_work(tiny_model, "answer"), tmp_path))
