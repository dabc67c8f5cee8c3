"""Compare models on equal budgets: a grid of training runs, their scores, and tables.

A study trains every model at several learning rates with one seed, trains the best rate
of each with the other seeds, and compares all models with a reference by a paired
bootstrap over users (`bootstrap.py`). Read `plan.py` first, then `runner.py`.
"""
