"""OpenAI's shapes on one side, the engine's Request on the other; what batch and server share."""
