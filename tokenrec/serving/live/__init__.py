"""Histories, statistics of the past and counters, kept up to date from events.

    state      add events, complete requests, save
    counts     window, histories and features together
    schema     which columns a request gets
    window     events that may still come late
    histories  the newest events of each user
    features   statistics of a request's candidates
    sums       counters of a source
    journal    events that were acknowledged and are not in a saved state yet

docs/guides/live_events.md has the semantics.
"""
