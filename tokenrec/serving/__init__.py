"""Serve a trained run: export it as an artifact, and answer requests with that alone.

    request, retrieval_request    parse and check a request for scores, or for items
    artifact                      open an exported run, its digests checked
    encoder, retrieval_encoder    a request to the arrays of the model
    scorer                        prefill a request, and score its candidates
    retriever                     prefill a request, and find the best items
    export/                       make an artifact of a run (needs the packages of training)
    live/                         histories and statistics, kept up to date from events
    server/                       the HTTP server

docs/guides/serving.md describes the artifact and the requests.
"""
