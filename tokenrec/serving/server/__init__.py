"""The HTTP server of an artifact, `tokenrec serve`.

    run           start, drain and stop
    app           the endpoints
    http_io, http_protocol, http_answers, limits    bodies, connections and errors
    score_request from a body to an encoded request, and to the answer
    batcher       score what waits in one device call
    batch_plan    which requests one call takes
    prefix_store  prefixes of recent users
    model_slot    the model in place, and its replacement
    load_model    open, warm and check an artifact
    metrics, prometheus    series

docs/guides/server.md is for those who run it.
"""
