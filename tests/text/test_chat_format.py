"""Chat ids against llama-models' ChatFormat, and what malformed dialogs are told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.spec.errors import UserError
from llama_tp.text.chat_format import ChatFormat
from tests.text.texts import SPECIAL

CONTENTS = st.text(max_size=30) | st.sampled_from(["", "\n", "  padded  ", "\n\nnewlines first", SPECIAL])
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
DIALOGS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}), max_size=5)


@pytest.fixture(scope="session")
def meta_chat(meta_oracle):
    from llama_models.llama3.chat_format import ChatFormat as MetaChatFormat
    return MetaChatFormat(meta_oracle)


def metas_ids(meta_chat, dialog):
    from llama_models.datatypes import RawMessage
    return meta_chat.encode_dialog_prompt([RawMessage(**message) for message in dialog]).tokens


@settings(max_examples=200, deadline=None)
@given(dialog=DIALOGS)
def test_ids_equal_llama_models(dialog, meta, meta_chat):
    assert ChatFormat(meta).encode_dialog(dialog) == metas_ids(meta_chat, dialog)


@settings(max_examples=200, deadline=None)
@given(dialog=DIALOGS)
def test_stripped_ids_are_those_of_stripped_content(dialog, meta, meta_chat):
    bare = [{**message, "content": message["content"].strip()} for message in dialog]
    assert ChatFormat(meta).encode_dialog(dialog, strip=True) == metas_ids(meta_chat, bare)


def test_known_ids(meta):
    """llama3's own test vectors: the layout spelled out id by id."""
    chat = ChatFormat(meta)
    assert chat.encode_header("user") == [128006, 882, 128007, 271]
    message = {"role": "user", "content": " This is a test sentence. "}
    header, body = [128006, 882, 128007, 271], [2028, 374, 264, 1296, 11914, 13]
    assert chat.encode_message(message, strip=True) == [*header, *body, 128009]
    assert chat.encode_message(message) == [*header, *meta.encode(message["content"]), 128009]
    assert chat.encode_dialog([message], strip=True) == [128000, *header, *body, 128009, 128006, 78191, 128007, 271]
    assert chat.encode_dialog([message], strip=True, add_generation_prompt=False) == [128000, *header, *body, 128009]


def test_works_on_a_tiny_tokenizer(tiny):
    chat, n = ChatFormat(tiny), tiny.n_vocab - 256
    ids = chat.encode_dialog([{"role": "ipython", "content": SPECIAL}])
    assert ids == [n, n + 6, *tiny.encode("ipython"), n + 7, *tiny.encode("\n\n"), *tiny.encode(SPECIAL), n + 9,
                   n + 6, *tiny.encode("assistant"), n + 7, *tiny.encode("\n\n")]
    assert ids == chat.encode_dialog([{"role": "tool", "content": SPECIAL}])


@pytest.mark.parametrize("dialog, says", [
    ([{"role": "admin", "content": ""}], "unknown role.*'admin'.*system, user"),
    ([{"role": ["user"], "content": ""}], "unknown role"),
    ([{"role": "user"}], "exactly a role and a content.*the keys .'role'"),
    ([{"role": "user", "content": "", "tool_calls": []}], "exactly a role and a content.*tool_calls"),
    ([{}], "the keys .."),
    (["hello"], "exactly a role and a content.*'hello'"),
    ([{"role": "user", "content": None}], "must be a text.*NoneType in a message of 'user'"),
    ([{"role": "user", "content": ["a"]}], "must be a text.*list"),
    ("hello", "must be a list of messages.*str"),
    ({"role": "user", "content": ""}, "must be a list of messages.*dict"),
])
def test_malformed(dialog, says, tiny):
    with pytest.raises(UserError, match=says):
        ChatFormat(tiny).encode_dialog(dialog)
