"""From picture to picture over time: where frames lie, how they are made, the report and the page of a morph.

May import all packages but training.
"""
