"""From a checked body to requests that the engine can run as they are."""

import pytest

from llama_tp.protocol.errors import RequestError, error_body
from llama_tp.protocol.fields import check_body
from llama_tp.protocol.order import ServedModel, prepare
from llama_tp.text.chat_format import ChatFormat
from llama_tp.text.token_table import Tokenizer
from tests.protocol.served import MODEL, TOKENIZER, USER, chat, completion

FORMAT = ChatFormat(TOKENIZER)


def test_prompts_of_every_form():
    assert completion(prompt="A").requests[0].prompt_ids == TOKENIZER.encode("A", bos=True)
    assert completion(prompt="A", add_special_tokens=False).requests[
        0
    ].prompt_ids == TOKENIZER.encode("A")
    both = [request.prompt_ids for request in completion(prompt=["A", "B"]).requests]
    assert both == [TOKENIZER.encode("A", bos=True), TOKENIZER.encode("B", bos=True)]
    assert [request.prompt_ids for request in completion(prompt=[[65], [66, 67]]).requests] == [
        [65],
        [66, 67],
    ]
    # no BOS is put in front of ids
    assert completion(prompt=[65, 66]).requests[0].prompt_ids == [65, 66]
    assert completion(prompt="").requests[0].prompt_ids == [TOKENIZER.bos_id]
    assert [request.id for request in completion(prompt=["A", "B"]).requests] == [
        "cmpl-1-0",
        "cmpl-1-1",
    ]


def test_chat_ends_where_the_answer_begins():
    assert chat().requests[0].prompt_ids == FORMAT.encode_dialog(USER)
    assert chat(add_generation_prompt=False).requests[0].prompt_ids == FORMAT.encode_dialog(
        USER, add_generation_prompt=False
    )
    begun = [*USER, {"role": "assistant", "content": "Well"}]
    going_on = chat(messages=begun, continue_final_message=True).requests[0].prompt_ids
    assert going_on == FORMAT.encode_dialog(begun, add_generation_prompt=False)[:-1]
    assert going_on[-1] == TOKENIZER.encode("Well")[-1]
    with pytest.raises(RequestError, match="continue_final_message excludes"):
        chat(messages=begun, continue_final_message=True, add_generation_prompt=True)


def test_a_base_model_refuses_chats_and_takes_prompts():
    plain = Tokenizer(
        [bytes([i]) for i in range(256)], {}, None, (), lambda text: list(text.encode())
    )
    base = ServedModel("base", plain, 100, 256)
    with pytest.raises(RequestError, match="not a Llama 3 chat model"):
        prepare(check_body("chat", {"messages": USER}), base, "x")
    assert prepare(check_body("completion", {"prompt": "A"}), base, "x").requests[0].prompt_ids == [
        65
    ]
    with pytest.raises(RequestError, match="empty"):
        prepare(check_body("completion", {"prompt": ""}), base, "x")


def test_a_prompt_leaves_room_for_one_token():
    assert len(completion(prompt=[65] * 255).requests[0].prompt_ids) == 255
    for body in ({"prompt": [65] * 256}, {"prompt": ["A", "A " * 300]}):
        with pytest.raises(RequestError) as caught:
            completion(**body)
        said = error_body(caught.value)["error"]
        assert (
            said["code"] == "context_length_exceeded"
            and said["param"] == "prompt"
            and "256" in said["message"]
        )
    with pytest.raises(RequestError) as caught:
        chat(messages=[{"role": "user", "content": "A " * 300}])
    assert caught.value.param == "messages"


def test_max_tokens_beyond_the_context_is_cut_by_the_engine():
    assert completion(max_tokens=10**6).requests[0].params.max_tokens == 10**6


def test_seeds():
    def seeds(ours, **fields):
        order = prepare(check_body("completion", {"prompt": ["A", "B"]} | fields), MODEL, "x", ours)
        return [request.params.seed for request in order.requests]

    assert seeds(None) == [None, None] and seeds(5) == [5, 6] and seeds(5, seed=9) == [9, 9]
    assert seeds(2**63 - 1) == [2**63 - 1, 0]


def test_logprobs_of_both_kinds():
    assert chat().logprobs is None and chat(logprobs=False).logprobs is None
    assert chat(logprobs=True).logprobs == chat(logprobs=True).requests[0].params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).requests[0].params.logprobs == 3
    assert completion(logprobs=0).requests[0].params.logprobs == 0
    scored = completion(logprobs=2, echo=True).requests[0].params
    assert (scored.logprobs, scored.prompt_logprobs) == (2, 2)
    assert completion(logprobs=2).requests[0].params.prompt_logprobs is None
    assert completion(echo=True).requests[0].params.prompt_logprobs is None


def test_scoring_hears_of_a_token_that_ends_the_text():
    """Who scores counts on an entry for the token written, also where it is a stop id, which the
    engine does not show."""
    one = completion(logprobs=1, echo=True, max_tokens=1, stop_token_ids=[70])
    assert (
        one.requests[0].params.ignore_eos
        and not one.requests[0].params.stop_ids
        and one.end_ids == {*TOKENIZER.stop_ids, 70}
    )
    assert not completion(logprobs=1, echo=True, max_tokens=2).end_ids
    assert completion(echo=True, logprobs=1, max_tokens=1, ignore_eos=True).end_ids == frozenset()


def test_nothing_is_written_for_max_tokens_0():
    order = completion(max_tokens=0, echo=True)
    assert order.hides_output and order.requests[0].params.max_tokens == 1


def test_counts_are_limited_before_anything_is_made():
    for fields, said in [
        ({"prompt": ["A"] * 9, "n": 8}, "prompt times n"),
        ({"n": 9}, "n is too large"),
        ({"prompt": ["A"] * 17}, "too many"),
    ]:
        with pytest.raises(RequestError, match=said):
            completion(**fields)
