"""What knows vLLM on behalf of several: its engine, its requests as bytes, text, models."""
