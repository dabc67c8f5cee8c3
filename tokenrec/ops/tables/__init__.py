"""Embedding tables, replicated or spread over the devices; start with `api`."""
