"""A vLLM KV connector that keeps prompt KV blocks in Valkey; works without Celery too."""
