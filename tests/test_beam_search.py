"""Beam search on shared pages finds what transformers' beam search finds: the same sequences, scores within 1e-3.

And what it finds does not depend on who shares the batch, on chunks, on the prefix cache and on preemption.
"""

from __future__ import annotations

import functools
import itertools
import random
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from driving import ShuffledPool, another_engine, compilations, greedy
from families import FAMILIES

from jaxpaged import LLM, BeamSearchParams, RequestError, SamplingParams
from jaxpaged.checkpoint import load, open_checkpoint
from jaxpaged.cli import main
from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.beams import BeamGroup
from jaxpaged.host.pages import PagePool
from jaxpaged.host.request import TokenEvent
from jaxpaged.model import cache as kv_cache
from jaxpaged.model import step as model_step
from jaxpaged.observe import Recording, Replay

FAMILY = next(family for family in FAMILIES if family.name == "qwen3")
V = FAMILY.config.vocab_size
PAGE = 8
TOLERANCE = 1e-3
WIDTHS = (2, 4, 8)
PENALTIES = (-1.0, 0.0, 0.5, 1.0, 2.0)
STOPPING = (False, True, "never")

Search = tuple[list[int], SamplingParams]
Found = list[tuple[list[int], float]]  # the tokens of each output and their log-probability, best first


@pytest.fixture(scope="module")
def engine():
    options = EngineConfig(
        dtype="float32",
        block_size=PAGE,
        max_num_seqs=32,
        max_num_batched_tokens=64,
        prefill_tile=16,
        decode_row_buckets=(32,),
        prefill_tile_buckets=(4,),
        num_gpu_blocks_override=32 * 16 + 1,
        max_logprobs=20,
    )
    with tempfile.TemporaryDirectory() as folder:
        weights = load(open_checkpoint(FAMILY.save(Path(folder))), "float32")
    with Engine.from_weights(options, FAMILY.config, weights, pool_type=ShuffledPool) as engine:
        yield engine


def search(width: int, **options) -> SamplingParams:
    return SamplingParams(use_beam_search=True, n=width, **{"temperature": 0, "ignore_eos": True, **options})


def find(engine: Engine, searches: list[Search], *, at_once: int | None = None) -> list[Found]:
    """Serve all searches, each output's whole event taken apart, with every invariant checked after every step."""
    found: list[dict[int, TokenEvent]] = [{} for _ in searches]
    coming = list(enumerate(searches))
    while coming or engine.has_unfinished:
        while coming and (at_once is None or len(engine.scheduler._by_id) < at_once):
            index, (prompt, params) = coming.pop(0)
            engine.add_request(prompt, params, request_id=str(index))
        for event in engine.step():
            assert event.finish_reason in ("stop", "length") and event.token_id is None
            assert event.index not in found[int(event.request_id)]
            found[int(event.request_id)][event.index] = event
        engine.scheduler.check()
    assert engine.pool.num_used == 0
    for events, (_, params) in zip(found, searches, strict=True):
        assert sorted(events) == list(range(params.n))
    return [[(list(events[i].token_ids), events[i].cumulative_logprob) for i in sorted(events)] for events in found]  # type: ignore[misc]


def same(ours: Found, theirs: Found, where: object = "") -> None:
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs], where
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=TOLERANCE), where


@functools.cache
def prompts() -> list[list[int]]:
    """Prompts of one token, of about a page, and of some pages."""
    rng = random.Random(11)
    return [[rng.randrange(V) for _ in range(length)] for length in (1, PAGE, PAGE + 1, 3 * PAGE + 5)]


def all_searches(model_tokens: list[list[int]]) -> list[Search]:
    """Every combination of width, penalty and stopping; the ids that end beams are tokens that beams do hold."""
    searches = []
    rng = random.Random(12)
    for number, (width, penalty, stopping) in enumerate(itertools.product(WIDTHS, PENALTIES, STOPPING)):
        index = number % len(prompts())
        # None, one, two and three ids: transformers keeps (1 + ids) * width candidates.
        stops = tuple(sorted(set(rng.sample(model_tokens[index], number % 4))))
        options = {"max_tokens": rng.randint(12, 28), "length_penalty": penalty, "early_stopping": stopping}
        searches.append((prompts()[index], search(width, stop_token_ids=stops, **options)))
    return searches


@pytest.fixture(scope="module")
def searches(engine: Engine) -> list[Search]:
    plain = find(another_engine(engine), [(prompt, search(8, max_tokens=24)) for prompt in prompts()])
    return all_searches([[token for tokens, _ in found for token in tokens[2:]] for found in plain])


@pytest.fixture(scope="module")
def answers(engine: Engine, searches: list[Search]) -> list[Found]:
    """What the searches find one after another, each alone."""
    return find(another_engine(engine, enable_prefix_caching=False), searches, at_once=1)


def test_equal_to_transformers(searches: list[Search], answers: list[Found], torch, request) -> None:
    # Its threads wait for each other where others work too: 107 s instead of 4.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(num_threads))
    model = FAMILY.transformers_model()
    num_short = num_long = 0
    for (prompt, params), ours in zip(searches, answers, strict=True):
        with torch.no_grad():
            theirs = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                num_beams=params.n,
                num_return_sequences=params.n,
                max_new_tokens=params.max_tokens,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                eos_token_id=list(params.stop_token_ids) or None,
                pad_token_id=V - 1,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
            )
        lengths = (theirs.beam_indices >= 0).sum(dim=1).tolist()
        wanted = [
            (sequence[len(prompt) : len(prompt) + length].tolist(), score)
            for sequence, length, score in zip(theirs.sequences, lengths, theirs.sequences_scores.tolist(), strict=True)
        ]
        scores = [(tokens, logprob / len(tokens) ** params.length_penalty) for tokens, logprob in ours]
        same(scores, wanted, params)
        num_short += sum(len(tokens) < params.max_tokens for tokens, _ in ours)  # type: ignore[operator]
        num_long += sum(len(tokens) == params.max_tokens for tokens, _ in ours)
    assert num_short > 40 and num_long > 40, "stop ids that stop nothing, or everything, see little"


# --- the same whatever happens around it --------------------------------------------------------------------------------

CROWDS = {
    "in a crowd": {"enable_prefix_caching": False},
    "prefix cache": {},
    "chunks of 1": {"long_prefill_token_threshold": 1},
    "chunks of 7": {"long_prefill_token_threshold": 7, "enable_prefix_caching": False},
    "few tokens in a step": {"max_num_batched_tokens": 5, "max_num_seqs": 9},
    # Hardly more pages than the widest search needs alone.
    "preempted": {"num_pages": 59, "enable_prefix_caching": False},
    "preempted, prefix cache": {"num_pages": 59},
    "preempted, in chunks": {"num_pages": 59, "long_prefill_token_threshold": 7},
}


@pytest.mark.parametrize("name", CROWDS)
def test_a_crowd_does_not_matter(name: str, engine: Engine, searches: list[Search], answers: list[Found]) -> None:
    crowd = another_engine(engine, **CROWDS[name])
    for index, (found, wanted) in enumerate(zip(find(crowd, searches), answers, strict=True)):
        same(found, wanted, (name, index))
    assert (crowd.scheduler.num_preemptions > 0) == name.startswith("preempted")
    assert crowd.scheduler.num_copies > 100
    assert (crowd.stats()["prefix_cache_hits"] > 100) == crowd.config.enable_prefix_caching


def test_among_requests_that_are_no_searches(engine: Engine, searches: list[Search], answers: list[Found]) -> None:
    """Nor does a search matter to them."""
    others = [(prompt, SamplingParams(n=3, temperature=1.5, seed=5, max_tokens=20)) for prompt in prompts()]
    others += [(prompt, greedy(20)) for prompt in prompts()]

    def tokens(crowd: Engine, with_searches: bool) -> dict[str, dict[int, list[int]]]:
        found: dict[str, dict[int, list[int]]] = {}
        for index, (prompt, params) in enumerate(others):
            crowd.add_request(prompt, params, request_id=f"other {index}")
            if with_searches:
                crowd.add_request(*searches[index], request_id=f"search {index}")
        while crowd.has_unfinished:
            for event in crowd.step():
                of = found.setdefault(event.request_id, {}).setdefault(event.index, [])
                of += event.token_ids or [event.token_id]
            crowd.scheduler.check()
        return found

    alone, together = tokens(another_engine(engine), False), tokens(another_engine(engine), True)
    for index in range(len(others)):
        assert together[f"other {index}"] == alone[f"other {index}"]
        assert [together[f"search {index}"][i] for i in range(searches[index][1].n)] == [one for one, _ in answers[index]]


def test_beams_that_part_anywhere_equal_beams_that_share_nothing(engine: Engine) -> None:
    """R03: prompts that end at every place of two pages; the other side computes each beam anew, from its first token."""
    rng = random.Random(13)
    cases = [
        ([rng.randrange(V) for _ in range(length)], search(rng.randint(2, 8), max_tokens=rng.randint(PAGE, 2 * PAGE)))
        for length in range(1, 2 * PAGE + 2)
    ]
    weights, config, most = engine.runner.weights, engine.model, 8 * PAGE  # type: ignore[attr-defined]
    prefill = jax.jit(functools.partial(model_step.prefill, config=config))
    cache = kv_cache.init_cache(config, 8 * most // PAGE + 1, PAGE)
    tables = np.arange(1, 8 * most // PAGE + 1, dtype=np.int32).reshape(8, -1)

    def candidates(texts: list[list[int]]) -> list[list[tuple[int, float]]]:
        padded = np.zeros((8, most), np.int32)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        lens = np.array([len(text) for text in texts] + [0] * (8 - len(texts)), np.int32)
        scores = np.asarray(prefill(weights, cache, padded, tables, lens)[0])
        last = scores[np.arange(len(texts)), lens[: len(texts)] - 1]
        return [list(enumerate(row.tolist())) for row in np.asarray(jax.nn.log_softmax(last, axis=-1))]

    crowd = find(another_engine(engine, enable_prefix_caching=False), cases)
    for (prompt, params), found in zip(cases, crowd, strict=True):
        group = BeamGroup(params.n, params.max_tokens, ())  # type: ignore[arg-type]
        while not group.is_over:
            group.advance(candidates([[*prompt, *beam.token_ids] for beam in group.running]))
        same(found, [(list(one.token_ids), one.cumulative_logprob) for one in group.finished], len(prompt))


def test_a_temperature_divides_the_logits(engine: Engine) -> None:
    prompt = prompts()[1]
    zero, one, two = (find(engine, [(prompt, search(4, max_tokens=1, temperature=t))])[0] for t in (0, 1.0, 2.0))
    assert zero == one
    assert [tokens for tokens, _ in two] == [tokens for tokens, _ in one]
    # Differences of logits are halved.
    assert two[0][1] - two[3][1] == pytest.approx((one[0][1] - one[3][1]) / 2, abs=1e-5)
    assert sum(np.exp(logprob) for _, logprob in two) < 1


def test_nothing_compiles_for_a_search(engine: Engine, searches: list[Search]) -> None:
    with compilations() as seen:
        find(another_engine(engine, num_pages=59), searches[:9])
    assert seen == []


def test_a_recorded_search_replays(engine: Engine, searches: list[Search], tmp_path: Path) -> None:
    config = another_engine(engine).config
    recorded = Engine(config, engine.model, engine.runner, pool=PagePool(59))
    find(recorded, searches)
    replay = Replay(Recording.load(recorded.save_recording(tmp_path / "day")))
    assert replay.run(check=True) is None
    assert replay.num_steps == recorded.num_steps and replay.scheduler.num_preemptions == recorded.scheduler.num_preemptions > 0


# --- LLM ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm():
    options = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 32, "decode_row_buckets": (8,)}
    with LLM(use_tqdm_on_load=False, dtype="float32", prefill_tile_buckets=(2,), **options) as llm:
        yield llm


def test_beam_search_of_llm(llm: LLM) -> None:
    texts = ["One day", "Sort these words", {"prompt_token_ids": [5, 6, 7]}]
    params = BeamSearchParams(beam_width=4, max_tokens=12, length_penalty=0.5)
    found = llm.beam_search(texts, params)
    assert [len(output.sequences) for output in found] == [4, 4, 4]
    as_outputs = llm.generate(
        texts,
        SamplingParams(use_beam_search=True, n=4, temperature=0, max_tokens=12, length_penalty=0.5),
        use_tqdm=False,
    )
    for output, same_output in zip(found, as_outputs, strict=True):
        prompt = same_output.prompt_token_ids
        scores = []
        for beam, one in zip(output.sequences, same_output.outputs, strict=True):
            assert beam.tokens[: len(prompt)] == prompt
            stops = one.finish_reason == "stop"
            assert beam.tokens[len(prompt) :] == (one.token_ids[:-1] if stops else one.token_ids)
            assert beam.cum_logprob == one.cumulative_logprob and beam.finish_reason == one.finish_reason
            assert beam.text == llm.get_tokenizer().decode(beam.tokens, skip_special_tokens=False)
            scores.append(one.cumulative_logprob / len(one.token_ids) ** 0.5)
        assert scores == sorted(scores, reverse=True)
        assert [one.index for one in same_output.outputs] == [0, 1, 2, 3] and same_output.finished
    assert llm.stats()["kv_blocks_active"] == 0


def test_the_end_of_sequence_is_in_the_tokens_when_asked_for(llm: LLM) -> None:
    prompt = llm.get_tokenizer().encode("The end.")

    def results(**options):
        params = BeamSearchParams(beam_width=3, max_tokens=24, **options)
        return llm.beam_search({"prompt_token_ids": prompt}, params)[0].sequences

    eos = set(llm.model_config.eos_token_ids)
    without, with_it, ignored = results(), results(include_stop_str_in_output=True), results(ignore_eos=True)
    assert any(one.finish_reason == "stop" for one in without), "no beam of this prompt ends"
    for one, other in zip(without, with_it, strict=True):
        assert other.tokens == one.tokens + other.tokens[len(one.tokens) :] and other.cum_logprob == one.cum_logprob
        assert len(other.tokens) - len(one.tokens) == (one.finish_reason == "stop")
        assert (other.tokens[-1] in eos) == (one.finish_reason == "stop")
    assert {one.finish_reason for one in ignored} == {"length"} and all(len(one.tokens) == len(prompt) + 24 for one in ignored)


def test_a_search_streams_once_at_its_end(llm: LLM) -> None:
    params = SamplingParams(use_beam_search=True, n=2, temperature=0, max_tokens=5)
    outputs = list(llm.stream("One day", params))
    assert len(outputs) == 1 and outputs[0].finished and outputs == [*outputs]
    assert [one.text for one in outputs[0].outputs] == [one.text for one in llm.generate("One day", params)[0].outputs]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(max_tokens=3), "params: got SamplingParams, expected BeamSearchParams"),
        (BeamSearchParams(beam_width=9, max_tokens=3), "n: got 9 beams, which run together; the limit is max_num_seqs 8"),
    ],
)
def test_what_llm_refuses(llm: LLM, params, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.beam_search("One day", params)
    assert llm.stats()["num_requests_waiting"] == 0


def test_more_candidates_than_a_step_yields_are_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"n: 12 beams and 9 ids .* need 21 candidates of each beam, .* max_logprobs 20"):
        engine.add_request([1, 2], search(12, stop_token_ids=tuple(range(9))))
    with pytest.raises(RequestError, match="n: 8 beams of up to 127 tokens need 128 pages of 8, the whole pool has 58"):
        another_engine(engine, num_pages=59).add_request([1, 2], search(8, max_tokens=None))
    assert not engine.has_unfinished


def test_flags_of_the_command_line(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """The best sequence is what is printed; what the model recommends for drawing tokens is left aside."""
    flags = ["--use-beam-search", "--n", "3", "--early-stopping", "true", "--length-penalty", "0.5", "--max-tokens", "8"]
    flags += ["--prefill-tile-buckets", "4", "--max-num-batched-tokens", "64", "--decode-row-buckets", "8"]  # fewer to compile
    assert main(["generate", "One day", "--max-model-len", "64", "--max-num-seqs", "8", "--dtype", "float32", *flags]) == 0
    params = BeamSearchParams(beam_width=3, max_tokens=8, early_stopping=True, length_penalty=0.5)
    best = llm.beam_search("One day", params)[0].sequences[0]
    assert capsys.readouterr().out == f"{best.text.removeprefix('One day')}\n"  # type: ignore[union-attr]
    assert main(["generate", "One day", "--use-beam-search", "--early-stopping", "maybe"]) == 2
    assert "early_stopping: got 'maybe', expected True, False or 'never'\n" in capsys.readouterr().err
