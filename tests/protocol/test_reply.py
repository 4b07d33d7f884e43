"""What the engine's samples gain, as OpenAI's replies and streams: the openai package reads all of
them."""

import math

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from llama_tp.protocol.errors import RequestError
from llama_tp.protocol.logprobs import LEAST, token_text
from llama_tp.protocol.order import Order
from llama_tp.protocol.reply import Chunks, Fold, whole_reply
from tests.protocol.served import MODEL, TOKENIZER, chat, completion, delta, score


def stream(order: Order, deltas: list) -> list[dict]:
    """All chunks of a stream."""
    chunks = Chunks(order, MODEL, 1700000000, "fp_1")
    out = [
        *chunks.begin(),
        *(chunk for each in deltas for chunk in chunks.take(each)),
        *chunks.end(),
    ]
    assert chunks.done
    return out


def understood(shape, data: dict) -> None:
    """The openai package's own type reads it. Of completions it leaves out, against OpenAI's
    documentation, that a stream's finish_reason is null before the end, and the first of an echoed
    prompt's logprobs."""
    try:
        shape.model_validate(data)
    except ValidationError as error:
        places = {
            each["loc"][-1] if each["loc"][-1] != 0 else each["loc"][-2:] for each in error.errors()
        }
        assert shape is Completion and places <= {
            "finish_reason",
            ("token_logprobs", 0),
            ("top_logprobs", 0),
        }, error


def reply(order: Order, deltas: list) -> dict:
    """The whole reply."""
    found = whole_reply(Chunks(order, MODEL, 1700000000, "fp_1"), deltas)
    understood(ChatCompletion if order.kind == "chat" else Completion, found)
    assert all(choice["finish_reason"] for choice in found["choices"])
    return found


def check_stream(order: Order, chunks: list[dict]) -> None:
    head = {"id": order.id, "created": 1700000000, "model": "demo", "system_fingerprint": "fp_1"}
    for chunk in chunks:
        assert chunk | head == chunk and all(
            choice["index"] < order.n_choices for choice in chunk["choices"]
        )
        understood(ChatCompletionChunk if order.kind == "chat" else Completion, chunk)


def test_a_chat():
    order = chat()
    deltas = [
        delta(order, "Hel", [1]),
        delta(order, "", [2]),
        delta(order, "lo", [3]),
        delta(order, "!", end="stop"),
    ]
    found = reply(order, deltas)
    message = {"role": "assistant", "content": "Hello!", "refusal": None}
    assert found["choices"] == [
        {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    ]
    n = len(order.requests[0].prompt_ids)
    assert found["usage"] == {"prompt_tokens": n, "completion_tokens": 3, "total_tokens": n + 3}
    chunks = stream(order, deltas)
    check_stream(order, chunks)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {"content": "!"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_samples_of_a_chat_interleave():
    order = chat(n=2)
    deltas = [
        delta(order, "a", [1]),
        delta(order, "x", [2], 1),
        delta(order, "y", [3], 1, end="length"),
        delta(order, "b", [4], end="stop"),
    ]
    found = reply(order, deltas)
    assert [(c["message"]["content"], c["finish_reason"]) for c in found["choices"]] == [
        ("ab", "stop"),
        ("xy", "length"),
    ]
    assert (
        found["usage"]["prompt_tokens"] == len(order.requests[0].prompt_ids)
        and found["usage"]["completion_tokens"] == 4
    )
    chunks = stream(order, deltas)
    check_stream(order, chunks)
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 0, 1, 1, 0]


def test_counts_in_a_stream():
    order = chat(stream=True, stream_options={"include_usage": True})
    chunks = stream(order, [delta(order, "a", [1]), delta(order, "b", [2], end="length")])
    check_stream(order, chunks)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 2
    order = chat(
        stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    chunks = stream(order, [delta(order, "a", [1]), delta(order, "b", [2], end="length")])
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 2]


def test_chat_logprobs_go_with_their_tokens():
    half = TOKENIZER.encode("\u20ac")[0]  # bytes that are no text alone
    assert len(TOKENIZER.token_bytes(half)) < 3
    end = TOKENIZER.special_id("<|eot_id|>")
    order = chat(logprobs=True, top_logprobs=2)
    scores = [
        score(65, -0.5, (65, -0.5), (half, -1.5)),
        score(half, -math.inf, (66, -0.25), (end, -math.inf)),
    ]
    deltas = [
        delta(order, "A", [65], logprobs=scores[:1]),
        delta(order, "", [half], logprobs=scores[1:]),
        delta(order, "\ufffd", end="stop"),
    ]
    chunks = stream(order, deltas)
    check_stream(order, chunks)
    shown = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [len(each["content"]) if each else 0 for each in shown] == [0, 1, 1, 0]
    first, second = reply(order, deltas)["choices"][0]["logprobs"]["content"]
    odd = "bytes:" + "".join(f"\\x{b:02x}" for b in TOKENIZER.token_bytes(half))
    one = {"token": "A", "logprob": -0.5, "bytes": [65]}
    two = {"token": odd, "logprob": -1.5, "bytes": list(TOKENIZER.token_bytes(half))}
    assert first == one | {"top_logprobs": [one, two]}
    assert second["logprob"] == LEAST and second["token"] == odd
    assert second["top_logprobs"][1] == {"token": "<|eot_id|>", "logprob": LEAST, "bytes": []}


def test_every_token_looks_different():
    assert len({token_text(MODEL, i) for i in range(TOKENIZER.n_vocab)}) == TOKENIZER.n_vocab


def test_completions_are_ordered_by_prompt():
    order = completion(prompt=["A", "B"], n=2)
    deltas = [
        delta(order, text, [1], index, prompt, "length")
        for text, index, prompt in [("b1", 1, 1), ("a0", 0, 0), ("b0", 0, 1), ("a1", 1, 0)]
    ]
    found = reply(order, deltas)
    assert [(c["index"], c["text"]) for c in found["choices"]] == [
        (0, "a0"),
        (1, "a1"),
        (2, "b0"),
        (3, "b1"),
    ]
    assert found["usage"]["prompt_tokens"] == 4 and found["object"] == "text_completion"
    check_stream(order, stream(order, deltas))


def test_echo_goes_in_front_once():
    order = completion(prompt="ROMEO:", echo=True, n=2)
    deltas = [
        delta(order, " a", [1]),
        delta(order, " x", [2], 1),
        delta(order, " b", [3], end="stop"),
        delta(order, "", index=1, end="stop"),
    ]
    assert [c["text"] for c in reply(order, deltas)["choices"]] == ["ROMEO: a b", "ROMEO: x"]
    chunks = stream(order, deltas)
    check_stream(order, chunks)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["ROMEO: a", "ROMEO: x", " b", ""]
    ids = TOKENIZER.encode("ROMEO:", bos=True)
    order = completion(prompt=ids, echo=True)
    assert reply(order, [delta(order, " a", [1], end="stop")])["choices"][0]["text"] == "ROMEO: a"


def scored(n: int = 1, **fields) -> tuple[Order, list, list[int]]:
    """An order that echoes and scores the ids of "ab" after BOS, what its prompt scores, and the
    ids."""
    ids = TOKENIZER.encode("ab", bos=True)
    order = completion(prompt=ids, echo=True, logprobs=1, n=n, **fields)
    scores = [None] + [
        score(i, -float(place), (70, -0.125)) for place, i in enumerate(ids[1:], start=1)
    ]
    return order, scores, ids


def test_scores_of_prompt_and_output():
    order, scores, ids = scored()
    last = score(67, -0.5, (67, -0.5))
    [choice] = reply(
        order, [delta(order, "c", [67], end="length", logprobs=[last], prompt_logprobs=scores)]
    )["choices"]
    arrays = choice["logprobs"]
    assert choice["text"] == "abc" and {len(each) for each in arrays.values()} == {len(ids) + 1}
    assert arrays["token_logprobs"] == [None, *(-float(i) for i in range(1, len(ids))), -0.5]
    assert arrays["top_logprobs"][0] is None and arrays["top_logprobs"][-1] == {
        token_text(MODEL, 67): -0.5
    }
    for token, number, top in list(
        zip(arrays["tokens"], arrays["token_logprobs"], arrays["top_logprobs"])
    )[1:]:
        assert top[token] == number  # the very float, so that max(top) == number says "greedy"
    assert (
        arrays["tokens"][0] == "<|begin_of_text|>"
        and arrays["text_offset"][:2] == [0, 0]
        and arrays["text_offset"][-1] == 2
    )


def test_other_samples_wait_for_the_prompts_scores():
    order, scores, ids = scored(n=2)
    deltas = [
        delta(order, "x", [88], 1, logprobs=[score(88)]),
        delta(order, "y", [89], 1, end="stop", logprobs=[score(89)]),
        delta(order, "c", [67], end="stop", logprobs=[score(67)], prompt_logprobs=scores),
    ]
    found = reply(order, deltas)["choices"]
    assert [choice["text"] for choice in found] == ["abc", "abxy"]
    assert [len(choice["logprobs"]["tokens"]) for choice in found] == [len(ids) + 1, len(ids) + 2]
    check_stream(order, stream(order, deltas))


def test_max_tokens_0_scores_the_prompt_alone():
    order, scores, ids = scored(max_tokens=0)
    found = reply(
        order, [delta(order, "c", [67], end="length", logprobs=[score(67)], prompt_logprobs=scores)]
    )
    [choice] = found["choices"]
    assert (
        choice["text"] == "ab"
        and len(choice["logprobs"]["tokens"]) == len(ids)
        and found["usage"]["completion_tokens"] == 0
    )
    order = completion(max_tokens=0)
    assert reply(order, [delta(order, "c", [67], end="length")])["choices"][0]["text"] == ""


def test_a_scored_token_that_ends_the_text_is_there():
    order, scores, ids = scored(max_tokens=1)
    end = TOKENIZER.stop_ids[0]
    [choice] = reply(
        order,
        [delta(order, "", [end], end="length", logprobs=[score(end)], prompt_logprobs=scores)],
    )["choices"]
    assert (
        choice["finish_reason"] == "stop"
        and choice["text"] == "ab"
        and len(choice["logprobs"]["tokens"]) == len(ids) + 1
    )


def test_offsets_count_characters_not_bytes():
    order = completion(prompt="\u20ac", echo=True, logprobs=0)
    ids = order.requests[0].prompt_ids
    scores = [None, *(score(i) for i in ids[1:])]
    [choice] = reply(
        order, [delta(order, "A", [65], end="length", logprobs=[score(65)], prompt_logprobs=scores)]
    )["choices"]
    arrays = choice["logprobs"]
    assert len(ids) > 2 and arrays["text_offset"] == [0] * len(ids) + [1]
    order = completion(prompt="ab", echo=False, logprobs=0)
    arrays = reply(order, [delta(order, "A", [65], end="length", logprobs=[score(65)])])["choices"][
        0
    ]["logprobs"]
    assert arrays["text_offset"] == [0]


@pytest.mark.parametrize("make", [chat, completion])
def test_token_ids_beside_the_text(make):
    order = make(return_token_ids=True)
    deltas = [delta(order, "a", [1]), delta(order, "", [2]), delta(order, "b", [3], end="stop")]
    found = reply(order, deltas)
    assert found["choices"][0]["token_ids"] == [1, 2, 3]
    assert (
        found.get("prompt_token_ids", found["choices"][0].get("prompt_token_ids"))
        == order.requests[0].prompt_ids
    )
    order = make()
    assert "token_ids" not in reply(order, [delta(order, "a", [1], end="stop")])["choices"][0]


def test_a_sample_that_the_engine_gave_up_is_an_error():
    order = chat(n=2)
    chunks = Chunks(order, MODEL, 1)
    chunks.take(delta(order, "a", [1]))
    with pytest.raises(RequestError, match="not finite") as caught:
        chunks.take(delta(order, index=1, end="abort", error="logits are not finite"))
    assert caught.value.status == 500 and not chunks.done


def test_a_stream_folds_to_the_reply():
    """The same chunks in both, whatever the fields."""
    common = {"n": 2, "return_token_ids": True}
    for order in (
        chat(logprobs=True, **common),
        completion(prompt=["A", "B"], logprobs=1, **common),
    ):
        deltas = [
            delta(
                order,
                chr(97 + i),
                [i],
                i % 2,
                i % len(order.requests),
                "stop" if i > 3 else None,
                logprobs=[score(i)],
            )
            for i in (0, 1, 2, 3, 4, 5)
        ]
        ends = (
            [delta(order, "", (), 0, 1, "stop"), delta(order, "", (), 1, 0, "stop")]
            if order.kind == "completion"
            else []
        )
        fold = Fold(order)
        for chunk in stream(order, deltas + ends):
            fold.add(chunk)
        chunks = Chunks(order, MODEL, 1700000000, "fp_1")
        assert fold.reply({}) == whole_reply(chunks, deltas + ends) | {"usage": {}}
