"""The bundled engine: spec, scheduler, KV cache, model, parallelism, server."""
