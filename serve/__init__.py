"""The OpenAI-compatible server over a session: one engine thread, many requests at once."""
