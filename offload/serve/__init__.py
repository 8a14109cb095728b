"""An OpenAI-compatible HTTP server over one engine, and a page to talk to it. Needs the `serve` extra."""
