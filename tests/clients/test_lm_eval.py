"""lm-eval's local-completions against our server, beside its own HF backend on the same folder: the
same numbers."""

import json

import pytest

from tests.servers import serving

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip(
    "lm_eval", reason="a client of the extra llama_tp[clients]: make test-clients"
)
LINES = [
    "O Romeo, Romeo! wherefore art thou Romeo?",
    "Deny thy father and refuse thy name;",
    "Or, if thou wilt not, be but sworn",
    "my love, And I'll no longer be a Capulet.",
]
EVERY = """dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
"""
TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "generate": """output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{ends[0]}}"
generation_kwargs: {until: ["zz", "\\n\\n\\n", "qq", "xx", "vv"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",  # noqa: E501
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{start}}{{ends[0]}}"
metric_list: [{metric: byte_perplexity}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small HF folder with a tokenizer, in fp32."""
    torch, tokenizers = (
        pytest.importorskip("torch"),
        pytest.importorskip("tokenizers", reason="needs the extra llama_tp[hf]"),
    )
    transformers = pytest.importorskip("transformers", reason="the oracle is in the test extra")
    place = tmp_path_factory.mktemp("hf") / "verses"
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(
        LINES * 3,
        tokenizers.trainers.BpeTrainer(
            # lm-eval takes a BOS of id 0 for none
            vocab_size=320,
            special_tokens=["<|end_of_text|>", "<|begin_of_text|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(place)
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            vocab_size=library.get_vocab_size(),
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=0,
            initializer_range=0.3,
        )
    )
    model.float().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    data = place / "verses.jsonl"
    cuts = [
        (line[:k], [line[k:], line[k:][::-1], "é 😀", " love."])
        for line in LINES
        for k in (1, 9, 17)
    ]
    data.write_text(
        "".join(json.dumps({"start": start, "ends": ends}) + "\n" for start, ends in cuts)
    )
    for name, text in TASKS.items():
        (place / f"{name}.yaml").write_text(
            (f"task: verses_{name}\n" + EVERY + text).replace("DATA", str(data))
        )
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(place), include_defaults=False)


def evaluated(
    model: str, options: dict, tasks, names=("verses_choice", "verses_generate", "verses_rolling")
) -> dict:
    """Task -> what the model answered to each of its documents, in order."""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=options,
        tasks=list(names),
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
        random_seed=1,
        verbosity="ERROR",
    )
    return {
        name: [
            sample["filtered_resps"] for sample in sorted(samples, key=lambda each: each["doc_id"])
        ]
        for name, samples in found["samples"].items()
    }


@pytest.fixture(scope="module")
def theirs(folder, tasks):
    """By lm-eval's HF backend: with BOS in front of every text, and without."""
    options = dict(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)
    return {bos: evaluated("hf", {**options, "add_bos_token": bos}, tasks) for bos in (True, False)}


@pytest.fixture(scope="module")
def server(folder):
    with serving("--nproc_per_node", "2", "--dtype", "float32", ckpt_dir=folder) as one:
        yield one
        assert not one.failures() and one.end() == 0


def same(ours: dict, theirs: dict) -> None:
    """Sums of logprobs to 1e-3, the greedy tests and the texts exactly."""
    assert len(ours["verses_choice"]) == len(theirs["verses_choice"]) == 12
    for our, their in zip(ours["verses_choice"], theirs["verses_choice"]):
        assert [float(value) for value, _ in our] == pytest.approx(
            [float(value) for value, _ in their], abs=1e-3
        )
        assert [greedy for _, greedy in our] == [greedy for _, greedy in their]
    flat = [
        [float(value) for answers in each["verses_rolling"] for value in answers]
        for each in (ours, theirs)
    ]
    assert len(flat[0]) == 12 and flat[0] == pytest.approx(flat[1], abs=1e-3)
    assert (
        ours["verses_generate"] == theirs["verses_generate"]
        and len({str(each) for each in ours["verses_generate"]}) > 3
    )


@pytest.mark.parametrize(
    "bos, options",
    [
        (True, dict(num_concurrent=1, batch_size=4)),
        (True, dict(num_concurrent=6)),
        (False, dict(num_concurrent=1)),
        # which asks our server, and never for BOS in front
        (False, dict(tokenizer_backend="remote", num_concurrent=1)),
    ],
)
def test_the_same_numbers_as_its_hf_backend(bos, options, server, folder, tasks, theirs):
    options = {
        "model": "verses",
        "base_url": f"{server.url}/v1/completions",
        "add_bos_token": bos,
        "max_length": 512,
        "tokenizer_backend": "huggingface",
        **options,
    }
    if options["tokenizer_backend"] == "huggingface":
        options["tokenizer"] = str(folder)
    same(evaluated("local-completions", options, tasks), theirs[bos])


def test_a_checkpoint_without_hf_files(server, tasks):
    """Meta's layout has no tokenizer that lm-eval knows: the server's own serves it."""
    with serving("--nproc_per_node", "2") as demo:
        options = dict(
            model="demo",
            base_url=f"{demo.url}/v1/completions",
            tokenizer_backend="remote",
            max_length=512,
        )
        found = evaluated("local-completions", options, tasks)
        assert [len(found[name]) for name in found] == [12, 12, 12] and not demo.failures()
        assert all(float(value) < 0 for answers in found["verses_choice"] for value, _ in answers)
