"""Pretrained language models as backbones: their files, weights, words and prompts."""
