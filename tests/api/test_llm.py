"""An LLM on ranks: what a job writes, call after call, the same on every rank; and what all ranks refuse together."""

from pathlib import Path

import numpy as np
import pytest

from api.models import job_records, same, write_model
from moempi import LLM, SamplingParams
from moempi.errors import ConfigError, DataError, NoInputError, UsageError
from moempi.runtime.waiting import barrier

LAYOUTS = {
    1: [{}, {"micro_batches": 4}],
    2: [{}, {"stages": 2}],
    4: [{"stages": 2}, {"stages": 4, "micro_batches": "auto", "overlap": False}, {"transport": "pairwise"}],
}
LINES = [
    {"prompt": "72+71="},
    {"prompt": "sort 98239:", "max_tokens": 4, "top_logprobs": 3, "id": "sorted"},
    {"prompt": "84-15=", "temperature": 1.5, "seed": 5, "n": 3},
    {"tokens": [5, 17, 9, 30], "max_tokens": 9, "ignore_eos": True},
    {"messages": [{"role": "user", "content": "12+30"}]},
    {"prompt": "6x325=", "stop": ["5"]},
    {"prompt": "12+30=", "max_tokens": -1},
    {"tokens": [5, 999]},
    {"tokens": [7] * 100, "max_tokens": 2},
]
RUN = {"precision": "float32", "batch_tokens": 24, "max_sequences": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of all ranks, with the weights in it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    folder = comm.bcast(tmp_path_factory.mktemp("model") if comm.rank == 0 else None)
    if comm.rank == 0:
        write_model(folder)
    barrier(comm)
    return folder


@pytest.fixture(scope="module")
def job(folder):
    """The records of a job on one rank, for each task."""
    from mpi4py import MPI

    comm, found = MPI.COMM_WORLD, {}
    for task in ("generate", "score") if comm.rank == 0 else ():
        found[task] = job_records(folder, LINES, task=task, run=RUN, score={"top_n": 2})
    barrier(comm)
    return comm.bcast(found)


def rows(records):
    """What a result and a record have in common."""
    return [(one.id, one.finish, bool(one.error)) for one in records]


@pytest.mark.ranks(1, 2, 4)
def test_an_llm_returns_what_a_job_writes_bit_for_bit_on_every_rank(comm, num_ranks, folder, job):
    for settings in LAYOUTS[num_ranks]:
        with LLM(folder / "weights.h5", **RUN, **settings) as llm:
            for _ in range(2):
                outputs, scores = llm.generate(LINES), llm.score(LINES, top_n=2)
                check_outputs(outputs, job["generate"])
                check_scores(scores, job["score"])
            assert len(set(comm.allgather(repr((outputs, scores))))) == 1


def check_outputs(outputs, records):
    assert rows(outputs) == rows(records)
    assert [output.text for output in outputs] == [record.text for record in records]
    assert [output.prompt for output in outputs] == [record.prompt.tolist() for record in records]
    assert [output.tokens for output in outputs] == [record.tokens.tolist() for record in records]
    assert all(same(output.logprobs, record.logprobs) for output, record in zip(outputs, records, strict=True))
    of_sorted = outputs[1]
    assert [list(likeliest) for likeliest in of_sorted.top_logprobs] == records[1].top_tokens[:, :3].tolist()
    assert [max(likeliest.values()) for likeliest in of_sorted.top_logprobs] == of_sorted.logprobs
    assert outputs[0].top_logprobs == [{}] * len(outputs[0].tokens) or outputs[0].top_logprobs == []


def check_scores(scores, records):
    assert rows(scores) == rows(records)
    pairs = [(score, record) for score, record in zip(scores, records, strict=True) if not score.error]
    assert all(same(score.logprobs, record.score) for score, record in pairs)
    assert [list(likeliest) for likeliest in scores[0].top_logprobs[1:]] == records[0].score_top_tokens[1:].tolist()
    assert scores[0].top_logprobs[0] == {}


@pytest.mark.ranks(1, 4)
def test_prompts_are_texts_tokens_arrays_or_objects_and_a_bad_one_is_an_error_of_its_own(folder):
    with LLM(folder / "weights.h5", **RUN, max_tokens=4) as llm:
        tokens = llm.tokenizer.encode("72+71=")
        good = ["72+71=", tokens, tuple(tokens), np.array(tokens), {"tokens": np.array(tokens)}, {"prompt": "72+71="}]
        bad = [
            3,
            None,
            {},
            {"prompt": "1", "tokens": [2]},
            [1.5],
            [],
            {"prompt": "1", "metadata": {"a": 1j}},
            "\udc00",
        ]
        bad += [{"messages": []}, {"prompt": "1", "max_tokens": 0}, [2**70]]
        outputs = llm.generate([*good, *bad])
        assert [output.text for output in outputs[: len(good)]] == ["143"] * len(good)
        assert all(output.finish == "error" and output.error for output in outputs[len(good) :])
        assert outputs[len(good)].error.startswith("prompts[6]: prompt: Expected `str")
        assert [output.text for output in llm.generate("72+71=")] == ["143"]
        assert llm.generate([]) == []
        (cut,) = llm.generate(["72+71="], SamplingParams(max_tokens=1))
        assert (cut.text, cut.finish) == ("1", "length")
        (own,) = llm.generate([{"prompt": "72+71=", "max_tokens": 2}], SamplingParams(max_tokens=1))
        assert own.text == "14"


@pytest.mark.ranks(1, 4)
def test_a_scored_prompt_has_likeliest_tokens_at_each_of_its_tokens(folder):
    with LLM(folder / "weights.h5", **RUN) as llm:
        (refused,) = llm.score([{"tokens": [2, 3], "replay": "r.h5"}])
        assert (refused.finish, refused.error) == ("error", "replay: only a job replays routing")
        one, two = llm.score([[2]], top_n=2), llm.score([[2], [2, 3], []], top_n=2)
        assert [score.top_logprobs for score in one] == [[{}]]
        assert [[len(likeliest) for likeliest in score.top_logprobs] for score in two] == [[0], [0, 2], []]
        assert [score.top_logprobs for score in llm.score([[2], [2, 3]], top_n=0)] == [[], []]


@pytest.mark.ranks(1, 4)
def test_chats_go_through_the_chat_template(folder):
    with LLM(folder / "weights.h5", **RUN) as llm:
        chat = [{"role": "user", "content": "72+"}, {"role": "user", "content": "71"}]
        assert llm.chat_text(chat) == "72+71="
        assert llm.chat_text(chat, template_kwargs={"add_generation_prompt": False}) == "72+71"
        expected = llm.generate([llm.tokenizer.encode_chat("72+71=")])[0]
        assert [output.tokens for output in llm.chat(chat)] == [expected.tokens]
        assert [output.text for output in llm.chat([chat, chat])] == ["143", "143"]
        assert llm.chat([[{"content": "no role"}]])[0].finish == "error"
        with pytest.raises(DataError, match="the chat template cannot be applied: no system"):
            llm.chat_text([{"role": "system", "content": "1"}])


@pytest.mark.ranks(2, 4)
def test_calls_that_differ_between_ranks_are_refused_on_all_of_them_and_the_next_call_works(comm, folder):
    with LLM(folder / "weights.h5", **RUN) as llm:
        for call in (
            lambda: llm.generate(["72+71=", f"{comm.rank}+1="]),
            lambda: llm.generate(["1+1="] * (1 + (comm.rank > 0))),
            lambda: llm.generate(["1+1="], SamplingParams(seed=comm.rank)),
            lambda: llm.generate(["1+1="]) if comm.rank else llm.score(["1+1="]),
            lambda: LLM(folder / "weights.h5", max_tokens=1 + comm.rank),
        ):
            with pytest.raises(UsageError, match=r"rank 1: .* another call than rank 0"):
                call()
        assert llm.generate(["72+71="])[0].text == "143"


@pytest.mark.ranks(1, 4)
def test_what_cannot_be_loaded_is_an_error_of_its_kind_on_all_ranks(comm, folder, num_ranks):
    weights = folder / "weights.h5"
    with pytest.raises(NoInputError, match=r"none\.h5"):
        LLM(folder / "none.h5")
    with pytest.raises(DataError):
        LLM(folder / "hub/model.safetensors")
    with pytest.raises(ConfigError, match="stages"):
        LLM(weights, stages=num_ranks + 1)
    with pytest.raises(ConfigError, match="did you mean precision"):
        LLM(weights, precison="float32")
    with pytest.raises(ConfigError, match=r"chat\.date"):
        LLM(weights, date="2025-02-31")
    with LLM(weights, **RUN) as llm:
        assert llm.generate(["72+71="])[0].text == "143"


@pytest.mark.ranks(1, 2)
def test_a_closed_llm_refuses_calls_and_others_go_on(folder):
    with LLM(folder / "weights.h5", **RUN) as first, LLM(folder / "weights.h5", **RUN) as second:
        first.close()
        first.close()
        with pytest.raises(UsageError, match="generate: this LLM is closed"):
            first.generate(["1+1="])
        assert second.generate(["72+71="])[0].text == "143"


@pytest.mark.ranks(2)
def test_closing_frees_the_shared_memory(folder):
    mapped = []
    for _ in range(3):
        with LLM(folder / "weights.h5", **RUN, transport="shared") as llm:
            assert llm.generate(["72+71="])[0].text == "143"
            inside = num_shared_segments()
        mapped.append(num_shared_segments())
    assert inside > mapped[0] == mapped[1] == mapped[2]


def num_shared_segments():
    return sum(" rw-s " in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.ranks(1)
def test_an_exception_in_the_middle_of_a_call_closes_the_llm(folder, monkeypatch):
    llm = LLM(folder / "weights.h5", **RUN)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._engine.lanes.each[0].context.scheduler, "retire", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["72+71="])
    with pytest.raises(UsageError, match="closed"):
        llm.generate(["72+71="])
