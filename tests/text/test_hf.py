"""tokenizer.json against tiktoken, Meta's file and transformers' fast tokenizer."""

import itertools
import json
import shutil
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.arch.errors import UserError
from llama_tp.text.chat_format import ChatFormat
from llama_tp.text.meta import SPECIALS, SPLIT
from llama_tp.text.template import open_template
from llama_tp.text.tokenizer import open_tokenizer
from tests.examples import examples
from tests.text.texts import SENTENCEPIECE, SHORT, SPECIAL

tokenizers = pytest.importorskip("tokenizers", reason="the hf extra")
transformers = pytest.importorskip(
    "transformers", reason="oracle: fast tokenizers, and the converter from tiktoken"
)


def write_hf(model_file, folder):
    """An HF tokenizer folder, as Meta's repositories have it, from a tokenizer.model."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    library = TikTokenConverter(
        str(model_file), pattern=SPLIT, extra_special_tokens=list(SPECIALS)
    ).converted()
    bos = "<|begin_of_text|>"
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, library.token_to_id(bos))]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token=bos,
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_hf_dir(tiny_dir, tmp_path_factory):
    return write_hf(tiny_dir / "tokenizer.model", tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def tiny_hf(tiny_hf_dir):
    return open_tokenizer(None, str(tiny_hf_dir))


@pytest.fixture(scope="module")
def real_hf_dir(meta_file, tmp_path_factory):
    return write_hf(meta_file, tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def real_hf(real_hf_dir):
    return open_tokenizer(str(real_hf_dir / "tokenizer.json"), str(real_hf_dir))


@pytest.fixture(scope="module")
def fast(real_hf_dir):
    return transformers.PreTrainedTokenizerFast.from_pretrained(real_hf_dir)


@pytest.mark.parametrize("name", SHORT)
def test_ids_equal_tiktokens_and_transformers(name, real_hf, meta, fast):
    ids = real_hf.encode(SHORT[name])
    assert ids == meta.encode(SHORT[name])
    assert ids == fast.encode(SHORT[name], add_special_tokens=False, split_special_tokens=True)
    assert real_hf.encode(SHORT[name], bos=True) == fast.encode(
        SHORT[name], split_special_tokens=True
    )
    assert real_hf.decode(ids) == SHORT[name]


def test_tables_equal_tiktokens(real_hf, meta):
    assert (
        real_hf.n_vocab == meta.n_vocab
        and real_hf.specials == meta.specials
        and real_hf.bos_id == meta.bos_id
    )
    assert [i for i in range(meta.n_vocab) if real_hf.token_bytes(i) != meta.token_bytes(i)] == []


def test_a_megabyte(real_hf, fast):
    for text in ("All the world's a stage, 1599.\n" * 33_000, " " * 1_000_000):
        ids = real_hf.encode(text)
        assert ids == fast.encode(text, add_special_tokens=False)
        assert real_hf.decode(ids) == text


@settings(max_examples=examples(300), deadline=None)
@given(text=st.text() | st.text(alphabet="abceghinoprtSTOP xy\n日本é😀"))
def test_any_text(text, tiny_hf, tiny):
    ids = tiny_hf.encode(text)
    assert ids == tiny.encode(text)
    assert tiny_hf.decode(ids) == text


@settings(max_examples=examples(300), deadline=None)
@given(ids=st.lists(st.integers(0, 127_999), max_size=20))
def test_decode_equals_transformers(ids, real_hf, fast):
    assert real_hf.decode(ids) == fast.decode(ids)


def test_special_text_and_surrogates_are_plain(tiny_hf):
    assert not set(tiny_hf.encode(SPECIAL)) & set(tiny_hf.specials.values())
    assert tiny_hf.decode(tiny_hf.encode("a\ud800b")) == "a\ufffdb"


def test_chat_ids_equal_tiktokens(tiny_hf, tiny):
    dialog = [{"role": "system", "content": "hello "}, {"role": "user", "content": SPECIAL}]
    assert ChatFormat(tiny_hf).encode_dialog(dialog) == ChatFormat(tiny).encode_dialog(dialog)


# ---------------------------------------------------------------------- what the small files decide


def folder_with(tmp_path, tiny_hf_dir, change=lambda raw: None, **files):
    raw = json.loads((tiny_hf_dir / "tokenizer.json").read_text())
    change(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return open_tokenizer(None, str(tmp_path))


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda raw: raw["model"]["vocab"].update(zz=4294967295),
            "gaps - .* highest id is 4,294,967,295",
        ),
        (lambda raw: raw["model"]["vocab"].update(zz=100_000_000), "gaps"),
        (lambda raw: raw["model"]["vocab"].update(zz=10**400), "range"),
        # a panic in Rust
        (
            lambda raw: raw.update(
                normalizer={"type": "Precompiled", "precompiled_charsmap": "////"}
            ),
            "charsmap",
        ),
        (
            lambda raw: raw.update(
                normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}
            ),
            "index",
        ),
        (
            lambda raw: raw.update(normalizer={"type": "Prepend", "prepend": "x" * 10**7}),
            "4,096 times as long",
        ),
        (
            lambda raw: raw.update(
                normalizer={
                    "type": "Sequence",
                    "normalizers": 4
                    * [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}],
                }
            ),
            "4,096 times as long",
        ),
        (
            lambda raw: raw.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            ),
            "key",
        ),
    ],
)
def test_hostile_files_end_in_one_error(change, says, tiny_hf_dir, tmp_path):
    with pytest.raises(UserError, match=says) as caught:
        folder_with(tmp_path, tiny_hf_dir, change)
    assert "tokenizer.json" in str(caught.value) and len(str(caught.value)) < 600


def test_a_file_without_tokens(tmp_path):
    tokenizers = pytest.importorskip(
        "tokenizers", reason="the library that reads tokenizer.json; `make setup` installs it"
    )
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.decoder = tokenizers.decoders.ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="0 tokens"):
        open_tokenizer(None, str(tmp_path))


@pytest.mark.parametrize(
    "files, says",
    [
        ({"tokenizer_config": {"bos_token": 5}}, "tokenizer_config.json: bos_token"),
        (
            {"tokenizer_config": {"eos_token": {"content": ["x"]}}},
            "tokenizer_config.json: eos_token: content",
        ),
        ({"tokenizer_config": {"eos_token": ["x"]}}, "eos_token"),
        ({"config": {"bos_token_id": "x"}}, "config.json: bos_token_id must be a token id"),
        *[
            (
                {"generation_config": {"eos_token_id": value}},
                "generation_config.json: eos_token_id must be a token id",
            )
            for value in (True, 1.0, 10**400, -2, [[1]], ["x"], list(range(2000)), {"a": 1})
        ],
    ],
)
def test_settings_are_checked(files, says, tiny_hf_dir, tmp_path):
    with pytest.raises(UserError, match=says):
        folder_with(tmp_path, tiny_hf_dir, **files)


def without_template(raw):
    raw["post_processor"] = None


@pytest.mark.parametrize(
    "files, names",
    [
        ({"generation_config": {"eos_token_id": [5, 7]}, "config": {"eos_token_id": 9}}, (5, 7)),
        ({"generation_config": {"eos_token_id": 5}}, (5,)),
        (
            {
                "generation_config": {},
                "config": {"eos_token_id": 9},
                "tokenizer_config": {"eos_token": "<|eot_id|>"},
            },
            (9,),
        ),
        ({"tokenizer_config": {"eos_token": "<|eot_id|>"}}, ("<|eot_id|>",)),
        ({"tokenizer_config": {"eos_token": {"content": "<|eot_id|>"}}}, ("<|eot_id|>",)),
        ({}, ()),
    ],
)
def test_stop_ids(files, names, tiny_hf_dir, tmp_path):
    tokenizer = folder_with(tmp_path, tiny_hf_dir, **files)
    assert tokenizer.stop_ids == tuple(tokenizer.specials.get(name, name) for name in names)


def test_stop_ids_must_be_ids(tiny_hf_dir, tmp_path):
    with pytest.raises(UserError, match="eos_token_id.*'</s>'"):
        folder_with(tmp_path, tiny_hf_dir, config={"eos_token_id": "</s>"})


def template(raw, *single):
    """A TemplateProcessing that puts the named tokens around a text, "$A"."""
    ids = {token["content"]: token["id"] for token in raw["added_tokens"]}
    return {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}}
            if one == "$A"
            else {"SpecialToken": {"id": one, "type_id": 0}}
            for one in single
        ],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {
            one: {"id": one, "ids": [ids[one]], "tokens": [one]} for one in single if one != "$A"
        },
    }


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": False,
    "use_regex": True,
}
POST_PROCESSORS = {
    "none": lambda raw: None,
    "ByteLevel": lambda raw: BYTE_LEVEL,
    "nothing": lambda raw: template(raw, "$A"),
    "BOS": lambda raw: template(raw, "<|begin_of_text|>", "$A"),
    "BOS in a sequence": lambda raw: {
        "type": "Sequence",
        "processors": [BYTE_LEVEL, template(raw, "<|begin_of_text|>", "$A")],
    },
    "two in front": lambda raw: template(raw, "<|begin_of_text|>", "<|start_header_id|>", "$A"),
    "EOS at the end": lambda raw: template(raw, "$A", "<|eot_id|>"),
    "both": lambda raw: template(raw, "<|begin_of_text|>", "$A", "<|eot_id|>"),
}


@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_a_prompt_has_the_ids_of_transformers(kind, tiny_hf, tiny_hf_dir, tmp_path):
    """For every class and setting that a folder may name, hand-made and as transformers saves it
    again: tokenizer.json decides."""
    for i, (name, adds) in enumerate(
        itertools.product(
            [
                None,
                "TokenizersBackend",
                "PreTrainedTokenizerFast",
                "LlamaTokenizer",
                "LlamaTokenizerFast",
                "GPT2Tokenizer",
            ],
            [None, True, False],
        )
    ):
        folder, saved = tmp_path / f"{i}", tmp_path / f"{i}-saved"
        folder.mkdir()
        settings = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "tokenizer_class": name,
            "add_bos_token": adds,
        }
        files = {
            "tokenizer_config": {
                key: value for key, value in settings.items() if value is not None
            },
            **(
                {"config": {"model_type": "llama", "bos_token_id": tiny_hf.bos_id}} if i % 2 else {}
            ),
        }
        ours = [
            folder_with(
                folder,
                tiny_hf_dir,
                lambda raw: raw.update(post_processor=POST_PROCESSORS[kind](raw)),
                **files,
            )
        ]
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        theirs.save_pretrained(saved)
        ours.append(open_tokenizer(None, str(saved)))
        for text in ("hello the world", " hello\n", ""):
            expected = theirs.encode(text, split_special_tokens=True)
            assert (
                expected
                == tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
            )
            # an empty prompt needs an id: what transformers' generate() begins with where it has
            # none
            assert [one.encode(text, bos=True) for one in ours] == [
                expected or [tiny_hf.bos_id]
            ] * 2
            assert [one.encode(text) for one in ours] == [
                theirs.encode(text, add_special_tokens=False)
            ] * 2


@pytest.mark.parametrize(
    "files, name",
    [
        ({"tokenizer_config": {"bos_token": "<|eom_id|>"}}, "<|eom_id|>"),
        ({"tokenizer_config": {"bos_token": {"content": "<|eom_id|>"}}}, "<|eom_id|>"),
        ({"generation_config": {"bos_token_id": 256 + 8}}, None),  # an ordinary token here
        ({"config": {"bos_token_id": 1}}, None),  # LlamaConfig's default, an ordinary token here
        ({}, None),
    ],
)
def test_a_named_bos_begins_an_empty_prompt_only(files, name, tiny_hf_dir, tmp_path):
    tokenizer = folder_with(tmp_path, tiny_hf_dir, without_template, **files)
    assert tokenizer.bos_id == (name and tokenizer.special_id(name))
    assert tokenizer.encode("hello", bos=True) == tokenizer.encode("hello")
    assert (
        tokenizer.encode("", bos=True) == ([tokenizer.bos_id] if name else [])
        and tokenizer.encode("") == []
    )


def test_bos_from_the_configs(tiny_hf, tiny_hf_dir, tmp_path):
    tokenizer = folder_with(
        tmp_path, tiny_hf_dir, without_template, generation_config={"bos_token_id": tiny_hf.bos_id}
    )
    assert tokenizer.bos_id == tiny_hf.bos_id


def test_a_template_that_writes_bos_gets_no_second_one(tiny_hf, tiny_hf_dir, tmp_path):
    config = json.loads((tiny_hf_dir / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% for one in messages %}{{ one.content }}<|eot_id|>{% endfor %}"
    )
    tokenizer = folder_with(tmp_path, tiny_hf_dir, tokenizer_config=config)
    dialog = [{"role": "user", "content": "hello"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        dialog, return_dict=False
    )
    assert (
        open_template(str(tmp_path), tokenizer).encode_dialog(dialog) == theirs
        and theirs.count(tiny_hf.bos_id) == 1
    )


def test_truncation_and_padding_in_the_file_are_ignored(tiny_hf, tiny_hf_dir, tmp_path):
    def limit(raw):
        raw["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        raw["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }

    tokenizer = folder_with(tmp_path, tiny_hf_dir, limit)
    assert tokenizer.encode("hello the world. " * 5) == tiny_hf.encode("hello the world. " * 5)


def test_ids_may_have_gaps_and_added_tokens_may_have_text(tiny_hf, tiny_hf_dir, tmp_path):
    last = tiny_hf.n_vocab - 1

    def add(raw):
        raw["added_tokens"] = raw["added_tokens"][:4]  # the 252 after them are gone
        raw["added_tokens"].append(
            {
                "id": last + 10,
                "content": "a new word",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": False,
            }
        )
        raw["model"]["vocab"]["a new word"] = last + 10

    tokenizer = folder_with(tmp_path, tiny_hf_dir, add)
    assert tokenizer.n_vocab == last + 11
    assert (
        tokenizer.encode("a new word") == [last + 10]
        and tokenizer.decode([last, last + 10]) == "a new word"
    )
    with pytest.raises(UserError, match="not a Llama 3 chat model.*start_header_id"):
        ChatFormat(tokenizer)


@pytest.mark.parametrize(
    "names",
    [
        {"eos_token": "<e>"},
        {"eos_token": {"__type": "AddedToken", "content": "<e>"}},
        {"tool_token": "<e>"},
    ],
    ids=str,
)
def test_an_added_token_that_the_config_names_is_special(names, tiny_hf, tiny_hf_dir, tmp_path):
    """transformers saves an eos token that add_tokens() made with special false; a prompt must not
    forge it all the same."""

    def add(raw):
        raw["added_tokens"].append(
            {
                "id": tiny_hf.n_vocab,
                "content": "<e>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,
                "special": False,
            }
        )

    tokenizer = folder_with(
        tmp_path,
        tiny_hf_dir,
        add,
        tokenizer_config={"tokenizer_class": "TokenizersBackend", **names},
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "hello <e>the<|eot_id|>"
    ids = tokenizer.encode(text, bos=True)
    assert ids == theirs.encode(text, split_special_tokens=True) and tiny_hf.n_vocab not in ids
    assert (
        tokenizer.specials["<e>"] == tiny_hf.n_vocab
        and tokenizer.decode([*ids, tiny_hf.n_vocab]) == text
    )


def test_a_name_that_is_no_added_token_stays_what_it_is(tiny_hf, tiny_hf_dir, tmp_path):
    tokenizer = folder_with(
        tmp_path,
        tiny_hf_dir,
        tokenizer_config={
            "pad_token": "!",
            "eos_token": "[new]",
            "unk_token": None,
            "mask_token": 3,
            "add_bos_token": True,
        },
    )
    assert (
        tokenizer.n_vocab == tiny_hf.n_vocab
        and tokenizer.specials == tiny_hf.specials
        and tokenizer.decode(tokenizer.encode("hello!")) == "hello!"
    )


def test_dropout_of_the_training_is_off(tiny_hf, tiny_hf_dir, tmp_path):
    tokenizer = folder_with(tmp_path, tiny_hf_dir, lambda raw: raw["model"].update(dropout=0.9))
    assert tokenizer.encode("hello the world") == tiny_hf.encode("hello the world")


# -------------------------------------------------------------------------- sentencepiece-made JSON


@pytest.fixture
def metaspace_dir(tmp_path):
    """A tokenizer.json as transformers converts Llama 2's: a space before the first word, bytes for
    unknown letters."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        f"<0x{value:02X}>": 3 + value for value in range(256)
    }
    for piece in ["\u2581", "h", "i", "hi", "\u2581hi"]:
        vocab[piece] = len(vocab)
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab,
            [("h", "i"), ("\u2581", "hi")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    library.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_sentencepiece_made(metaspace_dir):
    (metaspace_dir / "tokenizer.model").write_bytes(SENTENCEPIECE)  # passed over
    tokenizer = open_tokenizer(None, str(metaspace_dir))
    library = tokenizers.Tokenizer.from_file(str(metaspace_dir / "tokenizer.json"))
    for text in ("hi hi", "hi 日本😀\n", "</s> hi"):
        ids = tokenizer.encode(text, bos=True)
        assert ids[0] == 1 and not set(ids[1:]) & {0, 1, 2}
        assert tokenizer.decode(ids) == " " + text == " " + library.decode(ids)


# ----------------------------------------------------------------------------------------- refusals


def test_the_extra_is_named(tiny_hf_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        UserError,
        match=r"tokenizer.json needs the tokenizers package.*pip install 'llama_tp\[hf\]'",
    ):
        open_tokenizer(None, str(tiny_hf_dir))


def test_a_cut_file(tiny_hf_dir, tmp_path):
    shutil.copy(tiny_hf_dir / "tokenizer.json", tmp_path)
    data = (tmp_path / "tokenizer.json").read_bytes()
    for content in (data[: len(data) // 2], b'{"bos_token": "<s>"}'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.json is not a whole tokenizer.json"):
            open_tokenizer(None, str(tmp_path))


def test_another_family(tiny_hf_dir, tmp_path):
    def wordpiece(raw):
        raw["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}

    with pytest.raises(UserError, match="not supported.*WordPiece"):
        folder_with(tmp_path, tiny_hf_dir, wordpiece)
