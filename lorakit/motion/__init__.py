"""Films from prompts: noise that lies in a scene and is seen through a camera, and temporal attention.

What moved is measured here too.
"""
