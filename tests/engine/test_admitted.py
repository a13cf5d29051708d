"""The requests of a group, which are kept as tokens: the same requests as the ones that were admitted."""

from functools import partial
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from engine.requests import EOS, abacus_tokenizer, make_prompt
from moempi.config.job import Sampling
from moempi.config.tensors import PAGE_ROWS
from moempi.engine.admission import make_request
from moempi.engine.admitted import AdmittedRequests, admit
from moempi.engine.chat import ChatText
from moempi.errors import StorageError
from moempi.storage.prompt_spool import PromptCodec, PromptSpool
from storage.models import SMALL

ARCHITECTURE = msgspec.structs.replace(SMALL, vocab_size=98, max_positions=9 * PAGE_ROWS)
MAKE = partial(make_request, tokenizer=abacus_tokenizer(), architecture=ARCHITECTURE, task="generate")
PROMPTS = [
    make_prompt("12+3=", index=0, name="a", reference="15", max_tokens=3),
    make_prompt(tokens=[5, EOS, 97], index=1, name="b", temperature=0.5),
    make_prompt("", index=2, name="no tokens"),
    make_prompt(tokens=[98], index=3, name="beyond the vocabulary"),
    make_prompt(tokens=[5] * 10 * PAGE_ROWS, index=4, name="beyond the positions"),
    make_prompt(index=5, name="bad", error="p.jsonl:6: not a prompt"),
    make_prompt(tokens=[5], index=6, name="a stop token", stop_token_ids=(98,)),
    msgspec.structs.replace(make_prompt(index=7, name="chat"), chat=b"{}", metadata="{}", group="g"),
    msgspec.structs.replace(make_prompt(index=8, name="bad chat", n=2), chat=b"{}", prompt_id="p"),
    make_prompt(tokens=[5] * 2 * PAGE_ROWS, index=9, name="three pages", max_tokens=2),
]
CHATS = {7: ChatText("1<eos>2"), 8: ChatText(error="no template")}


class Chats:
    """Chats whose texts are known; `error` is raised at the piece with this number."""

    def __init__(self, error=None, at=0):
        self.rendered, self._error, self._at = 0, error, at

    def render(self, piece):
        self.rendered += 1
        if self._error and self.rendered == self._at:
            raise self._error
        return CHATS


def requests():
    return AdmittedRequests(MAKE, lambda: PromptSpool(PromptCodec(Sampling()), ""))


def admitted(*pieces):
    found = requests()
    for piece in pieces or (PROMPTS[:4], PROMPTS[4:]):
        found.add_piece(piece, Chats())
    found.require_whole()
    return found


def fields(request):
    record = msgspec.structs.asdict(request.to_record(task="generate"))
    arrays = {name: value.tolist() for name, value in record.items() if isinstance(value, np.ndarray)}
    return record | arrays | {"limit": request.limit, "open": request.finish, "sampling": request.sampling}


def test_a_refused_request_fails_once_and_is_not_computed():
    found, names = admitted(), ["b", "three pages"]
    refused, pages = [request.prompt.id for request in admitted().take_refused()], found.pages.total()
    others = [request.prompt.id for request in found if request.prompt.id not in names]
    found.refuse(lambda request: "does not fit" if request.prompt.id in names else "")
    for _ in range(2):
        assert [request.prompt.id for request in found] == others
    failed = list(found.take_refused())
    assert [request.prompt.id for request in failed] == [*refused, *names]
    assert [request.error for request in failed[-2:]] == ["does not fit"] * 2
    assert found.pages.total() == pages - 2
    assert found.num_fitting(9) == len(others)
    assert list(found.too_long(1)) == []


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(max_tokens=3)])
def test_requests_are_made_again_as_they_were(sampling):
    found = AdmittedRequests(MAKE, lambda: PromptSpool(PromptCodec(sampling), ""))
    found.add_piece(PROMPTS, Chats())
    twins = [MAKE(prompt, chat=CHATS.get(prompt.index)) for prompt in PROMPTS]
    for _ in range(2):
        assert [fields(one) for one in found] == [fields(twin) for twin in twins if not twin.finish]
    refused = [fields(one) for one in found.take_refused()]
    assert refused == [fields(twin) for twin in twins if twin.finish]
    assert [one["index"] for one in refused] == [2, 3, 4, 5, 6, 8]
    assert not list(found.take_refused())


def test_the_pages_of_requests_that_can_be_computed_are_counted():
    assert admitted().pages == {1: 3, 3: 1}


@pytest.mark.parametrize(("pages", "fitting"), [(1, [0, 1, 7]), (2, [0, 1, 7]), (3, [0, 1, 7, 9])])
def test_a_request_that_needs_more_pages_than_the_rank_has_does_not_fit(pages, fitting):
    found = admitted()
    assert found.num_fitting(pages) == len(fitting)
    too_long = list(found.too_long(pages))
    assert [one.prompt.index for one in too_long] == [index for index in (0, 1, 7, 9) if index not in fitting]
    for one in too_long:
        assert one.error == f"needs 3 cache pages, the rank has {pages}; raise run.kv_memory or lower max_tokens"
    assert [one.prompt.index for one in found.take_fitting(pages)] == fitting
    assert not list(found)


def test_all_pieces_are_taken_whatever_fails():
    """The other ranks of the group render the chats of all pieces together with this one."""
    chats, found = Chats(StorageError("the first"), at=1), requests()
    for piece in (PROMPTS[:4], PROMPTS[4:]):
        found.add_piece(piece, chats)
    assert chats.rendered == 2
    assert not list(found)
    with pytest.raises(StorageError, match="the first"):
        found.require_whole()


def test_an_error_of_the_pieces_is_kept():
    def pieces():
        yield PROMPTS[:2]
        raise StorageError("the disk")

    world = SimpleNamespace(alive=lambda where: None, where="")
    deployment = SimpleNamespace(world=world, make_request=MAKE)
    make = lambda prompt, *, task, chat=None: MAKE(prompt, chat=chat)  # noqa: E731
    deployment.make_request = make
    found = admit(
        pieces(), deployment, task="generate", chats=None, spool=lambda: PromptSpool(PromptCodec(Sampling()), "")
    )
    assert [one.prompt.index for one in found] == [0, 1]
    with pytest.raises(StorageError, match="the disk"):
        found.require_whole()
