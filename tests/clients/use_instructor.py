"""instructor's modes for OpenAI-compatible servers against the server at URL, in an environment
that has it.

Of the others, JSON and MD_JSON leave the shape to the model, which this small one does not
follow."""

import sys
from typing import Literal

import instructor
import openai
import pydantic

URL = sys.argv[1]
MODES = (
    "JSON_SCHEMA",
    "TOOLS",
    "TOOLS_STRICT",
    "FIREWORKS_JSON",
    "PERPLEXITY_JSON",
    "OPENROUTER_STRUCTURED_OUTPUTS",
)
MESSAGES = [{"role": "user", "content": "Where is the feast?"}]


class Feast(pydantic.BaseModel, extra="forbid"):
    """A feast."""

    town: Literal["Verona", "Mantua"]
    rain: bool


class Weather(pydantic.BaseModel, extra="forbid"):
    """The weather."""

    rain: bool
    wind: bool


def client_of(mode: str) -> instructor.Instructor | None:
    """The client in this mode; None in a version that has the mode for one provider's URL alone."""
    try:
        return instructor.from_openai(
            openai.OpenAI(base_url=URL + "/v1", api_key="none"), mode=instructor.Mode[mode]
        )
    except Exception as error:
        assert mode not in MODES[:3] and "Invalid mode" in str(error), error
        return None


for mode in MODES:
    if (client := client_of(mode)) is None:
        continue
    sent = []
    client.on("completion:kwargs", lambda *_, sent=sent, **kwargs: sent.append(kwargs))
    for seed in range(3):
        wish = dict(
            model="gpt-4o",
            response_model=Feast,
            messages=MESSAGES,
            max_tokens=2000,
            temperature=1.0,
            seed=seed,
            max_retries=0,
        )
        found = client.chat.completions.create(**wish)
        assert isinstance(found, Feast) and found._raw_response.model == "demo"
    assert "response_format" in sent[0] or "tools" in sent[0], sent[0]
    if mode in MODES[:3]:  # streamed: there any field may be left out
        *_, last = client.chat.completions.create_partial(**wish | {"response_model": Weather})
        assert last.model_dump().keys() == {"rain", "wind"}, last
    print(
        f"{mode} with {sent[0].get('response_format') or sent[0]['tool_choice']}: right", flush=True
    )
