"""Make an artifact of a run; needs the packages of training.

run        the whole export: write, check against `predict`, put in place
checks     compare an artifact with `predict`
programs   trace a ranking model for any number of requests and candidates
retrieval_programs    trace a retrieval model for any number of requests
served_model          the model and the weights that programs read
requests   requests of the rows of a prepared data set
batches    the batches that `predict` scores, request by request
files      weights, vocabularies and catalogue of an artifact
live       the state that live events go on from
"""
