"""A LoRA from pictures: objectives, the plan of a run, caches and batches, checkpoints, what is watched.

May import all packages but film. A new objective belongs here.
"""
