"""distilabel's models for servers against the server at URL, in an environment that has it: python
use_distilabel.py URL"""

import json
import sys
import warnings

warnings.simplefilter("ignore")  # its own, about its pydantic models

from distilabel.models import InferenceEndpointsLLM, OpenAILLM  # noqa: E402
from distilabel.pipeline import Pipeline  # noqa: E402
from distilabel.steps import LoadDataFromDicts  # noqa: E402
from distilabel.steps.tasks import TextGeneration  # noqa: E402

URL = sys.argv[1]
MESSAGES = [{"role": "user", "content": "Who are you?"}]


def generated(llm, **wish) -> list[dict]:
    """Its outputs for two equal inputs; each names its tokens, so that a reply without usage does
    not pass."""
    llm.load()
    outputs = llm.generate_outputs(
        inputs=[MESSAGES, MESSAGES], max_new_tokens=20, temperature=0.8, **wish
    )
    assert len(outputs) == 2 and all(all(each["generations"]) for each in outputs), outputs
    assert all(each["statistics"]["input_tokens"][0] > 5 for each in outputs), outputs
    return outputs


def logprobs(outputs: list[dict]) -> None:
    for output in outputs:
        [tokens] = output["logprobs"]
        assert len(tokens) == 20 and all(
            len(top) == 2 and all(one["logprob"] <= 0 for one in top) for top in tokens
        ), tokens


# sends the model's name "tgi" or "dummy"
endpoints = InferenceEndpointsLLM(base_url=URL + "/v1", api_key="none")
first, second = generated(endpoints, seed=3)
assert first["generations"] == second["generations"] and first["statistics"]["output_tokens"] == [
    20
]
logprobs(generated(endpoints, logprobs=True, top_logprobs=2))
print("InferenceEndpointsLLM: right", flush=True)

server = OpenAILLM(base_url=URL + "/v1", api_key="none", model="gpt-4o")
outputs = generated(server, num_generations=2)
assert all(len(set(each["generations"])) == 2 for each in outputs)
logprobs(generated(server, logprobs=True, top_logprobs=2))
[output] = server.generate_outputs(
    inputs=[MESSAGES], max_new_tokens=400, response_format={"type": "json_object"}
)
text = output["generations"][0]
assert text.startswith("{") and (
    output["statistics"]["output_tokens"] == [400] or json.loads(text) is not None
), text
print("OpenAILLM: right", flush=True)

if __name__ == "__main__":  # its steps are processes
    with Pipeline(name="feast") as pipeline:
        rows = LoadDataFromDicts(
            data=[{"instruction": f"Speak, {name}."} for name in ("Romeo", "Juliet", "Nurse")]
        )
        rows >> TextGeneration(
            llm=InferenceEndpointsLLM(
                base_url=URL + "/v1",
                api_key="none",
                generation_kwargs={"max_new_tokens": 8, "seed": 1},
            )
        )
    made = pipeline.run(use_cache=False)["default"]["train"]
    assert len(made) == 3 and all(made["generation"]), made["generation"]
    print("a pipeline: right", flush=True)
