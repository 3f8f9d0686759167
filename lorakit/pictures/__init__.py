"""Pictures as files and arrays: folders and captions, crops and buckets, edges, contact sheets, animations.

Knows no weights and no torch. May import ground.
"""
