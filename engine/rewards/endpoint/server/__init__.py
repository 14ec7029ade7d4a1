"""Asking servers: HTTP client, concurrency, retries, reply cache, budget, refusals."""
