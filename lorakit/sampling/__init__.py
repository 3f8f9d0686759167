"""From prompts and pictures to pictures: samplers by name, grids, and the folder that generate.py fills.

May import ground, weights, pictures and diffusion.
"""
