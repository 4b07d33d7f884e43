"""OpenAI's shapes on one side, the engine's Request on the other; for batch jobs and the server."""
