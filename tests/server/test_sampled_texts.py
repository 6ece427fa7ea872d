"""Sampled texts are as lossless as greedy ones: the seed decides, and neither draft, batch, retry nor replica."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.inference.bundle import BOS, EOS
from edge_runtime.inference.sampling import Sampler
from edge_runtime.wire import Options, Status, encode_tokens
from edge_runtime.wire.envelope import seed_of
from models.family import LATENT
from server.engine import Answer, Engine, Job, encode_image
from server.escalation import passed_up
from tests.bundles import MAX_TOKENS, VOCABULARY
from tests.server.boards import SYMBOLS, Lane, is_balanced, request
from tests.server.test_engine import draft_of, result

WISHES = (
    Options(temperature=1.0),
    Options(temperature=0.6, top_k=12, top_p=0.9),
    Options(temperature=1.5, repetition_penalty=1.7, min_tokens=9, stop=(5, 17, 30)),
    Options(repetition_penalty=2.5, min_tokens=4),  # greedily
)
PLAIN = len(WISHES)  # stands for a row that is written greedily, without any change of the logits


def job(i: int, wish: int, seed: int = 7, draft: Sequence[int] | None = None, **changes: object) -> Job:
    sampler = Sampler(WISHES[wish], seed) if wish != PLAIN else None
    return Job(SYMBOLS[i], draft=None if draft is None else tuple(draft), sampler=sampler, **changes)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[tuple[int, int], Answer]:
    """By latent and wish: each text by itself, without a draft, in one pass per token."""
    return {(i, wish): engine.answer([job(i, wish)])[0] for i in range(len(SYMBOLS)) for wish in range(PLAIN + 1)}


def test_the_settings_and_the_seed_change_texts(engine: Engine, alone) -> None:
    texts = {tuple(alone[i, wish].tokens for i in range(len(SYMBOLS))) for wish in range(PLAIN + 1)}
    assert len(texts) == PLAIN + 1
    for i in range(4):
        assert len({engine.answer([job(i, 2, seed)])[0].tokens for seed in range(4)}) == 4


def test_every_token_is_the_samplers_for_the_text_before_it_and_the_confidence_is_the_targets(engine, alone) -> None:
    """Against the whole text at once, as in training."""
    decoder = engine.decoders["edge"]
    with torch.inference_mode():
        memory = encode_image(decoder, engine.features([Job(s) for s in SYMBOLS], (1,)), (1,))
        for (i, wish), answer in alone.items():
            if wish == PLAIN or len(answer.tokens) == MAX_TOKENS:
                continue
            image = [(k[i : i + 1], v[i : i + 1]) for k, v in memory]
            logits = decoder(torch.tensor([[BOS, *answer.tokens]]), image)[0] + decoder.never_emitted
            sampler = Sampler(WISHES[wish], 7)
            chosen = [sampler.choose(row.numpy(), answer.tokens[:n]) for n, row in enumerate(logits)]
            assert tuple(chosen[:-1]) == answer.tokens
            assert chosen[-1] in sampler.ends
            probability = logits.log_softmax(-1)[range(len(chosen)), chosen].mean().exp().item()
            assert answer.confidence == pytest.approx(probability, abs=1e-4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 15), st.integers(0, PLAIN), st.none() | st.integers(0, 99)), min_size=1, max_size=9
    )
)
def test_any_batch_with_any_drafts_writes_what_each_row_alone_writes(engine, alone, rows) -> None:
    jobs = [
        job(i, wish, draft=None if seed is None else draft_of(alone[i, wish].tokens, seed)) for i, wish, seed in rows
    ]
    for (i, wish, _), answer in zip(rows, engine.answer(jobs), strict=True):
        assert result(answer) == result(alone[i, wish])
        assert answer.accepted <= answer.proposed
        assert answer.passes <= alone[i, wish].passes


@pytest.mark.parametrize("wish", range(PLAIN))
def test_no_draft_a_perfect_one_and_garbage_give_the_same_text_and_a_perfect_one_saves_passes(
    engine: Engine, alone, wish: int
) -> None:
    for i in range(4):
        own = alone[i, wish]
        for draft in ((), own.tokens, (4,) * 30, (-1, 1 << 31), (EOS,), (5, 17, 30), own.tokens[::-1]):
            assert result(engine.answer([job(i, wish, draft=draft)])[0]) == result(own)
        perfect = engine.answer([job(i, wish, draft=own.tokens)])[0]
        assert perfect.accepted == perfect.proposed == min(len(own.tokens), MAX_TOKENS - 1)
        assert perfect.passes < max(own.passes, 2)


class AtStartOfPass(Sampler):
    """A flaw: the tokens of a pass are chosen with the history and position of its first one."""

    def choices(self, logits: Sequence[np.ndarray], written: Sequence[int]) -> Iterator[int]:
        return (self.choose(row, written) for row in logits)


class NoiseOfDraft(Sampler):
    """A flaw: the noise depends on how many tokens are read at a time, that is, on the draft."""

    def choices(self, logits: Sequence[np.ndarray], written: Sequence[int]) -> Iterator[int]:
        return replace(Sampler(self.settings, self.seed), seed=self.seed + len(logits)).choices(logits, written)


@pytest.mark.parametrize("flaw", [AtStartOfPass, NoiseOfDraft])
def test_a_draft_that_leaks_into_the_choice_would_be_found(engine: Engine, flaw: type[Sampler]) -> None:
    flawed = flaw(WISHES[2], 7)
    differing = 0
    for symbols in SYMBOLS[:4]:
        own = engine.answer([Job(symbols, sampler=flawed)])[0]
        drafted = engine.answer([Job(symbols, sampler=flawed, draft=own.tokens)])[0]
        differing += drafted.tokens != own.tokens
    assert differing > 0


def test_texts_are_as_long_as_they_shall_be_and_stop_where_they_shall(alone) -> None:
    for i in range(len(SYMBOLS)):
        tokens = alone[i, 2].tokens
        assert 9 <= len(tokens) <= MAX_TOKENS
        assert {EOS, *WISHES[2].stop}.isdisjoint(tokens)  # what ends a text is no part of it
    assert min(len(alone[i, 2].tokens) for i in range(len(SYMBOLS))) < MAX_TOKENS


@pytest.mark.parametrize("limit", [1, 3, 8, 9, 16, 500])
def test_a_shorter_limit_cuts_the_same_text(engine: Engine, alone, limit: int) -> None:
    for draft in (None, alone[1, 2].tokens):
        answer = engine.answer([job(1, 2, draft=draft, max_tokens=limit)])[0]
        assert answer.tokens == alone[1, 2].tokens[:limit]


def test_a_row_without_numbers_fails_by_name_and_its_neighbours_keep_their_texts(engine: Engine, alone) -> None:
    jobs = [job(i, wish) for i, wish in enumerate((0, 1, 2, 3, PLAIN))]
    for broken in range(len(jobs)):
        batch = [
            replace(one, symbols=np.full(LATENT, np.nan), draft=(5, 6, 7)) if i == broken else one
            for i, one in enumerate(jobs)
        ]
        answers = engine.answer(batch)
        assert "no finite numbers" in answers[broken].error
        for i, wish in enumerate((0, 1, 2, 3, PLAIN)):
            assert i == broken or result(answers[i]) == result(alone[i, wish])


# ---- requests ----


def sampled(wish: int, **options: object) -> Options:
    return msgspec.structs.replace(WISHES[wish], **options)


def test_a_repeat_a_replica_and_another_request_with_the_seed_get_the_same_text(make_service, bundle, alone) -> None:
    lane, texts = Lane(), set()
    for service, changes in (
        (make_service(), {}),
        (make_service(), {"draft": encode_tokens((6, 7, 8))}),
        (make_service(max_batch=1), {"draft": encode_tokens(alone[3, 1].tokens), "age_ms": 900}),
    ):
        for _ in range(2):
            asked = request(bundle, 3, options=sampled(1, seed=7), **changes)
            service.receive(lane.arrival(asked))
            service.answer(service.target_queue.take(0))
            service.receive(lane.arrival(asked))  # a repeat
            texts |= {tuple(reply.token_ids) for reply in lane.replies[-2:]}
            assert lane.replies[-1].status is Status.OK
        assert is_balanced(service)
    assert texts == {alone[3, 1].tokens}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schedule=st.lists(
        st.tuples(st.sampled_from(("deliver", "deliver", "answer", "kill")), st.integers(0, 1), st.integers(0, 3)),
        min_size=4,
        max_size=16,
    )
)
def test_no_schedule_of_lost_doubled_late_and_reordered_requests_and_killed_replicas_changes_a_token(
    make_service, bundle, alone, schedule
) -> None:
    lane, replicas, passed = Lane(), [make_service(), make_service()], 0
    drafts = [(), alone[1, 1].tokens, (6, 7, 8), alone[3, 3].tokens[:3]]
    asked = [request(bundle, i, options=sampled(i, seed=7), draft=drafts[i], id=i.to_bytes(8, "big")) for i in range(4)]
    for what, replica, i in schedule:
        if what == "deliver":  # the same request, again or for the first time, now or later
            passed += 1
            late = msgspec.structs.replace(asked[i], age_ms=passed, budget_ms=60_000 - passed)
            replicas[replica].receive(lane.arrival(late))
        elif what == "answer":
            replicas[replica].answer(replicas[replica].target_queue.take(0))
        else:  # what it had accepted is lost
            replicas[replica] = make_service()
    for replica in replicas:
        replica.answer(replica.target_queue.take(0))
        assert is_balanced(replica)
    for reply in lane.replies:
        i = int.from_bytes(reply.id, "big")
        assert (reply.status, tuple(reply.token_ids)) == (Status.OK, alone[i, i].tokens)


def test_without_a_seed_the_requests_id_is_the_seed(make_service, bundle, engine: Engine) -> None:
    service, lane, texts = make_service(), Lane(), set()
    for number in (1, 2, 3, 1 << 60):
        asked = request(bundle, 3, options=sampled(0), id=number.to_bytes(8, "big"))
        service.receive(lane.arrival(asked))
        service.answer(service.target_queue.take(0))
        assert tuple(lane.replies[-1].token_ids) == engine.answer([job(3, 0, seed=number)])[0].tokens
        texts.add(lane.replies[-1].tokens)
    assert len(texts) == 4


@pytest.mark.parametrize("wish", [0, 3])
def test_the_tier_above_writes_what_it_would_have_written_for_the_board(make_service, bundle, wish: int) -> None:
    """It gets another request id and the edge's text as its draft."""
    cloud, lane = make_service(tier="cloud"), Lane()
    asked = request(bundle, 5, options=sampled(wish))
    for one in (asked, msgspec.structs.replace(passed_up(asked, "e1", (6, 7, 8), 0.1), id=b"other id")):
        cloud.receive(lane.arrival(one))
        cloud.answer(cloud.target_queue.take(0))
    first, second = lane.replies
    assert (first.status, second.status) == (Status.OK, Status.OK)
    assert first.tokens == second.tokens
    assert seed_of(one.options, one.id) == seed_of(asked.options, asked.id) or wish == 3


def test_stop_tokens_that_the_bundle_does_not_have_are_refused_by_name(make_service, bundle) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(request(bundle, options=sampled(0, stop=(VOCABULARY,)))))
    service.answer(service.target_queue.take(0))
    assert (lane.replies[-1].status, "stop tokens" in lane.replies[-1].error) == (Status.BAD_REQUEST, True)
    assert is_balanced(service)


@pytest.mark.parametrize("options", [sampled(0), sampled(3)])
def test_a_target_that_does_not_sample_leaves_the_request_to_another_server(
    make_service, bundle, monkeypatch, options
) -> None:
    service, lane = make_service(), Lane()
    assert service.status()["target"]["sample"]
    monkeypatch.setattr(type(service.target), "abilities", replace(service.target.abilities, sample=False))
    assert not service.status()["target"]["sample"]
    service.receive(lane.arrival(request(bundle, options=options)))
    assert (lane.replies[-1].status, "does not sample" in lane.replies[-1].error) == (Status.UNKNOWN_BUNDLE, True)
    service.receive(lane.arrival(request(bundle, options=Options(top_k=3))))  # without a temperature: greedy
    assert len(service.target_queue) == 1
