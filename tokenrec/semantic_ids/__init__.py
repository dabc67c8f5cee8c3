"""Semantic ids: short lists of codes that say what an item is like, coarse to fine.

Reading order: build.py (the steps), train_events.py, item_vectors.py with
cooccurrence.py, text_vectors.py and vectors.py (a vector per item), rq_kmeans.py and
rq_vae.py (vectors to codes), collisions.py (distinct codes), report.py.

The file of semantic ids, which training reads, is tokenrec/data/semantic_id_file.py.
"""
