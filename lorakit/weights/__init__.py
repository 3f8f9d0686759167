"""Weights as files: safetensors, LoRA files of every layout, bases as files describe them, sums and merges.

Works on tensors and headers and never on a live model. May import ground.
"""
