"""The head of a program in which no package of training can be imported."""

WITHOUT_TRAINING = """
import sys
BLOCKED = ("flax", "optax", "orbax", "grain", "tensorflow", "tensorflow_datasets",
           "array_record", "tokenizers", "fsspec", "ml_collections")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""
