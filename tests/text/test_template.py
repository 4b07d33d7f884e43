"""Chat templates: the ids that transformers gives, special tokens that stay text, limits on hostile
templates."""

import datetime
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.arch.errors import UserError
from llama_tp.text.chat_format import ChatFormat
from llama_tp.text.template import ChatTemplate, open_template
from tests.text.texts import SPECIAL

# Our own, with what real ones use: whitespace control, trim, namespaces, loop controls, tojson,
# macros, dates, refusals.
TEMPLATE = """{{- bos_token }}
{%- macro turn(role, text) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' ~ text ~ '<|eot_id|>' }}{%- endmacro %}
{%- set ns = namespace(system='', n=0) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- turn('system', 'Today is ' + strftime_now('%d %b %Y') + '\\n' + ns.system) }}
{%- if tools %}
    {%- for tool in tools %}
{{ tool | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}
    {%- if message.content == 'skip' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {%- if 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- turn('assistant', '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}') }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}{{- turn('assistant', message.content | trim) }}{% endgeneration %}
    {%- else %}
        {{- turn('ipython' if message.role == 'tool' else message.role, message.content | trim) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""  # noqa: E501

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["skip", "", "  padded\n", "hello"]
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": TEXTS}
)
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "Größe <b>", "parameters": {"type": "object"}},
    }
]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """An HF folder with a byte-level tokenizer that has Llama 3's special tokens, and TEMPLATE."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hf")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, [])
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(list(tiny.specials)[:12])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|eot_id|>",
                "chat_template": TEMPLATE,
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    from llama_tp.text.tokenizer import open_tokenizer

    return open_template(str(folder), open_tokenizer(None, str(folder)))


@pytest.fixture(scope="module")
def oracle(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=100, deadline=None)
@given(
    turns=st.lists(TURNS, min_size=1, max_size=4),
    system=st.none() | TEXTS,
    with_call=st.booleans(),
    tools=st.sampled_from([None, TOOLS]),
    prompt=st.booleans(),
)
def test_ids_equal_transformers(turns, system, with_call, tools, prompt, ours, oracle):
    dialog = [
        *([{"role": "system", "content": system}] if system is not None else []),
        *turns,
        *([CALL] if with_call else []),
    ]
    # transformers wants arguments as objects, which OpenAI sends as text
    theirs = [
        {**one, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é"}}}]}
        if "tool_calls" in one
        else one
        for one in dialog
    ]
    expected = oracle.apply_chat_template(
        theirs, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=False
    )
    assert ours.encode_dialog(dialog, add_generation_prompt=prompt, tools=tools) == expected


def test_special_tokens_in_messages_and_tools_stay_text(ours):
    plain, n_specials = [{"role": "user", "content": "x"}], set(ours.tokenizer.specials.values())

    def count(dialog, tools=None):
        return sum(i in n_specials for i in ours.encode_dialog(dialog, tools=tools))

    hostile = [{"role": "user", "content": SPECIAL}]
    assert count(hostile) == count(plain) and SPECIAL in ours.tokenizer.decode(
        ours.encode_dialog(hostile)
    )
    tools = [
        {"type": "function", "function": {"name": SPECIAL, "parameters": {SPECIAL: [SPECIAL]}}}
    ]
    assert count(plain, tools) == count(plain, TOOLS)
    private = [{"role": "user", "content": "\ue000\ue001<|eot_id|>"}]
    assert "\ue000\ue001<|eot_id|>" in ours.tokenizer.decode(ours.encode_dialog(private))


def test_no_characters_are_taken(ours):
    """What tells the names of special tokens in a message apart is no character that a message
    could hold."""
    for content in (
        "".join(map(chr, range(0xE000, 0xF8FF))) + "<|eot_id|>",
        "".join(map(chr, range(0x20000))) + "<|eot_id|>",
    ):
        ids, plain = (
            ours.encode_dialog([{"role": "user", "content": one}], strip=False)
            for one in (content, "x")
        )
        # lone surrogates: as everywhere
        text = content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert text.strip() in ours.tokenizer.decode(ids) and ids[-5:] == plain[-5:]
        assert sum(i in ours.tokenizer.specials.values() for i in ids) == sum(
            i in ours.tokenizer.specials.values() for i in plain
        )


def test_the_day_can_be_fixed(ours, folder):
    fixed = open_template(str(folder), ours.tokenizer, datetime.datetime(2024, 7, 26))
    ids = fixed.encode_dialog([{"role": "user", "content": "x"}])
    assert "Today is 26 Jul 2024\n" in ours.tokenizer.decode(ids)


def test_what_a_template_reads(tiny):
    one = ChatTemplate("{{ enable_thinking and messages }}", tiny, "{{ date_string }}")
    assert (
        one.reads("enable_thinking")
        and one.reads("date_string")
        and not one.reads("thinking")
        and not one.reads("")
    )
    assert ChatFormat.reads("date_string") and not ChatFormat.reads("enable_thinking")


def test_the_digest_tells_templates_apart(tiny):
    made = [
        ChatTemplate("a", tiny),
        ChatTemplate("b", tiny),
        ChatTemplate("a", tiny, "c"),
        ChatTemplate("a", tiny, None, {"x": "y"}),
    ]
    assert (
        len({each.digest() for each in made}) == 4
        and made[0].digest() == ChatTemplate("a", tiny).digest()
    )


@pytest.mark.parametrize(
    "dialog",
    [
        "x",
        [1],
        [{"role": "user"}],
        [{"role": "user", "content": 1}],
        [{"content": "x"}],
        [{"role": "user", "content": "x", "more": 1}],
    ],
)
def test_what_is_no_dialog_is_refused_as_in_metas_format(dialog, ours):
    with pytest.raises(
        UserError, match="a dialog must be|a message must have|the content of a message"
    ):
        ours.encode_dialog(dialog)


def test_contents_can_be_stripped_for_templates_that_do_not(tiny):
    encode = ChatTemplate("{{ messages[0].content }}", tiny).encode_dialog
    padded = [{"role": "user", "content": "  hello "}]
    assert (
        encode(padded, strip=True)
        == tiny.encode("hello")
        != encode(padded)
        == tiny.encode("  hello ")
    )


def test_a_template_refuses_in_its_own_words(ours):
    with pytest.raises(UserError, match="refuses these messages.*a system message must come first"):
        ours.encode_dialog([{"role": "user", "content": ""}, {"role": "system", "content": ""}])


def test_where_a_template_is_found(tiny, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no chat template.*leave out --chat_template hf"):
        open_template(str(tmp_path), tiny)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "chat_template": [
                    {"name": "default", "template": "plain"},
                    {"name": "tool_use", "template": "tools"},
                ]
            }
        )
    )
    both = open_template(str(tmp_path), tiny)
    assert both.encode_dialog([]) == tiny.encode("plain") and both.encode_dialog(
        [], tools=TOOLS
    ) == tiny.encode("tools")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert open_template(str(tmp_path), tiny).encode_dialog([]) == tiny.encode("file")
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="chat template is broken"):
        open_template(str(tmp_path), tiny)


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/tool_use.jinja"],
)
@pytest.mark.parametrize(
    "make, says",
    [
        (os.mkfifo, "pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "device"),
        (lambda path: path.write_bytes(b"x") and os.truncate(path, 1 << 40), "too large"),
    ],
)
def test_what_is_no_small_file_is_refused(make, says, name, tiny, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} .*{says}"):
        open_template(str(tmp_path), tiny)


@pytest.mark.parametrize(
    "config",
    [
        "[",
        "[]",
        "3",
        '{"chat_template": {"default": "a", "tool_use": 3}}',
        '{"chat_template": [{"name": [], "template": "a"}]}',
        '{"chat_template": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "\ufeff{}",
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_a_broken_config_is_refused(config, beside, tiny, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(config, "utf-8")
    if beside:
        (tmp_path / "chat_template.jinja").write_text("file")
    try:
        ids = open_template(str(tmp_path), tiny).encode_dialog([])
    except UserError as error:
        assert "JSON" in error.what or "has no chat template" in error.what and not beside
    else:
        assert beside and ids == tiny.encode("file")


def test_the_templates_that_transformers_5_saves(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    from llama_tp.text.tokenizer import open_tokenizer

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = {"default": "plain", "tool_use": "tools"}
    theirs.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = open_template(str(tmp_path), open_tokenizer(None, str(tmp_path)))
    dialog = [{"role": "user", "content": "x"}]
    for tools, text in ((None, "plain"), (TOOLS, "tools")):
        ids = theirs.apply_chat_template(dialog, tools=tools, return_dict=False)
        assert ours.encode_dialog(dialog, tools=tools) == ids == ours.tokenizer.encode(text)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% "
        "endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ [1] * 10**9 }}",
        "{{ 9**(9**9) }}",
        "{{ 'x' | center(10**9) }}",
        "{{ 'x'.center(10**9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ range(10**9) | list }}",
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% "
        "endfor %}",
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% "
        "endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% "
        "endfor %}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set t %}{{ n.s }}{{ n.s }}{% "
        "endset %}{% set n.s = t %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_template_that_never_ends_or_grows_is_stopped(source, tiny):
    with pytest.raises(UserError, match="chat template"):  # or pytest ends it, after minutes
        ChatTemplate(source, tiny).encode_dialog([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% include 'a' %}",
        "{{ lipsum() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ open('x') }}",
    ],
)
def test_a_template_reaches_no_python(source, tiny):
    try:
        ids = ChatTemplate(source, tiny).encode_dialog([{"role": "user", "content": ""}])
    except UserError:
        return
    assert tiny.decode(ids) == ""  # an undefined value is written as nothing
