"""Serve a trained run: export it as an artifact, and score requests with that alone.

    request    parse and check a request
    artifact   open an exported run, its digests checked
    encoder    a request to the arrays of the model
    scorer     prefill a request, and score its candidates
    export/    make an artifact of a run (needs the packages of training)
    live/      histories and statistics, kept up to date from events
    server/    the HTTP server

docs/guides/serving.md describes the artifact and the request.
"""
